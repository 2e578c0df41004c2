"""A device, to whoever owns it: `nvmove run` and `nvmove serve` know no more of one.

Everything here may wait, and is for any thread but the vfio-user control thread. A device in a process of its own would
stand behind the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nvmove.nvme.counters import Counters
from nvmove.vfio.dirty import DirtyReport


class OwnedDevice(Protocol):
    """`nvmove.device.NvmeDevice`, which says more of each."""

    id: str
    """In QEMU."""
    loads: int
    """States loaded since the device exists."""
    resets: int
    """Function-level resets seen."""

    def start(self, socket: Path) -> None:
        """Serve the device at `socket`; raises ListenError."""

    def close(self) -> None:
        """Hang up, and end."""

    # The verbs; `reset` is the client's.

    def pause(self, timeout: float | None = None) -> None:
        """Stop fetching and wait until nothing is in flight; raises TimeoutError, paused all the same."""

    def resume(self) -> None:
        """Go on, with the commands that are held first."""

    def save(self) -> bytes:
        """Return the state of the paused device."""

    def load(self, data: bytes) -> None:
        """Take a state over in the paused device; raises StateError."""

    def inspect(self) -> dict[str, Any]:
        """Return what the device is and does now, as a tree of plain values."""

    # Migration.

    def track_dirty(self, on: bool) -> None:
        """Note from now on, or no more, which guest memory is written by DMA, and mark it where that is safe."""

    def mark_dirty(self) -> DirtyReport:
        """Make QEMU send again what was noted and not marked; the VM is stopped. Raises DmaError."""

    @property
    def pci_config(self) -> bytes:
        """The first 256 bytes of configuration space as the guest left them."""

    @property
    def msix_table_offset(self) -> int:
        """Offset of the MSI-X table in BAR0."""

    @property
    def msix_table(self) -> bytes:
        """The MSI-X table of the loaded state, 16 bytes a vector."""

    def keep_msix_table(self, table: bytes) -> None:
        """Take QEMU's MSI-X table into the state that `save` writes."""

    # Its disks.

    @property
    def drives(self) -> Mapping[int, str]:
        """The namespaces' drives, by namespace id."""

    @property
    def held(self) -> int:
        """Commands that failed and wait to be tried again at `resume`."""

    @property
    def waits(self) -> bool:
        """Whether the guest waits for a disk, and will not do so for long."""

    def block_size(self, drive: str) -> int:
        """Return the logical block size in bytes of the namespace on a drive, as it is formatted now."""

    def counters(self, drive: str) -> Counters:
        """Return what was asked of a drive since the device exists."""

    def set_cluster_size(self, drive: str, size: int) -> None:
        """Tell how many bytes a drive's image allocates at once; before the guest looks."""

    def refresh(self, drive: str | None = None) -> None:
        """The back ends, or one, were opened or changed size: the guest is told."""
