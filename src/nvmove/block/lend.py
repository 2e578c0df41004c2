"""Image files lent to an engine that reads and writes them itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable


class LentFile(Protocol):
    """A file, or none (`fd` -1: no data is moved), that stays open until `release`."""

    fd: int
    writable: bool
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

        Plain reads and writes of it, inside its size, are all that is done. What fails, or is done in part, is asked
        of the back end again, which finds the error anew. `revoke` is called, from any thread and with locks held, when
        it is wanted back.
        """


class Loan:
    """A `LentFile`; `release` is what ends it."""

    def __init__(
        self, fd: int, release: Callable[[], None], *, writable: bool, zeroes: bool = False, alignment: int = 1
    ) -> None:
        self.fd = fd
        self.writable = writable
        self.zeroes = zeroes
        self.alignment = alignment
        self._release = release

    def release(self) -> None:
        """Give it back."""
        self._release()
