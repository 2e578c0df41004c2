"""The space of a raw image: its size, zeroes and holes, on a regular file or a block device."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import Protocol

from nvmove.block import linux
from nvmove.block.lend import ASK, NOTHING, LentSpace
from nvmove.block.linux import UNSUPPORTED

SECTOR = 512
"""A raw file's size counts as rounded up to this, as in QEMU."""

_ZEROES = memoryview(bytes(1 << 20))


class Writer(Protocol):
    """Where zeroes are written when the filesystem cannot make them."""

    def write(self, buffers: Sequence[memoryview], offset: int, length: int, fua: bool) -> None:
        """Store `buffers` at `offset`; raises OSError."""

    def changing(self, offset: int, length: int) -> contextlib.AbstractContextManager[None]:
        """Hold while the range is changed past the writer."""


class FileSpace:
    """A regular file."""

    def __init__(self, fd: int, writer: Writer, unmap: bool) -> None:
        """`unmap`: discard=unmap, space may be given back."""
        self._fd = fd
        self._writer = writer
        self._unmap = unmap
        self._missing: set[int] = set()
        """fallocate modes that this file turned out not to have."""

    @property
    def supports_discard(self) -> bool:
        """Whether discard gives space back."""
        return self._unmap

    def size(self) -> int:
        """Return the size in bytes, rounded up to a sector."""
        return -(-os.fstat(self._fd).st_size // SECTOR) * SECTOR

    def write_zeroes(self, offset: int, length: int, may_unmap: bool) -> None:
        """Make a range read as zeroes; raises OSError."""
        if may_unmap and self._unmap and self._try(linux.FALLOC_FL_PUNCH_HOLE, offset, length):
            return
        if not self._zero_range(offset, length):
            write_zeroes_as_data(self._writer, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Give a range's space back, where that is wanted and possible; raises OSError."""
        if self._unmap:
            self._punch_hole(offset, length)

    @property
    def lent(self) -> LentSpace:
        """What `write_zeroes` and `discard` would do first, for somebody who has the file lent."""
        zeroes = self._mode(linux.FALLOC_FL_ZERO_RANGE, ASK)
        punch = self._mode(linux.FALLOC_FL_PUNCH_HOLE, NOTHING) if self._unmap else NOTHING
        return LentSpace(zeroes, punch or zeroes, punch)

    def _mode(self, mode: int, without: int) -> int:
        """Return how to call fallocate, or `without` for a mode that this file turned out not to have."""
        return without if mode in self._missing else mode | linux.FALLOC_FL_KEEP_SIZE

    def _zero_range(self, offset: int, length: int) -> bool:
        return self._try(linux.FALLOC_FL_ZERO_RANGE, offset, length)

    def _punch_hole(self, offset: int, length: int) -> bool:
        return self._try(linux.FALLOC_FL_PUNCH_HOLE, offset, length)

    def _try(self, mode: int, offset: int, length: int) -> bool:
        """Return False when the file cannot do that here; raises OSError for what went wrong."""
        if mode in self._missing:
            return False
        try:
            with self._writer.changing(offset, length):
                self._call(mode, offset, length)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                self._missing.add(mode)
                return False
            if error.errno == errno.EINVAL:  # a range that is not aligned as this filesystem wants it
                return False
            raise
        return True

    def _call(self, mode: int, offset: int, length: int) -> None:
        linux.fallocate(self._fd, mode | linux.FALLOC_FL_KEEP_SIZE, offset, length)


class DeviceSpace(FileSpace):
    """A block device."""

    def size(self) -> int:
        """Return the size in bytes."""
        return linux.block_device_size(self._fd)

    @property
    def lent(self) -> LentSpace:
        """As a file's, for fallocate does here what BLKZEROOUT does; but not what BLKDISCARD does."""
        file = super().lent
        zeroes = ASK if linux.BLKZEROOUT in self._missing else file.zeroes
        discards = self._unmap and linux.BLKDISCARD not in self._missing
        return LentSpace(zeroes, file.discard or zeroes, ASK if discards else NOTHING)

    def _zero_range(self, offset: int, length: int) -> bool:
        return self._try(linux.BLKZEROOUT, offset, length)

    def _punch_hole(self, offset: int, length: int) -> bool:
        return self._try(linux.BLKDISCARD, offset, length)

    def _call(self, mode: int, offset: int, length: int) -> None:
        if mode in (linux.BLKZEROOUT, linux.BLKDISCARD):
            linux.block_device_range(self._fd, mode, offset, length)
        else:
            super()._call(mode, offset, length)


def write_zeroes_as_data(writer: Writer, offset: int, length: int) -> None:
    """Write `length` zeroes; raises OSError."""
    while length:
        count = min(length, len(_ZEROES))
        writer.write([_ZEROES[:count]], offset, count, False)
        offset += count
        length -= count
