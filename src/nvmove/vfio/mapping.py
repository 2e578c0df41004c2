"""Guest memory's map: runs of memory, and the way to each."""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from nvmove.nvme.seams import DmaError, Segment
from nvmove.vfio.writing import Unmap


class Region:
    """A run of guest memory with one way to it. `view` is None when that way is by message."""

    __slots__ = ("end", "readable", "start", "unmap", "uses", "view", "writable")

    def __init__(self, start: int, end: int, view: memoryview | None, readable: bool, writable: bool) -> None:
        self.start = start
        self.end = end
        self.view = view
        self.readable = readable
        self.writable = writable
        self.uses = 0
        self.unmap: Unmap | None = None

    def part(self, start: int, end: int) -> Region:
        """What remains of this region when a piece of it is unmapped: a new one on the same mmap."""
        view = None if self.view is None else self.view[start - self.start : end - self.start]
        return Region(start, end, view, self.readable, self.writable)


class RegionMap:
    """The regions of one guest memory, by address; none overlap. Everything wants that memory's lock."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._regions: list[Region] = []
        self._last: Region | None = None  # the region found last: nearly always the next one too

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def find(self, address: int) -> Region:
        """Return the region that has `address`; raise DmaError."""
        region = self._last
        if region is not None and region.start <= address < region.end:
            return region
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._regions[index].end:
            raise DmaError(f"guest address {address:#x} is not mapped")
        self._last = region = self._regions[index]
        return region

    def overlapping(self, start: int, end: int) -> list[Region]:
        """Return the regions that have some of the memory between two addresses, in order."""
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._regions[first].end <= start:
            first += 1
        last = first
        while last < len(self._regions) and self._regions[last].start < end:
            last += 1
        return self._regions[first:last]

    def insert(self, region: Region) -> None:
        """Add a region where there is none."""
        index = bisect_right(self._starts, region.start)
        self._starts.insert(index, region.start)
        self._regions.insert(index, region)

    def remove(self, region: Region) -> None:
        """Take a region out."""
        index = bisect_right(self._starts, region.start) - 1
        del self._starts[index]
        del self._regions[index]
        self._last = None


def merged(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Join segments that continue each other: PRP lists are often contiguous, and each buffer costs an iovec."""
    runs: list[tuple[int, int]] = []
    for address, length in segments:
        if runs and sum(runs[-1]) == address:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((address, length))
    return runs


def map_shared(fd: int, size: int, offset: int, writable: bool) -> memoryview:
    """Map `size` bytes at `offset` of `fd`. Hugetlbfs maps whole huge pages only, so the mapping may be wider."""
    status = os.fstat(fd)
    page = status.st_blksize if status.st_blksize % mmap.ALLOCATIONGRANULARITY == 0 else mmap.ALLOCATIONGRANULARITY
    if offset + size > status.st_size:
        raise OSError(errno.EINVAL, f"a file of {status.st_size} bytes for memory at {offset:#x}+{size:#x}")
    start = offset - offset % page
    end = min(-(-(offset + size) // page) * page, status.st_size)
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    try:
        mapping = mmap.mmap(fd, end - start, mmap.MAP_SHARED, protection, offset=start)
    except (ValueError, OverflowError) as error:
        raise OSError(errno.EINVAL, str(error)) from error
    return memoryview(mapping)[offset - start : offset - start + size]
