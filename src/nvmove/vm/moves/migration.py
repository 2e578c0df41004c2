"""The source of a live migration: what nvmove does around QEMU's `migrate` (docs/design.md, "Migration").

`pause-before-switchover` makes QEMU wait when it has stopped the VM. Then: devices at rest → MSI-X tables read → what
the devices wrote by DMA marked dirty → raw images handed over → `migrate-continue` (which calls our D-Bus `Save`).
A client that did not ask for that pause does not see it. Whatever ends the migration otherwise, QEMU starts the VM
again if it ran, and the devices follow its RESUME (vm/moves/runstate.py).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import stat
from collections.abc import Callable, Container, Mapping
from typing import Any

from nvmove.block.backend import BackendError
from nvmove.nvme.seams import DmaError
from nvmove.vfio.dirty import DirtyReport
from nvmove.vm.monitor.facade import Facade, QemuGone, QmpError
from nvmove.vm.moves import migratetext
from nvmove.vm.moves.capabilities import EVENTS, PAUSE, RETURN_PATH, refuse
from nvmove.vm.moves.movable import Movable
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.runstate import MIGRATING
from nvmove.vm.moves.snapshot import SnapshotError
from nvmove.vmstate.dbus_daemon import BusError

log = logging.getLogger(__name__)

Event = dict[str, Any]
Out = Callable[[str], None]

PRE_SWITCHOVER, ACTIVE = "pre-switchover", "active"
ENDED = frozenset({"completed", "failed", "cancelled"})
"""QAPI's MigrationStatus in which nothing is under way any more."""
_GOING = frozenset({"setup", ACTIVE, PRE_SWITCHOVER, "device"})
_FAILED = {"cancelling": "failing", "cancelled": "failed"}
"""What we have cancelled, for a reason, has failed."""
_WAYS_BACK = ("tcp:", "unix:", "vsock:", "rdma:")
_NO_POSTCOPY = "postcopy is not possible with nvmove's disks"
_PROGRESS_SECONDS = 0.5
_ENDING_SECONDS = 3.0
"""How long a new migration waits for the end of the last one."""


class Stage(enum.Enum):
    """Where a migration is."""

    IDLE = "nothing is under way"
    RUNNING = "memory is copied, the VM may run"
    PREPARING = "QEMU waits for us: VM stopped, devices come to rest"
    READY = "the devices are ready; the user may be who is waited for now"
    SWITCHED = "QEMU goes on"
    ENDING = "over, one way or the other; what was set for it is set back"


class Migration:
    """One VM's outgoing migrations, one at a time."""

    def __init__(self, vm: Movable, check_bus: Callable[[], None]) -> None:
        """`check_bus` raises BusError when QEMU would not reach the devices' state."""
        self._vm = vm
        self._check_bus = check_bus
        self.stage = Stage.IDLE
        self._held_event: Event | None = None
        """QEMU's `pre-switchover`, until we are ready for it."""
        self._failure = ""
        """Why we ended the migration; QEMU says "cancelled" then."""
        self._marking: DirtyReport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._is_ending = False
        self._sockets: set[str] = set()
        """Names of descriptors passed by `getfd` that are sockets."""
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self) -> None:
        """Put the commands into the facade."""
        facade = self._vm.facade
        facade.handlers["migrate"] = self._qmp_migrate
        facade.handlers["migrate-continue"] = self._qmp_continue
        facade.handlers["query-migrate"] = self._qmp_query
        facade.handlers["migrate-recover"] = self._qmp_recover
        facade.hmp_handlers["migrate"] = self._hmp_migrate
        facade.hmp_handlers["migrate_continue"] = self._hmp_continue
        facade.hmp_handlers["info migrate"] = self._hmp_query
        facade.hmp_handlers["migrate_recover"] = self._hmp_recover
        facade.commands.concurrent |= {"migrate", "migrate-continue", "migrate_continue"}
        facade.commands.concurrent |= {"query-migrate", "info migrate"}
        facade.on_event("MIGRATION", self._on_status)
        facade.on_event("RESUME", self._on_resume)
        facade.filters.append(self._filter)
        facade.fd_watchers.append(self._on_fd)

    # --- from the start to the switch-over ---------------------------------------------------------------------------

    async def start(self, arguments: dict[str, Any]) -> None:
        """Begin as QMP `migrate` does; raises QmpError, with everything as it was."""
        async with self._vm.facade.exclusive():
            if self.stage is Stage.ENDING and self._ended is not None:  # a cancel may hang in QEMU, on exec: say
                await asyncio.wait({self._ended}, timeout=_ENDING_SECONDS)
            if self.stage is not Stage.IDLE:
                raise QmpError("GenericError", MIGRATING)
            await self._check(arguments)
            async with self._vm.runstate.lock:  # not in the middle of a snapshot
                await self._start(arguments)

    async def _check(self, arguments: Mapping[str, Any]) -> None:
        if self._vm.runstate.autostart is not None:
            raise QmpError("GenericError", "Guest is waiting for an incoming migration")
        if arguments.get("resume"):
            raise QmpError("GenericError", f"migrate: nothing to resume: {_NO_POSTCOPY}")
        if any(channel.get("channel-type") == "cpr" for channel in _channels(arguments)):
            raise QmpError("GenericError", "migrate: a cpr channel is not supported with nvmove's disks")
        users = await self._vm.capabilities.users()
        refuse({name for name, state in users.items() if state})
        mode = (await self._vm.facade.execute("query-migrate-parameters")).get("mode", "normal")
        if mode != "normal":
            raise QmpError("GenericError", f"migrate: mode '{mode}' is not supported with nvmove's disks")
        try:
            self._check_bus()
        except BusError as error:
            raise QmpError("GenericError", str(error)) from None

    async def _start(self, arguments: dict[str, Any]) -> None:
        self._failure, self._marking, self._held_event, self._is_ending = "", None, None, False
        self._ended = asyncio.get_running_loop().create_future()
        self.stage = Stage.RUNNING
        self._vm.runstate.migrating = True
        way_back = (RETURN_PATH,) if has_way_back(arguments, self._sockets) else ()
        try:
            await self._vm.capabilities.override(EVENTS, PAUSE, *way_back)
            await self._track(True)
            await self._vm.facade.execute("migrate", arguments)
        except BaseException:
            await self._end(is_complete=False)  # QEMU may have told of it by an event too
            raise

    async def _track(self, on: bool) -> None:
        await asyncio.gather(*(asyncio.to_thread(device.track_dirty, on) for device in self._vm.devices))

    # --- events ------------------------------------------------------------------------------------------------------

    def _on_status(self, event: Event) -> None:
        status = event["data"]["status"]
        if self.stage is Stage.IDLE:
            return
        if status == PRE_SWITCHOVER and self.stage is Stage.RUNNING:
            self.stage = Stage.PREPARING
            self._vm.runstate.switching_over = True
            self._spawn(self._prepare())
        elif status in ENDED:
            self._spawn(self._end(is_complete=status == "completed"))
        elif status not in _GOING:  # failing, cancelling
            self.stage = Stage.ENDING

    def _on_resume(self, _event: Event) -> None:
        if self.stage in {Stage.PREPARING, Stage.READY}:
            self.stage = Stage.ENDING

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _filter(self, event: Event) -> list[Event]:
        """Show clients what they would see of a migration that we have no part in."""
        if event["event"] not in {"MIGRATION", "MIGRATION_PASS"} or not self._vm.capabilities.overridden:
            return [event]
        if not self._vm.capabilities.user(EVENTS):
            return []
        status = event["data"].get("status")
        if status == PRE_SWITCHOVER:
            if self._users_pause:
                self._held_event = event  # they see it when we are ready
            return []
        if self._failure and status in {"cancelling", "cancelled"}:
            return [{**event, "data": {**event["data"], "status": _FAILED[status]}}]
        return [event]

    @property
    def _users_pause(self) -> bool:
        return self._vm.capabilities.user(PAUSE)

    def _on_fd(self, name: str, arguments: Mapping[str, Any], fd: int) -> None:
        """A descriptor is passed to QEMU: whether it is a socket decides about the way back."""
        if name == "getfd":
            known = self._sockets.add if stat.S_ISSOCK(os.fstat(fd).st_mode) else self._sockets.discard
            known(str(arguments.get("fdname")))

    # --- the switch-over ---------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """The VM is stopped: bring everything into the state that is saved, and go on unless the user is to say so."""
        try:
            async with self._vm.runstate.lock:
                if not await self._vm.runstate.pause_devices():
                    return  # cancelled
                self._check_bus()  # once more: the images are about to go
                await self._vm.snapshots.before_save()
                async with self._vm.snapshots.bus_masters():
                    reports = await asyncio.gather(
                        *(asyncio.to_thread(device.mark_dirty) for device in self._vm.devices)
                    )
            self._marking = DirtyReport(
                sum(report.pages for report in reports),
                sum(report.bytes for report in reports),
                max(report.seconds for report in reports),
            )
            if self.stage is not Stage.PREPARING:
                return
            self.stage = Stage.READY
            if not self._users_pause:
                await self._go_on()
            elif self._held_event is not None:
                self._vm.facade.emit(self._held_event)
        except QemuGone:
            log.debug("QEMU ended in the switch-over")
        except (SnapshotError, ReplayError, DmaError, BackendError, BusError, QmpError) as error:
            await self._fail(str(error))
        except Exception as error:  # QEMU waits for us, with the VM stopped: it must not wait for ever
            log.exception("migrate: the switch-over failed inside nvmove")
            await self._fail(f"nvmove: internal error: {error}")

    async def _go_on(self) -> None:
        """Hand the images over and let QEMU send the rest. Raises QmpError, BackendError."""
        if await self._vm.images.release(lambda: self.stage is Stage.READY):
            await self._vm.facade.execute("migrate-continue", {"state": PRE_SWITCHOVER})
            if self.stage is Stage.READY:
                self.stage = Stage.SWITCHED

    async def _fail(self, reason: str) -> None:
        """Give the migration up; the VM runs on here."""
        if self.stage in {Stage.ENDING, Stage.IDLE}:
            return  # somebody else did
        self._failure = reason
        log.error("migrate: %s", reason)
        try:
            await self._vm.facade.execute("migrate_cancel")
        except (QmpError, QemuGone) as error:
            log.debug("there was nothing to cancel any more: %s", error)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def ended(self) -> None:
        """Wait until no migration is under way, and nothing of the last one is left to do."""
        if self._ended is not None:
            await asyncio.shield(self._ended)

    async def _end(self, *, is_complete: bool) -> None:
        """Set back what was set for the migration; where the VM did not leave, take its images again."""
        if self._is_ending:
            await self.ended()
            return
        self._is_ending = True
        self.stage = Stage.ENDING
        try:
            await self._track(False)
            await self._vm.capabilities.restore()
            if not is_complete:
                await self._vm.images.take()
        except (BackendError, QmpError) as error:
            log.error("%s", error)
        except QemuGone:
            log.debug("QEMU ended with the migration")
        finally:
            self._vm.runstate.migrating = self._vm.runstate.switching_over = False
            self.stage = Stage.IDLE
            assert self._ended is not None
            self._ended.set_result(None)

    # --- commands ----------------------------------------------------------------------------------------------------

    async def _qmp_migrate(self, _facade: Facade, arguments: dict[str, Any]) -> Any:
        await self.start(arguments)
        return {}

    async def _hmp_migrate(self, facade: Facade, arguments: str, out: Out) -> str:
        command = migratetext.parse(arguments)
        if command is None:
            return await facade.hmp(f"migrate {arguments}".strip())  # QEMU says what is wrong
        await self.start({"uri": command.uri, "resume": True} if command.resume else {"uri": command.uri})
        if command.detach:
            return ""
        if not facade.is_on_terminal:
            return "terminal does not allow synchronous migration, continuing detached\r\n"
        return await self._show_progress(facade, out)

    async def _show_progress(self, facade: Facade, out: Out) -> str:
        """Print a line that is rewritten in place until the migration has ended."""
        assert self._ended is not None
        while True:
            answer = self._shown(await facade.execute("query-migrate"))
            if self._ended.done() or answer.get("status") in ENDED:
                break
            out(migratetext.in_place(migratetext.progress(answer)))
            await asyncio.wait({self._ended}, timeout=_PROGRESS_SECONDS)
        await self.ended()
        out(migratetext.in_place(""))
        if answer.get("status") == "cancelled":
            return "migration cancelled\n"
        return f"Error: {answer['error-desc']}\n" if "error-desc" in answer else ""

    async def _qmp_continue(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        if self.stage in {Stage.PREPARING, Stage.READY} and arguments == {"state": PRE_SWITCHOVER}:
            if self.stage is Stage.PREPARING or not self._users_pause:
                raise QmpError("GenericError", f"Migration not in expected state: {ACTIVE}")
            try:
                await self._go_on()
            except BackendError as error:
                await self._fail(str(error))
                raise QmpError("GenericError", str(error)) from None
            return {}
        return await facade.execute("migrate-continue", arguments)

    async def _hmp_continue(self, facade: Facade, arguments: str, _out: Out) -> str:
        if arguments.strip() != PRE_SWITCHOVER:
            return await facade.hmp(f"migrate_continue {arguments}".strip())
        await self._qmp_continue(facade, {"state": PRE_SWITCHOVER})
        return ""

    async def _qmp_query(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        return self._shown(await facade.execute("query-migrate", arguments or None))

    def _shown(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return QEMU's answer to `query-migrate` as the user is to see it."""
        shown = dict(answer)
        status = str(answer.get("status", ""))
        if status == PRE_SWITCHOVER and not (self._users_pause and self.stage is Stage.READY):
            shown["status"] = ACTIVE
        if status == "completed" and self._vm.runstate.autostart is not None:
            shown["status"] = ACTIVE  # arrived, and being brought into its state
        if self._failure and status in _FAILED:
            shown |= {"status": _FAILED[status], "error-desc": self._failure}
        if self._marking is not None:
            shown["nvmove-marking"] = {
                "pages": self._marking.pages,
                "bytes": self._marking.bytes,
                "milliseconds": round(self._marking.seconds * 1000),
            }
        return shown

    async def _hmp_query(self, facade: Facade, arguments: str, _out: Out) -> str:
        text = await facade.hmp(f"info migrate {arguments}".strip())
        return migratetext.shown(text, self._shown(await facade.execute("query-migrate")))

    async def _qmp_recover(self, _facade: Facade, _arguments: dict[str, Any]) -> Any:
        raise QmpError("GenericError", f"migrate-recover: {_NO_POSTCOPY}")

    async def _hmp_recover(self, _facade: Facade, _arguments: str, _out: Out) -> str:
        raise QmpError("GenericError", f"migrate_recover: {_NO_POSTCOPY}")


def _channels(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    channels = arguments.get("channels")
    return [one for one in channels if isinstance(one, dict)] if isinstance(channels, list) else []


def has_way_back(arguments: Mapping[str, Any], sockets: Container[str]) -> bool:
    """Return whether the destination can answer over what QMP `migrate` names; `sockets` are descriptors' names."""
    uri = arguments.get("uri")
    if isinstance(uri, str):
        return uri.startswith(_WAYS_BACK) or (uri.startswith("fd:") and _is_socket(uri[3:], sockets))
    for channel in _channels(arguments):
        address = channel.get("addr")
        if channel.get("channel-type") == "main" and isinstance(address, dict):
            if address.get("transport") != "socket":
                return address.get("transport") == "rdma"
            return address.get("type") != "fd" or _is_socket(str(address.get("str")), sockets)
    return False


def _is_socket(name: str, sockets: Container[str]) -> bool:
    """Return whether a descriptor is one: by its name from `getfd`, or by number where nvmove's caller passed it on."""
    if not name.isdecimal():
        return name in sockets
    try:
        return stat.S_ISSOCK(os.fstat(int(name)).st_mode)
    except OSError:
        return False
