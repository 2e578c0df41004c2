"""A run of guest memory, and the way to it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

from nvmove.nvme.seams import Segment
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
