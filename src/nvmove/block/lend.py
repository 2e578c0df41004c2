"""Image files lent to an engine that reads and writes them itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

NOTHING = 0
ASK = -1


class LentSpace(NamedTuple):
    """How zeroes are made and space is given back: by fallocate(2) in these modes.

    NOTHING: there is nothing to do; ASK: that is the back end's to do.
    """

    zeroes: int = ASK
    """Write zeroes."""
    unmapped_zeroes: int = ASK
    """Write zeroes where the space may be given back."""
    discard: int = ASK


NO_SPACE = LentSpace(NOTHING, NOTHING, NOTHING)
"""Of what has no content."""


class LentFile(Protocol):
    """A file, or none (`fd` -1: no data is moved), that stays open until `release`."""

    fd: int
    writable: bool
    syncs: bool
    """Whether there is something that a flush does; without, nothing has to be on stable storage either."""
    durable: bool
    """Each write must be on stable storage when it completes."""
    space: LentSpace
    zeroes: bool
    """Without a file: reads give zeroes."""
    alignment: int
    """What offsets, lengths and memory must be multiples of (O_DIRECT), or 1."""

    def release(self) -> None:
        """Give it back, once."""


@runtime_checkable
class LendsFile(Protocol):
    """A back end that can be lent as a file."""

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """Lend the file; None when requests must go through the back end.

        Reads, writes, fdatasync and fallocate, inside its size, are all that is done. What fails, or is done in part,
        is asked of the back end again, which finds the error anew; but for what failed to be made durable: Linux tells
        that once, and `sync_failed` is called. `revoke` is called, from any thread and with locks held, when it is
        wanted back.
        """

    def sync_failed(self, code: int) -> None:
        """Take note of the errno `code` that a borrower's sync met with; with no lock held."""


class Loan:
    """A `LentFile`; `release` is what ends it."""

    def __init__(
        self,
        fd: int,
        release: Callable[[], None],
        *,
        writable: bool,
        syncs: bool,
        space: LentSpace,
        durable: bool = False,
        zeroes: bool = False,
        alignment: int = 1,
    ) -> None:
        self.fd = fd
        self.writable = writable
        self.syncs = syncs
        self.durable = durable
        self.space = space
        self.zeroes = zeroes
        self.alignment = alignment
        self._release = release

    def release(self) -> None:
        """Give it back."""
        self._release()
