"""The Linux calls that Python lacks: fallocate, ioctls of block devices, and what O_DIRECT demands.

Nothing here knows a disk image: file descriptors and byte ranges go in, OSError comes out.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

# fallocate(2), linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# linux/fs.h; each takes a struct of two u64: start and length in bytes
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
# linux/fs.h: whether the device is read-only (int)
BLKROGET = 0x125E
# linux/fs.h: size in bytes (u64)
BLKGETSIZE64 = 0x80081272

IOV_MAX = os.sysconf("SC_IOV_MAX")
"""Buffers that one preadv or pwritev takes."""

LARGEST_ALIGNMENT = 4096
"""No disk or filesystem in use asks O_DIRECT for more."""

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})
"""A file, filesystem or kernel that does not have the call at all."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def block_device_size(fd: int) -> int:
    """Return the size of a block device in bytes; raises OSError."""
    return int(struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])


def block_device_is_read_only(fd: int) -> bool:
    """Whether writes to a block device fail, although it may be open for writing; raises OSError."""
    return bool(struct.unpack("=i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0])


def block_device_range(fd: int, request: int, offset: int, length: int) -> None:
    """BLKDISCARD or BLKZEROOUT on a byte range; raises OSError."""
    fcntl.ioctl(fd, request, struct.pack("=QQ", offset, length))


def address_of(buffer: memoryview) -> int | None:
    """Return where a buffer lies in this process's memory, or None for one that Python calls read-only."""
    if buffer.readonly:
        return None
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


def direct_alignment(fd: int) -> int:
    """Return the alignment, in bytes, that an O_DIRECT file wants of offsets, lengths and memory.

    Found as QEMU finds it, by reading: the smallest power of two from 512 on that is not refused with EINVAL. A
    filesystem may accept a misaligned read of a hole and refuse elsewhere, so the answer may turn out too small.
    """
    pages = memoryview(mmap.mmap(-1, 2 * LARGEST_ALIGNMENT))
    alignment = 512
    while alignment < LARGEST_ALIGNMENT:
        try:
            os.preadv(fd, [pages[alignment : 2 * alignment]], alignment)
        except OSError as error:
            if error.errno != errno.EINVAL:
                break  # a bad sector is no question of alignment
            alignment *= 2
        else:
            break
    return alignment
