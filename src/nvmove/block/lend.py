"""Image files lent to an engine that reads and writes them itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

NOTHING = 0
ASK = -1


class LentSpace(NamedTuple):
    """How zeroes are made and space is given back: by fallocate(2) in these modes; at an export by a request of this
    type, with its flags from bit 16 on.

    NOTHING: there is nothing to do; ASK: that is the back end's to do.
    """

    zeroes: int = ASK
    """Write zeroes."""
    unmapped_zeroes: int = ASK
    """Write zeroes where the space may be given back."""
    discard: int = ASK


NO_SPACE = LentSpace(NOTHING, NOTHING, NOTHING)
"""Of what has no content."""


class LentExport(NamedTuple):
    """What a lent connection to an NBD server takes: simple replies are agreed, and nothing is under way."""

    can_fua: bool
    """Writes with FUA; without, a flush follows them."""
    maximum: int
    """Bytes of data in one request."""


class LentFile(Protocol):
    """A file, or none (`fd` -1: no data is moved), or an export, that stays open until `release`."""

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
    """What offsets, lengths and, but for an export, memory must be multiples of (O_DIRECT), or 1."""
    export: LentExport | None
    """`fd` is a connection to this."""

    def release(self) -> None:
        """Give it back, once."""


@runtime_checkable
class LendsFile(Protocol):
    """A back end that can be lent as a file."""

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """Lend the file; None when requests must go through the back end.

        Reads, writes, fdatasync and fallocate, inside its size, are all that is done. What fails, or is done in part,
        is asked of the back end again, which finds the error anew; but for what failed to be made durable: Linux tells
        that once, and `sync_failed` is called; and for reads, writes and flushes at an export, whose server has said
        what is to be said. `revoke` is called, from any thread and with locks held, when it is
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
        export: LentExport | None = None,
    ) -> None:
        self.fd = fd
        self.writable = writable
        self.syncs = syncs
        self.durable = durable
        self.space = space
        self.zeroes = zeroes
        self.alignment = alignment
        self.export = export
        self._release = release

    def release(self) -> None:
        """Give it back."""
        self._release()
