"""Block commands about images that nvmove has opened itself: QEMU has no such nodes, so they are refused by name.

And limits that QEMU would accept for a disk of nvmove's, whose I/O would not meet them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.monitor.facade import Facade, QmpError

Out = Callable[[str], None]

_WAY_OUT = "start with -device nvme,…,image-owner=qemu, and QEMU has it"
_THROTTLING = (
    "a disk of nvmove's does not meet the limits of a device: "
    "put a node of driver=throttle (with -object throttle-group) on top of its image"
)

COMMANDS = (
    "block-commit",
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-merge",
    "block-dirty-bitmap-remove",
    "block-export-add",
    "block-set-write-threshold",
    "block-stream",
    "blockdev-add",
    "blockdev-backup",
    "blockdev-del",
    "blockdev-mirror",
    "blockdev-reopen",
    "blockdev-set-active",
    "blockdev-snapshot",
    "blockdev-snapshot-delete-internal-sync",
    "blockdev-snapshot-internal-sync",
    "blockdev-snapshot-sync",
    "change-backing-file",
    "drive-backup",
    "drive-mirror",
    "nbd-server-add",
    "transaction",
    "x-blockdev-amend",
    "x-blockdev-change",
    "x-blockdev-set-iothread",
)
"""QMP commands that name block nodes or drives somewhere in their arguments."""
HMP_COMMANDS = (
    "block_stream",
    "commit",
    "drive_backup",
    "drive_mirror",
    "nbd_server_add",
    "qemu-io",
    "snapshot_blkdev",
    "snapshot_blkdev_internal",
    "snapshot_delete_blkdev_internal",
)
"""HMP commands whose first word, after options, is a drive or a node."""
_NO_NAME = frozenset({"id", "job-id", "name", "snapshot-file", "filename", "type", "driver", "qom-type"})
"""Members whose value is no node's name."""


class OwnImages:
    """Refuses, before QEMU is asked."""

    def __init__(self, facade: Facade, drives: Sequence[ServedDrive]) -> None:
        self._facade = facade
        self._own = {name for drive in drives if not drive.in_qemu for name in (drive.name, drive.node) if name}
        self._all = {name for drive in drives for name in (drive.name, drive.node, drive.qdev) if name}

    def register(self) -> None:
        """Put it before QEMU's commands, and before those of ours that are in the facade already."""
        facade = self._facade
        if self._own:
            for name in COMMANDS:
                before = facade.handlers.get(name)
                if before is None:
                    facade.commands.concurrent.add(name)  # what is QEMU's waits for nothing of ours
                facade.handlers[name] = functools.partial(self._qmp, name, before)
            for name in HMP_COMMANDS:
                hmp_before = facade.hmp_handlers.get(name)
                if hmp_before is None:
                    facade.commands.concurrent.add(name)
                facade.hmp_handlers[name] = functools.partial(self._hmp, name, hmp_before)
            start = facade.hmp_handlers.get("nbd_server_start")
            facade.hmp_handlers["nbd_server_start"] = functools.partial(self._hmp_export_all, start)
        facade.commands.concurrent |= {"block_set_io_throttle"}
        facade.handlers["block_set_io_throttle"] = self._throttle
        facade.hmp_handlers["block_set_io_throttle"] = self._hmp_throttle

    async def _qmp(self, name: str, before: Any, facade: Facade, arguments: dict[str, Any]) -> Any:
        for value in _names(arguments):
            if value in self._own:
                raise _refusal(value)
        return await (before(facade, arguments) if before else facade.execute(name, arguments))

    async def _hmp(self, name: str, before: Any, facade: Facade, arguments: str, out: Out) -> str:
        first = next((word for word in arguments.split() if not word.startswith("-")), "")
        if first in self._own:
            raise _refusal(first)
        if before:
            return str(await before(facade, arguments, out))
        return await facade.hmp(f"{name} {arguments}".strip())

    async def _hmp_export_all(self, before: Any, facade: Facade, arguments: str, out: Out) -> str:
        if "-a" in arguments.split():
            raise _refusal(min(self._own))
        if before:
            return str(await before(facade, arguments, out))
        return await facade.hmp(f"nbd_server_start {arguments}".strip())

    async def _throttle(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        if self._all & {arguments.get("device"), arguments.get("id")}:
            raise QmpError("GenericError", f"block_set_io_throttle: {_THROTTLING}")
        return await facade.execute("block_set_io_throttle", arguments)

    async def _hmp_throttle(self, facade: Facade, arguments: str, _out: Out) -> str:
        if self._all & set(arguments.split()[:1]):
            raise QmpError("GenericError", f"block_set_io_throttle: {_THROTTLING}")
        return await facade.hmp(f"block_set_io_throttle {arguments}".strip())


def _refusal(name: str) -> QmpError:
    return QmpError("GenericError", f"'{name}' is an image that nvmove has opened, and QEMU does not know: {_WAY_OUT}")


def _names(value: Any, member: str = "") -> Iterator[str]:
    """Yield the strings in a command's arguments that may name a node."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _names(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner, member)
    elif isinstance(value, str) and member not in _NO_NAME:
        yield value
