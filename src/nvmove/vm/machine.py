"""One VM under `nvmove run`: devices, D-Bus, QEMU and the user's monitors, from the first check to the clean-up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qemu.qmp.error import QMPError
from qemu.qmp.protocol import ConnectError

from nvmove.block.backend import Backend, BackendError
from nvmove.block.fault import FaultRules, FaultyBackend
from nvmove.block.late import LateBackend
from nvmove.block.null import NullBackend
from nvmove.block.open import open_local
from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.block.raw.backend import RawBackend
from nvmove.device import NvmeDevice
from nvmove.engine import choice
from nvmove.errors import UserError
from nvmove.limits import raise_descriptors
from nvmove.vfio.transport import ListenError
from nvmove.vm import qemu
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.blockstats import BlockStats
from nvmove.vm.disks.exports import Export, cluster_sizes, open_exports
from nvmove.vm.disks.faults import FaultCommands
from nvmove.vm.disks.ioerrors import IoErrors
from nvmove.vm.disks.iostatus import IoStatus
from nvmove.vm.disks.nbdserver import NbdServer
from nvmove.vm.disks.ownimages import OwnImages
from nvmove.vm.disks.queryblock import QueryBlock
from nvmove.vm.disks.resize import Disk, Resizable, Resize
from nvmove.vm.disks.stalls import Stalls
from nvmove.vm.line.plan import DRIVER, Plan, PlannedDrive
from nvmove.vm.monitor.facade import Facade, QemuClient, QemuGone, QmpError
from nvmove.vm.monitor.serving import Monitors
from nvmove.vm.moves.capabilities import Capabilities
from nvmove.vm.moves.handlers import Handlers
from nvmove.vm.moves.images import Image, Images
from nvmove.vm.moves.incoming import Incoming
from nvmove.vm.moves.machinestate import MachineState, Namespace
from nvmove.vm.moves.migration import Migration
from nvmove.vm.moves.pciaddress import ConfigSpaces
from nvmove.vm.moves.qtest import QTest, ReplayError
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import SnapshotError, Snapshots, failure
from nvmove.vm.qemuerrors import ErrorRelay, Wording
from nvmove.vm.slots import Slots
from nvmove.vmstate.bus import VMStateBus
from nvmove.vmstate.dbus_daemon import BusError
from nvmove.vmstate.machine import IDENT

log = logging.getLogger(__name__)

_QUIT_SECONDS = 10
_STDERR = 2


@dataclass
class _Drive:
    """A planned drive with its back end."""

    plan: PlannedDrive
    backend: FaultyBackend
    late: LateBackend | None
    io: IoStatus
    node: str
    """PlannedDrive.node, when it is known."""


def run(plan: Plan, run_directory: Path, faults: FaultRules) -> int:
    """Run a VM to its end; return QEMU's exit status. Raises UserError."""
    if slow := choice.notice():
        print(f"nvmove: warning: {slow}", file=sys.stderr)
    raise_descriptors()
    return asyncio.run(Machine(plan, run_directory, faults).run())


class Machine:
    """Runs a plan."""

    def __init__(self, plan: Plan, run_directory: Path, faults: FaultRules | None = None) -> None:
        self._plan = plan
        self._faults = FaultRules() if faults is None else faults
        self._run_directory = run_directory
        self._drives: dict[str, _Drive] = {}
        self._devices: list[NvmeDevice] = []
        self._state = MachineState([device.id for device in plan.devices])
        self._cleanup = contextlib.AsyncExitStack()
        self._process: qemu.QemuProcess | None = None
        self._nbd_socket = run_directory / "nbd"
        self._signal = 0
        """What ended us before there was a QEMU."""

    async def run(self) -> int:
        """Run the VM to its end; return QEMU's exit status. Raises UserError before anything runs."""
        self._on_signals()
        try:
            return await self._run()
        except asyncio.CancelledError:
            if not self._signal:
                raise
            return 128 + self._signal

    async def _run(self) -> int:
        async with self._cleanup:
            with _said_first():
                return await self._live()

    async def _live(self) -> int:
        bus = await self._start_bus()
        self._open_drives()
        await self._start_devices(bus)
        monitors = Monitors(self._plan.endpoints)
        self._cleanup.push_async_callback(monitors.close)
        await monitors.open()
        client = QemuClient()
        await client.start_server(str(self._plan.qmp_socket))
        cpu = QTest()
        self._cleanup.push_async_callback(cpu.close)
        await cpu.listen(self._plan.qtest_socket)
        process = await self._start_qemu(bus)
        gc.freeze()  # what is here stays: a collection that looks at it stops all threads for 20 to 50 ms
        ended = asyncio.create_task(process.wait())
        self._cleanup.push_async_callback(_end, process)
        self._cleanup.push_async_callback(_disconnect, client)
        try:
            with _said_first():
                await _while_it_runs(ended, self._connect_and_set_up(client, cpu, monitors, bus))
        except QemuGone:
            log.debug("QEMU ended while the VM was set up")  # its message is on stderr
        except UserError:
            await _quit(client, ended)
            raise
        status = await ended
        if status and self._plan.incoming is not None and bus.refusal:
            raise UserError(f"the VM that arrives does not fit: {bus.refusal.removeprefix('nvmove/')}")
        return status

    async def _start_qemu(self, bus: VMStateBus) -> qemu.QemuProcess:
        relay = ErrorRelay(Wording(self._plan.wording, DRIVER, "nvme"), _STDERR)
        self._cleanup.push_async_callback(asyncio.to_thread, relay.close)
        try:
            self._process = await qemu.start(
                Path(self._plan.program),
                self._arguments(bus),
                uses_stdio=self._plan.qemu_uses_stdio,
                stderr=relay.end,
            )
        finally:
            os.close(relay.end)
        return self._process

    def _on_signals(self) -> None:
        """SIGTERM, SIGINT and SIGHUP end the VM as they end a QEMU: cleanly, its exit status becomes ours.

        However long QEMU takes for it: it may be writing a snapshot, or its images.
        """
        loop = asyncio.get_running_loop()
        running = asyncio.current_task()
        assert running is not None

        def end(number: int) -> None:
            if self._process is not None:
                self._process.terminate()
            elif not self._signal:
                self._signal = number
                running.cancel()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)

    # --- before QEMU -------------------------------------------------------------------------------------------------

    async def _start_bus(self) -> VMStateBus:
        bus = await VMStateBus.start(self._run_directory)
        self._cleanup.push_async_callback(bus.close)
        return bus

    def _open_drives(self) -> None:
        for plan in self._plan.drives:
            late = LateBackend() if plan.in_qemu else None
            image: Backend = late or open_local(plan.config, active=self._plan.incoming is None)
            backend = FaultyBackend(image, self._faults, plan.names)
            errors = DriveErrors(ErrorPolicy(plan.config.werror), ErrorPolicy(plan.config.rerror))
            self._drives[plan.key] = _Drive(plan, backend, late, IoStatus(errors), plan.node)
            self._cleanup.push_async_callback(asyncio.to_thread, backend.close)

    async def _start_devices(self, bus: VMStateBus) -> None:
        backends = {key: drive.backend for key, drive in self._drives.items()}
        errors = {key: drive.io.errors for key, drive in self._drives.items()}
        self._io_errors = IoErrors()
        self._stalls = Stalls()
        for plan in self._plan.devices:
            device = NvmeDevice(
                plan.config,
                backends,
                id=plan.id,
                errors=errors,
                on_error=self._io_errors.report,
                on_wait=functools.partial(self._stalls.report, plan.id),
                memory_moves=self._plan.is_translated,
            )
            for namespace in device.controller.namespaces:
                backends[namespace.config.drive].namespace = namespace
            self._cleanup.push_async_callback(asyncio.to_thread, device.close)
            device.start(plan.socket)
            self._devices.append(device)
            await bus.add(f"nvmove/{plan.id}", device)
        await bus.add(IDENT, self._state)

    def _arguments(self, bus: VMStateBus) -> list[str]:
        vmstate = bus.qemu_object()
        text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in vmstate.items() if key != "qom-type")
        return [*self._plan.arguments, "-object", f"{vmstate['qom-type']},{text}"]

    # --- with QEMU ---------------------------------------------------------------------------------------------------

    async def _connect_and_set_up(self, client: QemuClient, cpu: QTest, monitors: Monitors, bus: VMStateBus) -> None:
        try:
            await client.accept()
        except ConnectError as error:
            if isinstance(error.exc, OSError) and error.exc.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise  # it is not QEMU that is gone
            raise QemuGone("QEMU's monitor did not connect") from error
        await self._set_up(client, cpu, monitors, bus)

    async def _set_up(self, client: QemuClient, cpu: QTest, monitors: Monitors, bus: VMStateBus) -> None:
        facade = Facade(client)
        try:
            target = (await facade.execute("query-target"))["arch"]
            spaces = await ConfigSpaces.of_machine(cpu, facade.hmp, await facade.execute("query-pci"), target)
        except ReplayError as error:
            raise UserError(f"{error}: its disks could not be saved or moved") from None
        own = [drive.backend.image for drive in self._drives.values() if drive.late is None]
        images = Images([cast(Image, image) for image in own], taken=self._plan.incoming is None)
        runstate = RunState(facade, self._devices, images)
        slots = Slots(facade, [device.id for device in self._devices])
        await slots.close()
        slots.register()
        exports = await self._connect_exports(facade)
        by_key = {key: self._served(drive, exports.get(key)) for key, drive in self._drives.items()}
        served = list(by_key.values())
        unsaveable = [drive.label for drive in served if not drive.in_qemu and not drive.backend.read_only]
        snapshots = Snapshots(facade, spaces, runstate, self._devices, unsaveable, bus)
        snapshots.on_load.append(slots.after_load)
        own_nodes = [name for one in served if not one.in_qemu for name in (one.node, one.name) if name]
        Handlers(facade, runstate, snapshots, own_nodes).register()
        QueryBlock(facade, served).register()
        BlockStats(facade, served).register()
        Resize(facade, runstate, [self._disk(key, drive, exports) for key, drive in self._drives.items()]).register()
        if exports:
            shared = [(by_key[key], export) for key, export in exports.items()]
            nbd_server = NbdServer(facade, shared, self._nbd_socket)
            nbd_server.register()
            self._cleanup.push_async_callback(nbd_server.close)
        OwnImages(facade, served).register()
        self._io_errors.connect(facade, runstate, by_key)
        self._stalls.connect(facade, runstate, self._devices)
        self._state.connect(lambda: runstate.to_save, self._io_statuses())
        capabilities = Capabilities(facade)
        capabilities.register()
        Migration(facade, runstate, snapshots, self._devices, images, capabilities, bus.check).register()
        FaultCommands(self._faults, self._plan.drive_names).register(facade)
        await runstate.pause_devices()
        if self._plan.loadvm is not None:
            await self._load(snapshots, self._plan.loadvm)
        if self._plan.incoming is not None:
            incoming = Incoming(facade, runstate, snapshots, self._devices, images, capabilities, self._state)
            await incoming.prepare(autostart=not self._plan.paused)
            await monitors.serve(facade)
            await incoming.begin(self._plan.incoming)
            await incoming.arrived()
            return
        await monitors.serve(facade)  # as with QEMU, a monitor answers when -loadvm is done
        if not self._plan.paused:
            await runstate.cont()

    def _io_statuses(self) -> dict[Namespace, IoStatus]:
        return {
            (device.id, namespace.nsid): self._drives[namespace.config.drive].io
            for device in self._devices
            for namespace in device.controller.namespaces
        }

    async def _connect_exports(self, facade: Facade) -> dict[str, Export]:
        late = {key: drive for key, drive in self._drives.items() if drive.late is not None}
        for drive in late.values():
            drive.node = await _node(facade, drive.plan)
        exports = [
            Export(key, drive.node, not drive.plan.config.options.read_only, iothread=f"nvmove-io{number}")
            for number, (key, drive) in enumerate(late.items())
        ]
        try:
            opened = await open_exports(facade, self._nbd_socket, exports)
        except QmpError as error:
            raise UserError(error.desc) from None
        except BackendError:
            await facade.execute("query-status")  # raises QemuGone when that is the reason
            raise
        for key, backend in opened.items():
            waiting = late[key].late
            assert waiting is not None
            waiting.open(backend)
        clusters = await cluster_sizes(facade) if exports else {}
        for device in self._devices:
            device.refresh()
            for export in exports:
                device.set_cluster_size(export.drive, clusters.get(export.node, 0))
        return {export.drive: export for export in exports}

    def _disk(self, key: str, drive: _Drive, exports: dict[str, Export]) -> Disk:
        """Return what `block_resize` needs to know of a drive."""
        (device,) = (device for device in self._devices if device.id == drive.plan.device)
        image: Resizable | Export
        if drive.late is None:
            assert isinstance(drive.backend.image, RawBackend | NullBackend)
            image = drive.backend.image
        else:
            image = exports[key]
        return Disk(drive.plan.name, drive.plan.node, image, functools.partial(device.refresh, key))

    def _served(self, drive: _Drive, export: Export | None) -> ServedDrive:
        plan = drive.plan
        (device,) = (device for device in self._devices if device.id == plan.device)
        return ServedDrive(
            plan.name,
            drive.node,
            plan.device,
            plan.config,
            drive.backend,
            plan.in_qemu,
            drive.io,
            functools.partial(device.counters, plan.key),
            export.name if export else "",
        )

    async def _load(self, snapshots: Snapshots, tag: str) -> None:
        """-loadvm: as QEMU does, a snapshot that cannot be loaded ends the program."""
        try:
            output = (await snapshots.load(f"loadvm {tag}")).strip()
        except (SnapshotError, ReplayError) as error:
            raise UserError(str(error)) from None
        if why := failure(output):
            raise UserError(why)
        if output:
            log.warning("%s", output)


async def _node(facade: Facade, plan: PlannedDrive) -> str:
    """Return the name of a drive's block node; only QEMU knows it where -snapshot put an overlay on top."""
    if plan.node:
        return plan.node
    for info in await facade.execute("query-block"):
        if info["device"] == plan.name:
            return str(info["inserted"]["node-name"])
    raise UserError(f"QEMU does not know the drive '{plan.name}'")


@contextlib.contextmanager
def _said_first() -> Iterator[None]:
    """What is wrong is one line on stderr before anything ends: a manager reads it when the monitors are closed."""
    try:
        yield
    except (UserError, BackendError, BusError, ListenError, ConnectError) as error:
        line = error if isinstance(error, UserError) else UserError(str(error))
        line.say()
        raise line from None


async def _while_it_runs(ended: asyncio.Task[int], work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but no longer than QEMU runs."""
    doing = asyncio.create_task(work)
    try:
        await asyncio.wait({doing, ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        doing.cancel()
        await asyncio.wait({doing})
    if not doing.cancelled():
        doing.result()


async def _quit(client: QemuClient, ended: asyncio.Task[int]) -> None:
    """End QEMU so that it has nothing to say about it: the one line is ours."""
    with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
        async with asyncio.timeout(_QUIT_SECONDS):
            await client.execute("quit")
            await asyncio.wait({ended})


async def _disconnect(client: QemuClient) -> None:
    with contextlib.suppress(QMPError, OSError, EOFError):  # QEMU is gone already; how it went is its exit status
        await client.disconnect()


async def _end(process: qemu.QemuProcess) -> None:
    """QEMU is not to outlive us."""
    if process.running:
        await process.end()
