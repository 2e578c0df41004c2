"""What a borrower of guest memory notes of the pages that it writes: a byte for each, shared with it.

A byte and not a bit, so that both sides do with plain stores. The borrower stores 1 when the data is in place, also
where there is a 1; who asks clears first and tells, or copies the page, after that. Whatever the order, a write is in
what is copied, or its 1 is there for the next one who asks. It costs 1/4096 of the memory that is written.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from nvmove.nvme.seams import WRITTEN_PAGE

PAGE = WRITTEN_PAGE
"""Bytes of a page: the granularity of all that is dirty, and no coarser than that of any guest."""

_CHUNK = 1 << 16
"""Pages looked at at a time."""


class WrittenPages:
    """The pages that the guest memory [start, end) touches; `view` is what is lent."""

    def __init__(self, start: int, end: int) -> None:
        self._start = start
        self._end = end
        self._first = start // PAGE
        self._notes = mmap.mmap(-1, (end - 1) // PAGE - self._first + 1)  # zeroes, and no memory until they are written
        self.view = memoryview(self._notes)

    def take(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Clear what is noted of the pages that [start, end) touches; yield runs of it, (address, length) in bytes."""
        start, end = max(start, self._start), min(end, self._end)
        if start >= end:
            return
        last = (end - 1) // PAGE + 1 - self._first
        for at in range(start // PAGE - self._first, last, _CHUNK):
            chunk = self._notes[at : min(at + _CHUNK, last)]
            found = chunk.find(1)
            while found >= 0:
                stop = chunk.find(0, found)
                stop = len(chunk) if stop < 0 else stop
                self._notes[at + found : at + stop] = bytes(stop - found)
                yield self._run(at + found, at + stop)
                found = chunk.find(1, stop)

    def _run(self, first: int, stop: int) -> tuple[int, int]:
        start = max((self._first + first) * PAGE, self._start)
        return start, min((self._first + stop) * PAGE, self._end) - start
