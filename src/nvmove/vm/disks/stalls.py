"""A disk that does not answer is a slow disk, however long that takes: the VM stands still meanwhile.

A guest's driver has time-outs: it aborts, deletes queues, resets the controller, and gives the disk up in the end.
QEMU's own devices spare it that, as they stop all of QEMU until the disk answers. Here the guest's clock alone is
stopped, when the driver begins to act; the monitors go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Protocol

from nvmove.vm.monitor.facade import Facade, QemuGone, QmpError
from nvmove.vm.moves.runstate import RunState

log = logging.getLogger(__name__)

EVENT = "NVMOVE_DISK_STALLED"
GRACE = 1.0
"""Seconds that a guest waits without harm: Linux waits 7.5 for RDY, 30 for what it aborts."""


class Stalling(Protocol):
    """A device whose guest may wait for a disk."""

    id: str

    @property
    def waits(self) -> bool:
        """Whether it does, and will not do so for long."""


class Stalls:
    """Watches the devices of one VM. To be made in the event loop; all but `report` is for that loop only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: dict[str, asyncio.Task[None]] = {}
        self._devices: dict[str, Stalling] = {}

    def report(self, ident: str) -> None:
        """The guest begins to wait; on any thread. None comes before `connect`: the VM does not run before."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the VM has ended
            self._loop.call_soon_threadsafe(self._begin, ident)

    def connect(self, facade: Facade, runstate: RunState, devices: Sequence[Stalling]) -> None:
        """The VM's monitor is there."""
        self._facade = facade
        self._runstate = runstate
        self._devices = {device.id: device for device in devices}

    def _begin(self, ident: str) -> None:
        device = self._devices.get(ident)
        if device is not None and ident not in self._watched:
            task = asyncio.ensure_future(self._watch(device))
            self._watched[ident] = task
            task.add_done_callback(lambda _task: self._watched.pop(ident))

    async def _watch(self, device: Stalling) -> None:
        """Let the guest wait for a moment, and then no more."""
        await asyncio.sleep(GRACE)
        try:
            while await self._runstate.stand_still(functools.partial(self._is_stalled, device)):
                self._tell(device, False)
                await asyncio.sleep(GRACE)
        except (QemuGone, QmpError) as error:
            log.debug("the VM does not stand still for %s: %s", device.id, error)

    def _is_stalled(self, device: Stalling) -> bool:
        if device.waits:
            self._tell(device, True)
            return True
        return False

    def _tell(self, device: Stalling, stalled: bool) -> None:
        path = f"/machine/peripheral/{device.id}"
        self._facade.emit({"event": EVENT, "data": {"qom-path": path, "stalled": stalled}})
