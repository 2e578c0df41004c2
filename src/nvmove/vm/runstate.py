"""The devices follow the VM's run state: they pause when the VM stops and resume when it runs, whoever caused it.

QEMU tells a vfio-user device nothing of this (facts: it sends nothing at VM stop), so its STOP and RESUME events do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol


class Paused(Protocol):
    """What has to stop with the VM."""

    def pause(self) -> None:
        """Stop fetching and wait until nothing is in flight; does nothing when paused already."""

    def resume(self) -> None:
        """Go on; does nothing when not paused."""


class Monitor(Protocol):
    """QEMU's monitor."""

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a QMP command of QEMU's."""


class RunState:
    """One VM's devices, and the lock that orders everything which stops and starts the VM."""

    def __init__(self, monitor: Monitor, devices: Sequence[Paused]) -> None:
        self._monitor = monitor
        self._devices = devices
        self.lock = asyncio.Lock()
        # A pause takes a thread and time. Whatever follows waits for its turn (asyncio's locks are fair), so that a
        # pause of an earlier STOP can never come after the resume of a later RESUME.
        self._turn = asyncio.Lock()

    async def pause_devices(self) -> None:
        """Pause every device; on return nothing of theirs is in flight."""
        async with self._turn:
            await asyncio.gather(*(asyncio.to_thread(device.pause) for device in self._devices))

    async def resume_devices(self) -> None:
        """Resume every device."""
        async with self._turn:
            for device in self._devices:
                await asyncio.to_thread(device.resume)  # it may have to connect to its disks again

    async def follow(self, event: str) -> None:
        """Take QEMU's STOP or RESUME event."""
        if event == "RESUME":
            await self.resume_devices()
        elif event == "STOP":
            await self.pause_devices()

    async def stop(self) -> None:
        """Stop the VM as QMP `stop` does; on return the devices are at rest, as QEMU's own are after its drain."""
        async with self.lock:
            await self._monitor.execute("stop")
            await self.pause_devices()

    async def cont(self) -> None:
        """Start the VM as QMP `cont` does; its RESUME event resumes the devices."""
        async with self.lock:
            await self._monitor.execute("cont")

    async def hold(self) -> bool:
        """Stop the VM and its devices for an operation; return whether it ran. The caller holds `lock`."""
        status = await self._monitor.execute("query-status")
        running = bool(status["running"])
        if running:
            await self._monitor.execute("stop")
        await self.pause_devices()
        return running

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[Held]:
        """Stop the VM and its devices for the body, and let it run on after it if it ran."""
        async with self.lock:
            held = Held(await self.hold())
            try:
                yield held
            finally:
                if held.run_on:
                    await self._monitor.execute("cont")


class Held:
    """A VM that is stopped for an operation."""

    def __init__(self, run_on: bool) -> None:
        self.run_on = run_on
        """Whether the VM is to run when the operation is over; an operation that spoilt it clears this."""
