"""Writes to guest memory by message, and the unmaps that meet them.

A write by message is not there when it is sent: the client does it some time after. So an unmap gives up what is yet to
be sent to its range, has what is under way there failed, and is answered when nothing more is sent: what the client has
at that address afterwards is written to by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from nvmove.vfio.message import Buffer


class Unmap:
    """An unmap under way: `done(0)` when `left` users of its memory have ended. It wants its memory's lock."""

    __slots__ = ("done", "left")

    def __init__(self, done: Callable[[int], None], left: int) -> None:
        self.done = done
        self.left = left

    def one_less(self) -> bool:
        """Return whether this was the last user."""
        self.left -= 1
        return not self.left


class Writing:
    """What is written by message together: it fails as a whole."""

    __slots__ = ("_ranges", "gone", "under_way", "unmaps")

    def __init__(self, runs: Iterable[tuple[int, Buffer]]) -> None:
        self.gone = False
        """Some of its memory was unmapped: no message of it is sent from now on."""
        self.under_way = False
        self.unmaps: list[Unmap] = []
        """Those that wait for its end."""
        self._ranges = [(address, address + memoryview(data).nbytes) for address, data in runs]

    def meets(self, start: int, end: int) -> bool:
        """Whether it writes between `start` and `end`."""
        return any(first < end and start < last for first, last in self._ranges)


class Writings:
    """All of one guest memory, from when it is known where they will write. Everything wants that memory's lock."""

    def __init__(self) -> None:
        self._all: set[Writing] = set()

    def add(self, runs: Iterable[tuple[int, Buffer]]) -> Writing:
        """Know of one more; nothing of it is sent yet."""
        writing = Writing(runs)
        self._all.add(writing)
        return writing

    def begin(self, writing: Writing) -> bool:
        """It is to be sent; return whether it may be."""
        writing.under_way = not writing.gone
        return writing.under_way

    def unmap(self, start: int, end: int) -> Sequence[Writing]:
        """Memory is unmapped; return what is under way there."""
        met = [writing for writing in self._all if writing.meets(start, end)]
        for writing in met:
            writing.gone = True
        return [writing for writing in met if writing.under_way]

    def end(self, writing: Writing) -> list[Unmap]:
        """It has ended, one way or the other; return the unmaps that waited for nothing else."""
        self._all.discard(writing)
        return [unmap for unmap in writing.unmaps if unmap.one_less()]
