"""The seam between the vfio-user session and the device it serves.

All of it is called on the control thread: none of it may wait for I/O, for QEMU or for a lock that is held during I/O.
What takes longer answers later, through the callback it is given.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nvmove.nvme.seams import DmaError
from nvmove.vfio.message import Buffer
from nvmove.vfio.writing import Writing

if TYPE_CHECKING:
    from nvmove.vfio.migration import Migration

# VFIO's region and IRQ indexes of a PCI device (linux/vfio.h).
BAR0_REGION = 0
CONFIG_REGION = 7
REGION_COUNT = 9
INTX = 0
MSIX = 2
ERROR = 3
IRQ_INDEX_COUNT = 5


class IrqWhat(enum.Enum):
    """What a SET_IRQS does to its interrupts."""

    TRIGGER = "trigger"
    MASK = "mask"
    UNMASK = "unmask"


@dataclass(frozen=True, slots=True)
class IrqAction:
    """One VFIO_USER_DEVICE_SET_IRQS on `count` interrupts: eventfds change, or something happens now."""

    what: IrqWhat
    eventfds: bool = False
    """DATA_EVENTFD, or `disable`: the interrupts get the eventfds `fds`, or lose theirs when there are none."""
    fds: tuple[int, ...] = ()
    """One an interrupt, or none."""
    fire: tuple[bool, ...] = ()
    """DATA_BOOL, or all true for DATA_NONE: trigger, mask or unmask now; one an interrupt."""
    disable: bool = False
    """DATA_NONE with count 0: all of the index lose their eventfds."""


@dataclass(frozen=True, slots=True)
class MappableArea:
    """A part of a region that the client may map: the same offset in the region and in the file `fd`; whole pages."""

    offset: int
    size: int
    fd: int


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region as VFIO_USER_DEVICE_GET_REGION_INFO describes it: size in bytes, 0 when absent."""

    size: int = 0
    readable: bool = False
    writable: bool = False
    mappable: MappableArea | None = None


class Client(Protocol):
    """The connected client (QEMU), as the device sees it. All of these wait, so they are never for the control thread.

    They raise `nvmove.nvme.seams.DmaError` when the client refuses or is gone.
    """

    def dma_read(self, address: int, length: int) -> bytes:
        """Read guest memory through the client (VFIO_USER_DMA_READ), in pieces as it allows."""

    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]], writing: Writing | None = None) -> None:
        """Write runs of (address, data), in order; on return the client has answered for all of them.

        Raises DmaError, too, when `writing`, which says whose runs they are, is gone: nothing of it is sent after that.
        """

    def dma_write_soon(
        self,
        runs: Sequence[tuple[int, Buffer]],
        done: Callable[[DmaError | None], None],
        writing: Writing | None = None,
    ) -> None:
        """Do the same and return at once; few runs, and short ones.

        `done` is called when the client has written all of them, has refused one, or is gone: on any thread, with locks
        held and perhaps before the return. It must not wait nor call the client.
        """

    def cancel(self, writing: Writing) -> None:
        """Fail what is under way of `writing`, which is gone. Does not wait."""


Reset = Callable[[Callable[[], None]], None]
"""Begins a reset; calls its argument when nothing started before it can touch guest memory any more."""


class Device(Protocol):
    """A PCI function as vfio-user sees it."""

    @property
    def regions(self) -> Sequence[RegionInfo]:
        """By VFIO PCI region index: BAR0…BAR5, ROM, config space, VGA."""

    @property
    def irq_counts(self) -> Sequence[int]:
        """By VFIO PCI IRQ index: INTx, MSI, MSI-X, error, request."""

    @property
    def migration(self) -> Migration | None:
        """The protocol's own migration, when the client may drive it."""

    def attach(self, client: Client) -> None:
        """A client is connected and has negotiated a version."""

    def detach(self, done: Callable[[], None]) -> None:
        """The client is gone. Its memory is unmapped and its eventfds closed; `done` when no I/O touches them."""

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Return exactly `count` bytes; the session has checked the range against `regions`."""

    def write(self, region: int, offset: int, data: bytes) -> Reset | None:
        """Store into a region; the session has checked the range.

        A reset that the write asks for is returned: the session begins it, and answers the write at its end.
        """

    def map_dma(self, address: int, size: int, fd: int | None, offset: int, readable: bool, writable: bool) -> None:
        """Guest memory appears; takes `fd` over. Raises OSError (the errno goes to the client): overlaps are EEXIST."""

    def unmap_dma(self, address: int, size: int, unmap_all: bool, done: Callable[[int], None]) -> None:
        """Guest memory goes away; `done(errno)` when no I/O under way touches it any more."""

    def set_irqs(self, index: int, start: int, count: int, action: IrqAction) -> None:
        """Change interrupts `start`…`start + count - 1` of IRQ `index`; takes the action's fds over. Raises OSError."""

    def reset(self, done: Callable[[], None]) -> None:
        """Function-level reset; `done` when nothing started before it can touch guest memory any more."""
