"""What a failed request of a disk is to the VM: BLOCK_IO_ERROR, io-status, a stop in the run state io-error.

The devices decide by the drive's policy, and hold the request when the VM is to stop (block/policy.py). Here the user
learns of it, as from QEMU's own virtio-blk (docs/reference/qmp.md, "I/O errors"), and the VM stops and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nvmove.block.policy import Action, ErrorPolicy, ErrorReport
from nvmove.options import drives as drive_options
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.exports import current_nodes
from nvmove.vm.monitor.facade import Facade, QemuGone, QmpError
from nvmove.vm.monitor.throttle import Throttle
from nvmove.vm.moves.runstate import RunState

log = logging.getLogger(__name__)

Out = Callable[[str], None]

_PAUSED_TEXT, _IO_ERROR_TEXT = "VM status: paused\r\n", "VM status: paused (io-error)\r\n"
_ARRIVING_TEXT = "VM status: paused (inmigrate)\r\n"


def timestamp() -> dict[str, int]:
    """Return the time as events carry it."""
    now = time.time_ns()
    return {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}


def event(drive: ServedDrive, report: ErrorReport, node: str) -> dict[str, Any]:
    """Return the event BLOCK_IO_ERROR, its members in QEMU's order; `node` is the one that the drive is on now."""
    return {
        "timestamp": timestamp(),
        "event": "BLOCK_IO_ERROR",
        "data": {
            "device": drive.name,
            **({"nospace": report.is_no_space} if drive.io.is_shown else {}),
            "node-name": node,
            "qom-path": f"/machine/peripheral/{drive.qdev}",
            "reason": os.strerror(report.errno),
            "operation": "read" if report.is_read else "write",
            "action": report.action.value,
        },
    }


class IoErrors:
    """The errors of one VM's drives. To be made in the event loop; all but `report` is for that loop only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._drives: Mapping[str, ServedDrive] = {}
        self._unnamed: list[ErrorReport] = []
        """Reports of drives in QEMU, which is being asked for the nodes that they are on."""

    def report(self, report: ErrorReport) -> None:
        """A device reports an error; on any thread. None comes before `connect`: the VM does not run before."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the VM has ended
            self._loop.call_soon_threadsafe(self._take, report)

    def connect(self, facade: Facade, runstate: RunState, drives: Mapping[str, ServedDrive]) -> None:
        """The VM's monitor is there: put our commands into it. `drives` by the names that reports have."""
        self._facade = facade
        self._runstate = runstate
        self._drives = drives
        self._throttle = Throttle(facade.emit)
        runstate.before_resume.append(self._reset)
        facade.handlers["query-status"] = self._query_status
        facade.hmp_handlers["info status"] = self._info_status
        facade.handlers["nvmove-set-error-policy"] = self._set_policy
        facade.commands.concurrent |= {"query-status", "info status", "nvmove-set-error-policy"}

    def _take(self, report: ErrorReport) -> None:
        drive = self._drives[report.drive]
        if report.action is Action.STOP:
            drive.io.fail(report.is_no_space)
        if drive.export:
            self._unnamed.append(report)
            if len(self._unnamed) == 1:
                self._naming = asyncio.ensure_future(self._name())
        else:
            self._send(report, drive.node)
        if report.action is Action.STOP:
            self._runstate.stop_for_error()  # which asks QEMU too, and later: STOP follows the event

    async def _name(self) -> None:
        """Send what waits: an overlay or a job may have put another node in the place of the drive's first."""
        try:
            nodes = await current_nodes(self._facade)
        except (QmpError, QemuGone) as error:
            log.debug("the nodes of drives with errors are not known: %s", error)
            nodes = {}
        reports, self._unnamed = self._unnamed, []
        for report in reports:
            drive = self._drives[report.drive]
            self._send(report, nodes.get(drive.export, drive.node))

    def _send(self, report: ErrorReport, node: str) -> None:
        told = event(self._drives[report.drive], report, node)
        if report.action is Action.STOP:
            self._facade.emit(told)
        else:
            self._throttle.send(report.drive, told)

    def _reset(self) -> None:
        for drive in self._drives.values():
            drive.io.reset()

    # --- commands ----------------------------------------------------------------------------------------------------

    async def _query_status(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        answer = await facade.execute("query-status", arguments or None)
        if self._runstate.autostart is not None:  # also while nvmove finishes what QEMU takes for done
            return {**answer, "status": "inmigrate"}
        if self._runstate.io_error and answer["status"] == "paused":
            return {**answer, "status": "io-error"}
        return answer

    async def _info_status(self, facade: Facade, arguments: str, _out: Out) -> str:
        text = await facade.hmp(f"info status {arguments}".strip())
        if self._runstate.autostart is not None and text.startswith("VM status: "):
            return _ARRIVING_TEXT
        return _IO_ERROR_TEXT if self._runstate.io_error and text == _PAUSED_TEXT else text

    async def _set_policy(self, _facade: Facade, arguments: dict[str, Any]) -> Any:
        """QMP `nvmove-set-error-policy`."""
        _check(arguments, ("device", "werror", "rerror"))
        if "device" not in arguments:
            raise QmpError("GenericError", "Parameter 'device' is missing")
        name = arguments["device"]
        drive = _find(self._drives.values(), name)
        if drive is None:
            raise QmpError("GenericError", f"nvmove serves no drive '{name}'")
        werror, rerror = _policy(arguments, "werror"), _policy(arguments, "rerror")
        if werror is None and rerror is None:
            raise QmpError("GenericError", "nvmove-set-error-policy: give werror or rerror, or both")
        if rerror is ErrorPolicy.ENOSPC:
            raise QmpError("GenericError", "'enospc' invalid read error action")
        errors = drive.io.errors
        errors.werror, errors.rerror = werror or errors.werror, rerror or errors.rerror
        return {}


def _find(drives: Iterable[ServedDrive], name: str) -> ServedDrive | None:
    return next((drive for drive in drives if name and name in {drive.name, drive.node}), None)


def _check(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    for name, value in arguments.items():
        if name not in known:
            raise QmpError("GenericError", f"Parameter '{name}' is unexpected")
        if not isinstance(value, str):
            raise QmpError("GenericError", f"Invalid parameter type for '{name}', expected: string")


def _policy(arguments: Mapping[str, str], name: str) -> ErrorPolicy | None:
    """Return the policy that is asked for; None when there is none."""
    if name not in arguments:
        return None
    default = {"werror": drive_options.DEFAULT_WERROR, "rerror": drive_options.DEFAULT_RERROR}[name]
    try:
        return ErrorPolicy(drive_options.resolve(arguments[name], default))
    except ValueError:
        raise QmpError("GenericError", f"Parameter '{name}' does not accept value '{arguments[name]}'") from None
