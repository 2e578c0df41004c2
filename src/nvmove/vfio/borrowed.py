"""Guest memory that is in use: by a command for its transfer, or by an engine that has all of it lent.

Either holds regions of the map until it has ended, one way or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from nvmove.nvme.seams import LentRegion
from nvmove.vfio.dirty import DirtyTracking, span, split
from nvmove.vfio.mapping import Region
from nvmove.vfio.writing import Writing

Run = tuple[int, memoryview]
"""A guest address and what is there: a view into a mapping, or a copy."""


class Owner(Protocol):
    """What both use of the guest memory that they are of (`nvmove.vfio.memory.GuestMemory`)."""

    @property
    def dirty(self) -> DirtyTracking:
        """Who wants to know what is written."""

    def finish(self, transfer: MemoryTransfer, commit: bool) -> None:
        """A transfer has ended."""

    def take_back(self, loan: MemoryLoan) -> None:
        """A loan has ended."""

    def to_mark(self, marks: Sequence[tuple[int, bytes]], regions: Sequence[Region]) -> Writing:
        """Return `marks` as what is to be written by message."""

    def mark_soon(
        self,
        marking: Writing,
        marks: list[tuple[int, bytes]],
        runs: Sequence[tuple[int, int]],
        done: Callable[[], None],
    ) -> None:
        """Write `marks` by message; `done` when that is over."""


class MemoryTransfer:
    """A `Transfer`: views into the mmaps, bounce buffers where there are none."""

    __slots__ = ("_memory", "bounces", "buffers", "regions", "writing", "written")

    def __init__(self, memory: Owner) -> None:
        self.buffers: Sequence[memoryview] = ()
        self._memory = memory
        self.regions: list[Region] = []
        """What it holds of the map."""
        self.bounces: list[Run] = []
        """Copies of what is reached by message."""
        self.written: list[Run] = []
        """What it writes in place."""
        self.writing: Writing | None = None
        """The bounces that go to the guest."""

    def finish(self, commit: bool = True) -> None:
        """Give the memory back; see `Transfer.finish`."""
        self._memory.finish(self, commit)


class MemoryLoan:
    """All mapped memory, lent to somebody who reads and writes it himself; `nvmove.nvme.seams.LentMemory`."""

    def __init__(self, memory: Owner, regions: list[Region], revoke: Callable[[], None]) -> None:
        dirty = memory.dirty
        self.regions: Sequence[LentRegion] = [
            LentRegion(
                region.start,
                region.view,
                region.readable,
                region.writable,
                dirty.lend(region, region.start, region.end) if region.writable else None,
            )
            for region in regions
            if region.view is not None
        ]
        self.marks = dirty.marking
        self.held = regions
        self.revoke = revoke
        self._memory = memory

    def mark(self, runs: Sequence[tuple[int, int]], done: Callable[[], None]) -> None:
        """Write again by message what was written; see `LentMemory.mark`."""
        marks = [copy for address, length in runs for copy in self._copies(address, address + length)]
        self._memory.mark_soon(self._memory.to_mark(marks, self.held), marks, runs, done)

    def _copies(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Copy what must be written again: of the memory that was lent, wherever the map may be by now."""
        for region in self.held:
            first, last = max(start, region.start), min(end, region.end)
            if region.view is not None and first < last:
                for part in split(first, last - first):
                    yield marking_copy((region.start, region.view), *part)

    def release(self) -> None:
        """Give it back."""
        self._memory.take_back(self)


def marking_copy(run: Run, start: int, end: int) -> tuple[int, bytes]:
    """Copy what must be written again of `run`, between `start` and `end`, to mark every page of it."""
    address, buffer = run
    start, end = span(start, end)
    return start, bytes(buffer[start - address : end - address])
