"""The devices follow the VM's run state: they pause when the VM stops and resume when it runs, whoever caused it.

QEMU tells a vfio-user device nothing of this (facts: it sends nothing at VM stop), so its STOP and RESUME events do.

The other way round, a device that holds a failed request stops the VM. That takes a while, and the VM may be stopped,
started, saved or loaded meanwhile. When the devices resume they retry all that they hold: until then a stop is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

from nvmove.block.backend import BackendError
from nvmove.vm.monitor.facade import Monitor, QemuGone, QmpError
from nvmove.vm.moves.images import Images

log = logging.getLogger(__name__)

RUNNING, PAUSED, IO_ERROR = "running", "paused", "io-error"
"""What a VM is to be where its state is loaded: QAPI's RunState, as far as a stopped VM can still be them."""
SUSPENDED = "suspended"
"""QAPI's RunState of a guest that sleeps (ACPI S3)."""
MIGRATING = "There's a migration process in progress"
"""QEMU's words."""
PAUSE_SLICE = 0.25
"""Seconds after which a pause that has not come to an end looks whether the VM runs again."""


class Paused(Protocol):
    """What has to stop with the VM."""

    def pause(self, timeout: float | None = None) -> None:
        """Stop fetching and wait until nothing is in flight; does nothing when paused already.

        Raises TimeoutError after `timeout` seconds, paused all the same.
        """

    def resume(self) -> None:
        """Go on; does nothing when not paused."""


class RunState:
    """One VM's devices, and the lock that orders everything which stops and starts the VM."""

    def __init__(self, monitor: Monitor, devices: Sequence[Paused], images: Images | None = None) -> None:
        self._monitor = monitor
        self._devices = devices
        self._images = images or Images(())
        self.lock = asyncio.Lock()
        # A pause takes a thread and time. Whatever follows waits for its turn (asyncio's locks are fair), so that a
        # pause of an earlier STOP can never come after the resume of a later RESUME.
        self._turn = asyncio.Lock()
        self.io_error = False
        """The VM is stopped because a device holds failed requests: QEMU's run state io-error."""
        self.before_resume: list[Callable[[], None]] = []
        """Called before the devices resume."""
        self.is_to_run = False
        """The VM runs, or would, were it not for an operation that has stopped it for its own sake."""
        self.migrating = False
        """QEMU sends the VM somewhere: it cannot be saved or loaded."""
        self.switching_over = False
        """A migration has stopped the VM; what becomes of it is QEMU's to say."""
        self.autostart: bool | None = None
        """While the VM's state is on its way here (-incoming): whether it is to run when it has arrived."""
        self._stop_wanted = False
        self._resumes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def pause_devices(self) -> bool:
        """Pause every device; on return nothing of theirs is in flight.

        Returns False when QEMU has started the VM again (a migration was cancelled) before that was so.
        """
        resumes = self._resumes
        async with self._turn:
            return all(await asyncio.gather(*(asyncio.to_thread(self._pause, one, resumes) for one in self._devices)))

    def _pause(self, device: Paused, resumes: int) -> bool:
        while resumes == self._resumes:
            with contextlib.suppress(TimeoutError):
                device.pause(PAUSE_SLICE)
                return True
        return False

    async def resume_devices(self) -> None:
        """Resume every device. Where an image is another host's meanwhile, stop the VM instead."""
        async with self._turn:
            try:
                await self._images.take()
            except BackendError as error:
                log.error("%s: the VM stays stopped", error)
                await self._monitor.execute("stop")
                return
            self._stop_wanted = False
            for call in self.before_resume:
                call()
            for device in self._devices:
                await asyncio.to_thread(device.resume)  # it may have to connect to its disks again

    def follow(self, event: str) -> Coroutine[Any, Any, object]:
        """Take QEMU's STOP or RESUME event; what is to be done about it is done when the result is awaited."""
        if event == "STOP":
            return self.pause_devices()
        self._resumes += 1
        self.io_error = self.switching_over = False
        self.is_to_run = True
        return self.resume_devices()

    async def stop(self) -> None:
        """Stop the VM as QMP `stop` does; on return the devices are at rest, as QEMU's own are after its drain."""
        if self.switching_over or self.autostart is not None:
            await self._monitor.execute("stop")
            self.is_to_run = False
            if self.autostart is not None:
                self.autostart = False
            return
        async with self.lock:
            await self._monitor.execute("stop")
            self.is_to_run = False
            await self.pause_devices()

    async def cont(self) -> None:
        """Start the VM as QMP `cont` does; its RESUME event resumes the devices, and they have when this returns."""
        if self.autostart is not None:
            self.autostart = True
            return
        if self.switching_over:
            await self._monitor.execute("cont")  # QEMU refuses
            return
        async with self.lock:
            try:
                await self._images.take()
            except BackendError as error:
                raise QmpError("GenericError", str(error)) from None
            await self.run()

    async def run(self) -> None:
        """Start the VM, with its devices; the caller holds `lock`."""
        await self._monitor.execute("cont")
        await self._settle()

    @property
    def to_save(self) -> str:
        """What the VM is to be where the state is loaded that is saved now."""
        if self.io_error or (self._stop_wanted and self.is_to_run):
            return IO_ERROR
        return RUNNING if self.is_to_run else PAUSED

    async def _settle(self) -> None:
        """Wait for what the events so far have begun."""
        async with self._turn:
            pass

    # --- I/O errors --------------------------------------------------------------------------------------------------

    def stop_for_error(self) -> None:
        """A device holds a failed request: stop the VM, once however many there are."""
        if self._stop_wanted:
            return
        self._stop_wanted = True
        task = asyncio.ensure_future(self._stop_for_error())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop_for_error(self) -> None:
        async with self.lock:
            try:
                status = await self._monitor.execute("query-status")
                await self._settle()
                if not self._stop_wanted:
                    return  # the devices have resumed since, and retried
                self._stop_wanted = False
                if status["running"]:
                    self.io_error = True  # before the STOP event: a client may ask at once
                    await self._monitor.execute("stop")
                elif self.switching_over:
                    self.io_error = self.is_to_run
                await self.pause_devices()
            except (QemuGone, QmpError) as error:
                log.debug("the VM was not stopped for an I/O error: %s", error)

    def forget_errors(self) -> None:
        """The devices hold other requests than those they wanted to stop for: a state was loaded."""
        self._stop_wanted = False

    async def let_go(self, held: Held) -> None:
        """Let the VM run on after an operation, unless it is to stop for an error; the caller holds `lock`."""
        if not held.run_on:
            return
        if self._stop_wanted:
            self._stop_wanted = False
            self.io_error = True
            return
        await self.run()

    async def stand_still(self, is_needed: Callable[[], bool]) -> bool:
        """Stop the VM until nothing of it is in flight at a disk, then let it run on; return whether it was stopped.

        The guest's clock stands still, too. `is_needed` is asked when it is this operation's turn.
        """
        async with self.lock:
            status = await self._monitor.execute("query-status")
            if not status["running"] or not is_needed():
                return False
            await self._monitor.execute("stop")
            await self.pause_devices()
            status = await self._monitor.execute("query-status")
            await self.let_go(Held(run_on=status["status"] == PAUSED))  # a migration may have come to its end
            return True

    # --- operations on a stopped VM ----------------------------------------------------------------------------------

    async def hold(self, *, for_load: bool = False) -> bool:
        """Stop the VM and its devices for an operation; return whether it ran. The caller holds `lock`.

        A suspended VM runs, without its CPUs: QEMU remembers that it is suspended, also in what it saves, and `cont`
        brings it back into that.

        `for_load`: by `loadvm` of a snapshot that does not exist: the VM is stopped then, and nothing else is done.
        Under TCG a guest loaded after a plain `stop` may run stale translated code and crash, in stock QEMU 11.1.3
        too: it seems to drop that code only where a running VM enters the run state restore-vm.
        """
        if self.migrating:
            raise QmpError("GenericError", MIGRATING)
        status = await self._monitor.execute("query-status")
        running = bool(status["running"]) or status["status"] == SUSPENDED
        if running and for_load:
            line = f"loadvm nvmove-no-snapshot-{uuid.uuid4()}"
            await self._monitor.execute("human-monitor-command", {"command-line": line})
        elif running:
            await self._monitor.execute("stop")
        await self.pause_devices()
        return running

    @contextlib.asynccontextmanager
    async def held(self, *, for_load: bool = False) -> AsyncIterator[Held]:
        """Stop the VM and its devices for the body, and let it run on after it if it ran."""
        async with self.lock:
            held = Held(await self.hold(for_load=for_load))
            try:
                yield held
            finally:
                await self.let_go(held)


class Held:
    """A VM that is stopped for an operation."""

    def __init__(self, run_on: bool) -> None:
        self.run_on = run_on
        """Whether the VM is to run when the operation is over; an operation that spoilt it clears this."""
