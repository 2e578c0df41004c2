"""Which pages of guest memory the device has written, for whoever copies that memory while the guest runs.

What the device writes through its own mapping of guest memory is seen by nobody. Two kinds of copier want to know it:

- QEMU marks a page dirty when it is written through a DMA_WRITE message, and only then (found by experiment). So while
  it migrates, *marking* is on: a command's data is written again by message after it is in place and before the
  command's completion, as long as the guest may not touch it. What is written without a completion to wait for (the
  completions themselves, shadow doorbells' EventIdx) is recorded, and written again when the VM has stopped. A page
  that the guest owns while it runs is never written again: the guest's own store could be lost.
- A client that drives the protocol's own migration asks for a *log*, and gets it as bitmaps.

An engine that has memory lent notes what it writes in memory shared with it (vfio/written.py). That is taken over into
the record or the log when somebody asks for it, and when the memory goes away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from nvmove.vfio import written

PAGE = written.PAGE
RUN = 1 << 20
"""Bytes of the longest run that is marked with one message."""


@dataclass(frozen=True, slots=True)
class DirtyReport:
    """What marking at the switch-over took: pages marked, bytes sent for it, and how long it took."""

    pages: int
    bytes: int
    seconds: float


class DirtyPages:
    """A set of page numbers, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: set[int] = set()

    def add(self, address: int, length: int) -> None:
        """Put in the pages of a run of memory of at least one byte."""
        pages = range(address // PAGE, (address + length - 1) // PAGE + 1)
        with self._lock:
            self._pages.update(pages)

    def add_all(self, pages: Iterable[int]) -> None:
        """Put in page numbers."""
        with self._lock:
            self._pages.update(pages)

    def take(self) -> list[int]:
        """Return the page numbers in order, and be empty."""
        with self._lock:
            pages, self._pages = self._pages, set()
        return sorted(pages)

    def take_between(self, start: int, end: int) -> set[int]:
        """Return the page numbers that touch a run of memory; forget those that lie in it as a whole."""
        first, last = start // PAGE, (end - 1) // PAGE
        with self._lock:
            found = {page for page in self._pages if first <= page <= last}
            self._pages -= {page for page in found if start <= page * PAGE and (page + 1) * PAGE <= end}
        return found

    def clear(self) -> None:
        """Be empty."""
        with self._lock:
            self._pages.clear()


class DirtyLog:
    """What a client asked to have logged: all that is written in some ranges (none: everywhere)."""

    def __init__(self, ranges: Sequence[range] = ()) -> None:
        self._ranges = ranges
        self._pages = DirtyPages()
        self.collect: Callable[[int, int], None] = lambda _start, _end: None
        """Called before a report, for what was noted elsewhere between two addresses to be logged."""

    def add(self, address: int, length: int) -> None:
        """Log a run of memory of at least one byte."""
        if not self._ranges:
            self._pages.add(address, length)
            return
        for logged in self._ranges:
            start, end = max(address, logged.start), min(address + length, logged.stop)
            if start < end:
                self._pages.add(start, end - start)

    def report(self, start: int, length: int, page_size: int) -> bytes:
        """Return the bitmap of a run of memory, one bit for `page_size` bytes, in whole 64-bit words; and forget it.

        A page that is only in part inside is reported again the next time.
        """
        self.collect(start, start + length)
        bitmap = bytearray(bitmap_size(length, page_size))
        for page in self._pages.take_between(start, start + length):
            first = (max(page * PAGE, start) - start) // page_size
            last = (min((page + 1) * PAGE, start + length) - 1 - start) // page_size
            for bit in range(first, last + 1):
                bitmap[bit >> 3] |= 1 << (bit & 7)
        return bytes(bitmap)


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of the bitmap of `length` bytes of memory."""
    return -(-length // (page_size * 64)) * 8


class DirtyTracking:
    """What is written where, while somebody wants to know: one device's."""

    def __init__(self) -> None:
        self.active = False
        """Whether anybody wants to know. Look at it after the data is in place: who asks later finds it there."""
        self.marking = False
        """Whether what was written is to be written again by message."""
        self.recorded = DirtyPages()
        """Pages to be marked at the switch-over."""
        self.log: DirtyLog | None = None
        """What is logged for the client, in whatever way it was written."""
        self._lock = threading.Lock()
        self._noted: dict[object, written.WrittenPages] = {}
        """By region, what those note who have it lent."""

    # Nothing is lent while one of these four runs (`Leases.suspended`).

    def start_marking(self) -> None:
        """Mark from now on; what was recorded before is forgotten."""
        self._forget_notes()
        self.recorded.clear()
        self.marking = self.active = True

    def stop_marking(self) -> None:
        """Mark no more, and forget what was recorded."""
        self._forget_notes()
        self.marking = False
        self.active = self.log is not None
        self.recorded.clear()

    def start_log(self, log: DirtyLog) -> None:
        """Log from now on."""
        self._forget_notes()
        log.collect = self.collect
        self.log = log
        self.active = True

    def stop_log(self) -> None:
        """Log no more."""
        self._forget_notes()
        self.log = None
        self.active = self.marking

    def _forget_notes(self) -> None:
        with self._lock:
            self._noted.clear()

    @property
    def is_for_both(self) -> bool:
        """Whether pages are to be marked and logged: what a borrower notes is for one of them only."""
        return self.marking and self.log is not None

    def lend(self, region: object, start: int, end: int) -> memoryview | None:
        """Return where whoever has the region [start, end) lent notes what it writes; None: nobody wants to know."""
        if not self.active:
            return None
        with self._lock:
            noted = self._noted.get(region)
            if noted is None:
                noted = self._noted[region] = written.WrittenPages(start, end)
            return noted.view

    def gone(self, region: object) -> None:
        """A region is not lent any more and will not be."""
        with self._lock:
            noted = self._noted.pop(region, None)
            if noted is not None:
                self._take(noted, 0, 1 << 64)

    def collect(self, start: int = 0, end: int = 1 << 64) -> None:
        """Take over what is noted of the memory between two addresses."""
        with self._lock:
            for noted in self._noted.values():
                self._take(noted, start, end)

    def _take(self, noted: written.WrittenPages, start: int, end: int) -> None:
        for address, length in noted.take(start, end):
            self.wrote(address, length)
            self.record(address, length)

    def wrote(self, address: int, length: int) -> None:
        """Bytes were written; only the log is told."""
        log = self.log
        if log is not None:
            log.add(address, length)

    def record(self, address: int, length: int) -> None:
        """Bytes were written to which no completion corresponds, or whose marking failed."""
        if self.marking:
            self.recorded.add(address, length)


def runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Join page numbers in order to runs of memory, (start, end) in bytes, of at most `RUN` bytes."""
    at = 0
    while at < len(pages):
        last = at
        while last + 1 < len(pages) and pages[last + 1] == pages[last] + 1 and last + 1 - at < RUN // PAGE:
            last += 1
        yield pages[at] * PAGE, (pages[last] + 1) * PAGE
        at = last + 1


def split(address: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a run of memory into (start, end) of at most `RUN` bytes, between pages."""
    end = address + length
    while address < end:
        stop = min(end, address // PAGE * PAGE + RUN)
        yield address, stop
        address = stop


def span(start: int, end: int) -> tuple[int, int]:
    """Return the shortest part of a run that touches every page of it: of one or two pages, a byte of each."""
    first_end = (start // PAGE + 1) * PAGE
    if end <= first_end:
        return start, start + 1
    return first_end - 1, (end - 1) // PAGE * PAGE + 1
