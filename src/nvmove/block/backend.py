"""The seam between the controller and the disk: byte ranges and buffers go in, an errno comes out.

A back end knows no NVMe. `submit` may finish a request before it returns (raw files: an inline preadv) or later, from a
thread of its own (NBD). It is never called from the vfio-user control thread.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class BackendError(Exception):
    """The disk cannot be opened or used as asked: one line that says what is wrong and how to mend it."""


class Operation(enum.Enum):
    """What a request does."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"

    @property
    def is_read(self) -> bool:
        """Whether the error policy of reads (rerror) applies, else that of writes (werror)."""
        return self is Operation.READ


@dataclass(slots=True, eq=False)
class Request:
    """One operation on a byte range.

    `done(errno)` is called exactly once, from any thread, with 0 or a positive errno; it may be called inside `submit`.
    """

    operation: Operation
    done: Callable[[int], None]
    offset: int = 0
    length: int = 0
    buffers: Sequence[memoryview] = field(default_factory=tuple)
    """READ, WRITE: memory to fill or to store, in order; the lengths add up to `length`."""
    fua: bool = False
    """WRITE, WRITE_ZEROES: on stable storage before `done`."""
    may_unmap: bool = False
    """WRITE_ZEROES: the range may be deallocated, as long as it reads as zeroes."""


class Backend(Protocol):
    """An open disk image."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (with EROFS)."""

    @property
    def supports_discard(self) -> bool:
        """Whether DISCARD does something; where it does not, it succeeds and does nothing."""

    @property
    def request_alignment(self) -> int:
        """Buffers in memory and offsets must be multiples of this many bytes for the fastest path (1: no demand)."""

    def submit(self, request: Request) -> None:
        """Start `request`; its errors reach `done`, never the caller."""

    def refresh_size(self) -> int:
        """Look at the size again (the image may have been resized) and return it."""

    def recover(self) -> None:
        """Mend what can be mended from here, a lost connection: called before requests that failed are tried again.

        Does nothing where nothing is broken. May wait; raises BackendError. Not for a `done` callback.
        """

    def close(self) -> None:
        """Finish what is under way, then close the image and drop its locks."""


def refusal(request: Request, size: int, read_only: bool) -> int:
    """Return the errno that a request earns before it is tried, or 0.

    EROFS for a change of a read-only image; EIO for a range outside it, as QEMU's block layer answers.
    """
    if request.operation is Operation.FLUSH:
        return 0
    if read_only and request.operation is not Operation.READ:
        return errno.EROFS
    if request.offset < 0 or request.length < 0 or request.offset + request.length > size:
        return errno.EIO
    return 0
