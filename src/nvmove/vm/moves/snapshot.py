"""savevm, loadvm and their QMP jobs: what nvmove does around QEMU's (docs/design.md, "Saving and loading").

save: stop the VM → devices at rest → read the MSI-X tables → QEMU's command (which calls our D-Bus `Save`) → run on.
load: stop the VM → devices at rest → QEMU's command (reset, then our D-Bus `Load`) → PCI replay → run on.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from nvmove.vm.monitor.facade import Monitor
from nvmove.vm.moves.pciaddress import ConfigSpace, ConfigSpaces, find
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.replay import Replayed, bar0_address, bus_master, read_msix_table, replay
from nvmove.vm.moves.runstate import Held, Paused, RunState
from nvmove.vmstate.bus import check_size
from nvmove.vmstate.dbus_daemon import BusError
from nvmove.vmstate.schema import StateError

_MISSING = re.compile(r"Failed to find proxy Id 'nvmove/([^']+)'")
"""QEMU's line about a state for which there is no device here."""
_VMSTATE = "device 'dbus-vmstate"
"""What QEMU's message has when the object that carries our states failed; a job's error has nothing more."""


class SavedDevice(Replayed, Paused, Protocol):
    """A device as snapshots need it."""

    id: str
    """Its id in QEMU."""
    loads: int
    """How many states were loaded since it exists."""
    resets: int
    """How many function-level resets it has seen."""

    def save(self) -> bytes:
        """Return the state of the paused device."""

    def keep_msix_table(self, table: bytes) -> None:
        """Take QEMU's MSI-X table into the state that `save` writes."""


class Refuser(Protocol):
    """Who hands our states over to QEMU and back (vmstate/bus.py)."""

    refusal: str
    """Why a state was refused: its Id and the reason; empty when none was."""

    def check(self) -> None:
        """Raise BusError when QEMU would not reach the states."""


class HmpMonitor(Monitor, Protocol):
    """QEMU's monitor, HMP included."""

    async def hmp(self, line: str) -> str:
        """Run an HMP command line of QEMU's; return its output."""


class SnapshotError(Exception):
    """A snapshot that cannot be made or loaded: QEMU's message, or ours in its place."""


def failure(output: str) -> str:
    """Return why an HMP command has failed by its output, in QEMU's words; empty when it has not.

    There may be lines before: warnings, and what QEMU's devices have to say.
    """
    found = re.search(r"^Error: (.*)", output, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


class Snapshots:
    """Saves and loads the VM with its nvmove devices."""

    def __init__(
        self,
        monitor: HmpMonitor,
        spaces: ConfigSpaces,
        runstate: RunState,
        devices: Sequence[SavedDevice],
        unsaveable: Sequence[str],
        refuser: Refuser,
    ) -> None:
        self._monitor = monitor
        self._spaces = spaces
        self._runstate = runstate
        self._devices = devices
        self._unsaveable = unsaveable
        self._refuser = refuser
        self.on_load: list[Callable[[], Awaitable[None]]] = []
        """Called when a state has been loaded, with the VM stopped."""
        self._jobs: dict[str, asyncio.Future[None]] = {}
        self._errors: dict[str, str] = {}
        """What `query-jobs` says of jobs that have failed, where it is not what QEMU says."""

    def _check_bus(self) -> None:
        """Raise SnapshotError where QEMU would say for itself, in five lines of its libraries', that it has no bus."""
        try:
            self._refuser.check()
        except BusError as error:
            raise SnapshotError(str(error)) from None

    def check(self) -> None:
        """Raise SnapshotError, in QEMU's words, when a disk that nvmove serves itself cannot hold snapshots."""
        if self._unsaveable:
            raise SnapshotError(f"Device '{self._unsaveable[0]}' is writable but does not support snapshots")

    async def before_save(self) -> None:
        """Read every device's MSI-X table out of QEMU; the VM is stopped and the devices are at rest.

        Raises SnapshotError where QEMU would not carry a device's state: it would only log it, and save without.
        """
        async for device, space in self._functions():
            device.keep_msix_table(await read_msix_table(space, device.pci_config, device.msix_table_offset))
        try:
            for device in self._devices:
                check_size(device.id, await asyncio.to_thread(device.save))
        except StateError as error:
            raise SnapshotError(str(error)) from None

    @contextlib.asynccontextmanager
    async def bus_masters(self) -> AsyncIterator[None]:
        """Let every device write to guest memory in the body; the VM is stopped."""
        async with contextlib.AsyncExitStack() as stack:
            async for device, space in self._functions():
                await stack.enter_async_context(bus_master(space, device.pci_config))
            yield

    async def after_load(self) -> None:
        """Give QEMU the devices' PCI state back; the VM is stopped."""
        async for device, space in self._functions():
            await replay(space, device)
        for tell in self.on_load:
            await tell()

    async def _functions(self) -> AsyncIterator[tuple[SavedDevice, ConfigSpace]]:
        """The devices, each with its configuration space where the guest has put it by now.

        One behind a bridge that the guest has not numbered yet is nowhere, and left out: QEMU has of it what a reset
        leaves, and so have we. Raises ReplayError for one that was placed and is gone.
        """
        pci = await self._monitor.execute("query-pci")
        for device in self._devices:
            try:
                address = find(pci, device.id)
            except ReplayError:
                if bar0_address(device.pci_config):
                    raise
                continue
            yield device, ConfigSpace(self._spaces, address)

    async def save(self, line: str) -> str:
        """Run the HMP command `savevm …`; return its output."""
        self.check()
        self._check_bus()
        async with self._runstate.held():
            await self.before_save()
            return await self._monitor.hmp(line)

    async def load(self, line: str) -> str:
        """Run the HMP command `loadvm …`; return its output, in which `failure` finds whether all went well.

        A load that failed half-way leaves the VM stopped, as QEMU does; one that touched nothing lets it run on.
        """
        self.check()
        self._check_bus()
        async with self._runstate.held(for_load=True) as held:
            mark = self._begin_load()
            output = await self._monitor.hmp(line)
            await self._finish_load(held, mark, failed=bool(failure(output)))
            if why := self._why(output):
                raise SnapshotError(why)
            return output

    def _why(self, said: str) -> str:
        """Return in one line why QEMU said that a load has failed, where it is our state that could not be loaded."""
        if _VMSTATE not in said:
            return ""
        if self._refuser.refusal:
            ident, _, why = self._refuser.refusal.partition(": ")
            device = ident.removeprefix("nvmove/")
            return why if device == ident else f"nvmove device '{device}': {why}"
        missing = _MISSING.search(said)
        which = f"the nvmove device '{missing[1]}', which" if missing else "an nvmove device that"
        return f"The snapshot holds the state of {which} this VM does not have"

    def _begin_load(self) -> list[tuple[int, int]]:
        self._refuser.refusal = ""
        return self._marks()

    def _marks(self) -> list[tuple[int, int]]:
        return [(device.resets, device.loads) for device in self._devices]

    async def _finish_load(self, held: Held, mark: list[tuple[int, int]], failed: bool) -> None:
        if not failed:
            not_loaded = [
                device.id for device, (_, loads) in zip(self._devices, mark, strict=True) if device.loads == loads
            ]
            if not_loaded:
                held.run_on = False
                raise SnapshotError(f"The snapshot holds no state of the nvmove device '{not_loaded[0]}'")
            self._runstate.forget_errors()
            await self.after_load()
        elif self._marks() != mark:
            held.run_on = False

    # --- QMP jobs ----------------------------------------------------------------------------------------------------

    async def job(self, name: str, arguments: dict[str, Any], nodes: Sequence[str]) -> Any:
        """Start the QMP job `snapshot-save` or `snapshot-load`; return as QEMU does, before the job is over.

        `nodes` are the nodes of the disks that nvmove serves itself: QEMU does not know them. The VM is stopped here
        and runs on, if it ran, when the job has concluded: `concluded` must be called before clients see that event.
        """
        for node in [arguments.get("vmstate"), *arguments.get("devices", ())]:
            if node in nodes:
                raise SnapshotError(f"Device '{node}' is writable but does not support snapshots")
        self._check_bus()
        job_id = arguments.get("job-id")
        await self._runstate.lock.acquire()
        held = Held(run_on=False)
        try:
            held.run_on = await self._runstate.hold(for_load=name == "snapshot-load")
            mark = self._begin_load()
            if name == "snapshot-save":
                await self.before_save()
            self._errors.pop(str(job_id), None)
            concluded = asyncio.get_running_loop().create_future()
            self._jobs[str(job_id)] = concluded
            answer = await self._monitor.execute(name, arguments)
        except BaseException:
            self._jobs.pop(str(job_id), None)
            await self._let_go(held)
            raise
        self._watcher = asyncio.create_task(self._watch(str(job_id), name, held, mark, concluded))
        return answer

    async def _watch(
        self, job_id: str, name: str, held: Held, mark: list[tuple[int, int]], concluded: asyncio.Future[None]
    ) -> None:
        try:
            await concluded
            if name == "snapshot-load":
                jobs = await self._monitor.execute("query-jobs")
                said = next((str(job["error"]) for job in jobs if job["id"] == job_id and "error" in job), "")
                if why := self._why(said):
                    self._errors[job_id] = why
                await self._finish_load(held, mark, failed=bool(said))
        except (SnapshotError, ReplayError) as error:
            held.run_on = False
            self._errors[job_id] = str(error)
        finally:
            await self._let_go(held)

    def explain(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return QEMU's answer to `query-jobs`, with our reasons why snapshots did not load."""
        known = {str(job["id"]) for job in jobs}
        self._errors = {ident: error for ident, error in self._errors.items() if ident in known}
        return [{**job, "error": self._errors[job["id"]]} if job["id"] in self._errors else job for job in jobs]

    async def _let_go(self, held: Held) -> None:
        try:
            await self._runstate.let_go(held)
        finally:
            self._runstate.lock.release()

    def owns(self, job_id: str) -> bool:
        """Whether `job_id` is a snapshot job under way."""
        return job_id in self._jobs

    async def concluded(self, job_id: str) -> None:
        """A job's JOB_STATUS_CHANGE said `concluded`; when this returns, the VM is as the job's end promises."""
        future = self._jobs.pop(job_id, None)
        if future is not None and not future.done():
            future.set_result(None)
            await asyncio.shield(self._watcher)
