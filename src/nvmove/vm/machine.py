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
from pathlib import Path
from typing import Any

from qemu.qmp.error import QMPError
from qemu.qmp.protocol import ConnectError

from nvmove.block.backend import BackendError
from nvmove.block.fault import FaultRules
from nvmove.device import NvmeDevice
from nvmove.engine import choice
from nvmove.errors import UserError
from nvmove.limits import raise_descriptors
from nvmove.owned import OwnedDevice
from nvmove.vfio.transport import ListenError
from nvmove.vm import qemu
from nvmove.vm.disks.drives import Drives
from nvmove.vm.line.plan import DRIVER, Plan
from nvmove.vm.monitor.facade import Facade, QemuClient, QemuGone
from nvmove.vm.monitor.serving import Monitors
from nvmove.vm.moves.images import Images
from nvmove.vm.moves.machinestate import MachineState
from nvmove.vm.moves.moves import Moves, config_spaces
from nvmove.vm.moves.qtest import QTest
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.qemuerrors import ErrorRelay, Wording
from nvmove.vm.slots import Slots
from nvmove.vmstate.bus import VMStateBus
from nvmove.vmstate.dbus_daemon import BusError
from nvmove.vmstate.machine import IDENT

log = logging.getLogger(__name__)

_QUIT_SECONDS = 10
_STDERR = 2


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
        self._run_directory = run_directory
        self._devices: list[OwnedDevice] = []
        self._state = MachineState([device.id for device in plan.devices])
        self._cleanup = contextlib.AsyncExitStack()
        self._process: qemu.QemuProcess | None = None
        self._faults = FaultRules() if faults is None else faults
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
        drives = Drives(self._plan.drives, self._faults, self._run_directory / "nbd")
        self._cleanup.push_async_callback(asyncio.to_thread, drives.close)
        drives.open(active=self._plan.incoming is None)
        await self._start_devices(bus, drives)
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
                await _while_it_runs(ended, self._connect_and_set_up(client, cpu, monitors, drives, bus))
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

    async def _start_devices(self, bus: VMStateBus, drives: Drives) -> None:
        for plan in self._plan.devices:
            device = NvmeDevice(
                plan.config,
                drives.backends,
                id=plan.id,
                errors=drives.errors,
                on_error=drives.io_errors.report,
                on_wait=functools.partial(drives.stalls.report, plan.id),
                memory_moves=self._plan.is_translated,
            )
            self._cleanup.push_async_callback(asyncio.to_thread, device.close)
            self._devices.append(device)
        drives.use(self._devices)
        for plan, owned in zip(self._plan.devices, self._devices, strict=True):
            owned.start(plan.socket)
            await bus.add(f"nvmove/{plan.id}", owned)
        await bus.add(IDENT, self._state)

    def _arguments(self, bus: VMStateBus) -> list[str]:
        vmstate = bus.qemu_object()
        text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in vmstate.items() if key != "qom-type")
        return [*self._plan.arguments, "-object", f"{vmstate['qom-type']},{text}"]

    # --- with QEMU ---------------------------------------------------------------------------------------------------

    async def _connect_and_set_up(
        self, client: QemuClient, cpu: QTest, monitors: Monitors, drives: Drives, bus: VMStateBus
    ) -> None:
        try:
            await client.accept()
        except ConnectError as error:
            if isinstance(error.exc, OSError) and error.exc.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise  # it is not QEMU that is gone
            raise QemuGone("QEMU's monitor did not connect") from error
        facade = Facade(client)
        spaces = await config_spaces(facade, cpu)
        images = Images(drives.images, taken=self._plan.incoming is None)
        runstate = RunState(facade, self._devices, images)
        slots = Slots(facade, [device.id for device in self._devices])
        await slots.close()
        slots.register()
        await drives.connect(facade)
        moves = Moves(
            *(facade, spaces, runstate, self._devices, images, bus),
            unsaveable=drives.unsaveable,
            own_nodes=drives.own_nodes,
        )
        moves.on_load.append(slots.after_load)
        moves.register()
        drives.register(facade, runstate)
        self._cleanup.push_async_callback(drives.hang_up)
        self._state.connect(lambda: runstate.to_save, drives.io_statuses)
        await runstate.pause_devices()
        await self._begin(facade, monitors, runstate, moves)

    async def _begin(self, facade: Facade, monitors: Monitors, runstate: RunState, moves: Moves) -> None:
        """Let the VM run, load it or receive it, and its monitors answer."""
        plan = self._plan
        if plan.loadvm is not None:
            await moves.load(plan.loadvm)
        if plan.incoming is not None:
            incoming = moves.incoming(self._state)
            await incoming.prepare(autostart=not plan.paused)
            await monitors.serve(facade)
            await incoming.begin(plan.incoming)
            await incoming.arrived()
            return
        await monitors.serve(facade)  # as with QEMU, a monitor answers when -loadvm is done
        if not plan.paused:
            await runstate.cont()


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
