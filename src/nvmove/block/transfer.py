"""Scattered reads and writes of a file, complete: short ones continued, the end of the file read as zeroes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

from nvmove.block.linux import IOV_MAX, UNSUPPORTED


def rest_after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `buffers` after the first `count` bytes; no empty buffer is in it."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *(later for later in buffers[index + 1 :] if len(later))]
        count -= len(buffer)
    return []


def fill_with_zeroes(buffers: Sequence[memoryview]) -> None:
    """Store zeroes in all of `buffers`."""
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))


def scatter(source: memoryview, buffers: Sequence[memoryview]) -> None:
    """Fill `buffers` from the beginning of `source`."""
    position = 0
    for buffer in buffers:
        buffer[:] = source[position : position + len(buffer)]
        position += len(buffer)


def gather(buffers: Sequence[memoryview], target: memoryview) -> None:
    """Store `buffers` at the beginning of `target`."""
    position = 0
    for buffer in buffers:
        target[position : position + len(buffer)] = buffer
        position += len(buffer)


class FileTransfer:
    """Reads and writes through the page cache (or with O_DIRECT, when all is aligned)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._has_dsync = True

    @property
    def alignment(self) -> int:
        """What offsets, lengths and memory must be multiples of to be transferred without a copy."""
        return 1

    def changing(self, offset: int, length: int) -> contextlib.AbstractContextManager[None]:
        """Hold while the range is changed past this object (fallocate)."""
        return contextlib.nullcontext()

    def read(self, buffers: Sequence[memoryview], offset: int, length: int) -> None:
        """Fill `buffers`, `length` bytes in all, from `offset`, with zeroes beyond the end of the file.

        Raises OSError.
        """
        left = buffers
        while left:
            count = os.preadv(self._fd, left[:IOV_MAX], offset)
            if count == length:
                return
            if count == 0:
                fill_with_zeroes(left)
                return
            left = rest_after(left, count)
            offset += count
            length -= count

    def write(self, buffers: Sequence[memoryview], offset: int, length: int, fua: bool) -> None:
        """Store `buffers`, `length` bytes in all, at `offset`; with `fua` they are on stable storage on return.

        Raises OSError.
        """
        flags = os.RWF_DSYNC if fua and self._has_dsync else 0
        left = buffers
        while length:
            try:
                count = os.pwritev(self._fd, left[:IOV_MAX], offset, flags)
            except OSError as error:
                if not flags or error.errno not in UNSUPPORTED:
                    raise
                self._has_dsync, flags = False, 0
                continue
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left = rest_after(left, count) if count < length else ()
            offset += count
            length -= count
        if fua and not flags:
            os.fdatasync(self._fd)
