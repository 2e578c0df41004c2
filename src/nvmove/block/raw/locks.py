"""Image locks that QEMU understands, and that understand QEMU's.

QEMU locks single bytes of an image with open-file-description locks, all of them read locks: byte 100 + n says "I use
permission n", byte 200 + n says "nobody else may use permission n". After setting its own bytes a program looks whether
anyone else's contradict them. Measured with QEMU 11.1.3 (/proc/locks), whose nvme device with a raw file holds
100, 101 and 201, 203: see docs/reference/backends.md.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import struct
from collections.abc import Iterable

from nvmove.block.backend import BackendError

USED_BASE = 100
"""The byte of permission 0 among those in use."""
UNSHARED_BASE = 200
"""The byte of permission 0 among those that others may not use."""

# struct flock on 64-bit Linux: type, whence, start, length, pid (0 for open-file-description locks)
_FLOCK = struct.Struct("hhqqi4x")


class Permission(enum.IntEnum):
    """What a user of an image may do with it: bit numbers of QEMU's BlockPermission."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3

    @property
    def label(self) -> str:
        """QEMU's name for it in messages."""
        return self.name.lower().replace("_", " ")


class ImageLock:
    """The locks on one open image; released and taken again when the image is handed over."""

    def __init__(self, fd: int, path: str, *, read_only: bool, share_rw: bool = False) -> None:
        """Describe the locks of a guest's disk; `take` sets them.

        `fd` stays the caller's, and must be open for reading. `share_rw`: others may write too (QEMU's share-rw=on).
        """
        self._fd = fd
        self._path = path
        self._used = (Permission.CONSISTENT_READ,) if read_only else (Permission.CONSISTENT_READ, Permission.WRITE)
        self._unshared = (Permission.RESIZE,) if share_rw else (Permission.WRITE, Permission.RESIZE)
        self.held = False

    def take(self) -> None:
        """Take the locks; raises BackendError when another process's use of the image contradicts them."""
        if self.held:
            return
        try:
            self._set(fcntl.F_RDLCK, self._bytes())
            for permission in self._used:
                if self._is_locked_by_another(UNSHARED_BASE + permission):
                    raise self._conflict(f'Failed to get "{permission.label}" lock')
            for permission in self._unshared:
                if self._is_locked_by_another(USED_BASE + permission):
                    raise self._conflict(f'Failed to get shared "{permission.label}" lock')
        except OSError as error:
            self._unlock()
            hint = " (file.locking=off does without)" if error.errno in (errno.ENOLCK, errno.EINVAL) else ""
            raise BackendError(f"Could not lock '{self._path}': {error.strerror}{hint}") from None
        except BackendError:
            self._unlock()
            raise
        self.held = True

    def release(self) -> None:
        """Drop the locks: another process may take the image over."""
        if self.held:
            self._unlock()
            self.held = False

    def _bytes(self) -> Iterable[int]:
        yield from (USED_BASE + permission for permission in self._used)
        yield from (UNSHARED_BASE + permission for permission in self._unshared)

    def _set(self, kind: int, positions: Iterable[int]) -> None:
        for position in positions:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, position, 1, 0))

    def _unlock(self) -> None:
        self._set(fcntl.F_UNLCK, self._bytes())

    def _is_locked_by_another(self, position: int) -> bool:
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, position, 1, 0))
        return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK

    def _conflict(self, what: str) -> BackendError:
        return BackendError(f"{what}. Is another process using the image [{self._path}]?")
