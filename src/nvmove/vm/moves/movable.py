"""A VM as its migrations find it, the outgoing and the incoming one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nvmove.vfio.dirty import DirtyReport
from nvmove.vm.monitor.facade import Facade
from nvmove.vm.moves.capabilities import Capabilities
from nvmove.vm.moves.images import Images
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import SavedDevice, Snapshots


class MovedDevice(SavedDevice, Protocol):
    """A device as a migration needs it, at rest or not."""

    def track_dirty(self, on: bool) -> None:
        """Note from now on, or no more, which guest memory is written by DMA, and mark it where that is safe."""

    def mark_dirty(self) -> DirtyReport:
        """Make QEMU send again what was noted and not marked; the VM is stopped. Raises DmaError."""


@dataclass(frozen=True, slots=True)
class Movable:
    """What a migration works on."""

    facade: Facade
    runstate: RunState
    snapshots: Snapshots
    devices: Sequence[MovedDevice]
    images: Images
    capabilities: Capabilities
