"""Reads and writes with O_DIRECT: aligned ones as they are, others through an aligned copy.

A write that covers a block only in part reads the block, changes it and writes it back. Meanwhile no other write to
that block may happen: see `BusyRanges`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence

from nvmove.block.linux import IOV_MAX, LARGEST_ALIGNMENT, address_of, direct_alignment
from nvmove.block.transfer import FileTransfer, fill_with_zeroes, gather, rest_after, scatter


class BusyRanges:
    """Byte ranges being written: any number of whole writes at once, a read-modify-write only alone on its blocks."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._busy: list[tuple[int, int, bool]] = []

    @contextlib.contextmanager
    def claim(self, start: int, end: int, alone: bool) -> Iterator[None]:
        """Wait until nothing that must not happen at once overlaps [start, end), and keep it so."""
        mine = (start, end, alone)
        with self._condition:
            self._condition.wait_for(lambda: not any(self._conflict(mine, other) for other in self._busy))
            self._busy.append(mine)
        try:
            yield
        finally:
            with self._condition:
                self._busy.remove(mine)
                self._condition.notify_all()

    @staticmethod
    def _conflict(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
        return (one[2] or other[2]) and one[0] < other[1] and other[0] < one[1]


class DirectTransfer(FileTransfer):
    """Reads and writes of a file that was opened with O_DIRECT."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._alignment = direct_alignment(fd)
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._busy = BusyRanges()

    @property
    def alignment(self) -> int:
        """What offsets, lengths and memory must be multiples of to be transferred without a copy."""
        return self._alignment

    @contextlib.contextmanager
    def changing(self, offset: int, length: int) -> Iterator[None]:
        """Hold while the range is changed past this object (fallocate)."""
        with self._busy.claim(offset, offset + length, alone=False):
            yield

    def read(self, buffers: Sequence[memoryview], offset: int, length: int) -> None:
        """Fill `buffers` from `offset`, with zeroes beyond the end of the file; raises OSError."""
        tried = self._alignment
        try:
            self._read(buffers, offset, length, tried)
        except OSError as error:
            if not self._wants_more_alignment(error, tried):
                raise
            self._read(buffers, offset, length, self._alignment)

    def write(self, buffers: Sequence[memoryview], offset: int, length: int, fua: bool) -> None:
        """Store `buffers` at `offset`; with `fua` they are on stable storage on return. Raises OSError."""
        tried = self._alignment
        try:
            self._write(buffers, offset, length, fua, tried)
        except OSError as error:
            if not self._wants_more_alignment(error, tried):
                raise
            self._write(buffers, offset, length, fua, self._alignment)

    def _read(self, buffers: Sequence[memoryview], offset: int, length: int, alignment: int) -> None:
        if not length:
            return
        if _is_aligned(buffers, offset, alignment):
            self._read_aligned(buffers, offset, alignment)
            return
        start, end = _blocks(offset, length, alignment)
        copy = _page_aligned(end - start)
        self._read_aligned([copy], start, alignment)
        scatter(copy[offset - start :], buffers)

    def _read_aligned(self, buffers: Sequence[memoryview], offset: int, alignment: int) -> None:
        """Read blocks. Only the end of the file makes such a read end off a block's boundary: the rest is zeroes."""
        left: Sequence[memoryview] = rest_after(buffers, 0)
        while left:
            count = os.preadv(self._fd, left[:IOV_MAX], offset)
            left = rest_after(left, count)
            offset += count
            if count == 0 or count % alignment:
                fill_with_zeroes(left)
                return

    def _write(self, buffers: Sequence[memoryview], offset: int, length: int, fua: bool, alignment: int) -> None:
        if not length:
            return
        start, end = _blocks(offset, length, alignment)
        whole = (start, end) == (offset, offset + length)
        with self._busy.claim(start, end, alone=not whole):
            if _is_aligned(buffers, offset, alignment):
                super().write(buffers, offset, length, fua)
                return
            copy = _page_aligned(end - start)
            if not whole:
                self._read_edges(copy, start, offset, length, alignment)
            gather(buffers, copy[offset - start :])
            file_end = max(os.fstat(self._fd).st_size, offset + length)
            try:
                super().write([copy], start, end - start, fua)
            finally:
                self._cut(file_end, end)

    def _read_edges(self, copy: memoryview, start: int, offset: int, length: int, alignment: int) -> None:
        """Fill in the blocks at both ends that the write covers only in part."""
        last_block = len(copy) - alignment
        if offset != start:
            self._read_aligned([copy[:alignment]], start, alignment)
        if offset + length != start + len(copy) and (last_block or offset == start):
            self._read_aligned([copy[last_block:]], start + last_block, alignment)

    def _cut(self, file_end: int, written_end: int) -> None:
        """Take off what a regular file got only because its last block was written whole."""
        if written_end > file_end and not self._is_device:
            os.ftruncate(self._fd, file_end)

    def _wants_more_alignment(self, error: OSError, tried: int) -> bool:
        """Whether the probe saw too little, as it does where a file begins with a hole: then try once more."""
        if error.errno != errno.EINVAL or tried == LARGEST_ALIGNMENT:
            return False
        self._alignment = LARGEST_ALIGNMENT
        return True


def _blocks(offset: int, length: int, alignment: int) -> tuple[int, int]:
    """Return start and end of the blocks that a range touches."""
    return offset // alignment * alignment, -(-(offset + length) // alignment) * alignment


def _is_aligned(buffers: Sequence[memoryview], offset: int, alignment: int) -> bool:
    bits = offset
    for buffer in buffers:
        address = address_of(buffer)
        if address is None:
            return False
        bits |= address | len(buffer)
    return not bits % alignment


def _page_aligned(length: int) -> memoryview:
    """Memory for a copy, aligned for any disk."""
    return memoryview(mmap.mmap(-1, length))
