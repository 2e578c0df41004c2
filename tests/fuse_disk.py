"""A file whose reads wait in the kernel as long as a test wants: of FUSE's, served from here and mounted nowhere."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

# include/uapi/linux/fuse.h, mount.h; syscall numbers are the same on all of Linux's machines
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_SET_STRING, _CREATE = 1, 6
_FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT = 2, 3, 14, 15, 18, 20, 25, 26, 36
_DESTROY, _BATCH_FORGET = 38, 42
_UNANSWERED = frozenset({_FORGET, _INTERRUPT, _BATCH_FORGET})
_EMPTY = frozenset({_RELEASE, _FSYNC, _FLUSH, _DESTROY})
_ASYNC_READ = 1
_HEADER = struct.Struct("=IIQQIIIHH")
_BUFFER = 1 << 18


class FuseDisk:
    """A read-only file with `data` in it. While `muted` is set, reads arrive and are not answered."""

    def __init__(self, data: bytes) -> None:
        """Raises OSError when FUSE cannot be had."""
        self.muted = threading.Event()
        self.held_at: list[int] = []
        """Where reads began that arrived while `muted` was set, in bytes."""
        self._data = data
        self._held: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mount = _mount(self._fd)
        except OSError:
            os.close(self._fd)
            raise
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve, name="fuse", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """Where this process opens the file."""
        return Path(f"/proc/self/fd/{self._mount}")

    def release(self) -> None:
        """Answer what waits and what comes."""
        self.muted.clear()
        with self._lock:
            held, self._held = self._held, []
        for unique, answer in held:
            self._answer(unique, answer)

    def close(self) -> None:
        """End it; what still waits for an answer gets an error."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for fd in (self._mount, self._fd, self._stop):
            os.close(fd)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while not any(fd == self._stop for fd, _ in poll.poll()):
            try:
                request = os.read(self._fd, _BUFFER)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno == errno.ENOENT:  # the one that asked has given up
                    continue
                raise
            self._do(request)

    def _do(self, request: bytes) -> None:
        _, code, unique, *_ = _HEADER.unpack_from(request)
        body = request[_HEADER.size :]
        if code in _UNANSWERED:
            return
        if code == _READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            answer = self._data[offset : offset + size]
            with self._lock:
                if self.muted.is_set():
                    self._held.append((unique, answer))
                    self.held_at.append(offset)
                    return
            self._answer(unique, answer)
        elif code == _INIT:
            major, minor, ahead = struct.unpack_from("=III", body)
            self._answer(
                unique, struct.pack("=IIIIHHIIHH32x", major, min(minor, 31), ahead, _ASYNC_READ, 0, 0, 1 << 16, 1, 0, 0)
            )
        elif code == _GETATTR:
            self._answer(unique, struct.pack("=QII", 3600, 0, 0) + self._attributes())
        elif code == _OPEN:
            self._answer(unique, struct.pack("=QII", 1, 0, 0))
        elif code in _EMPTY:
            self._answer(unique, b"")
        else:
            self._answer(unique, b"", errno.ENOSYS)

    def _attributes(self) -> bytes:
        size = len(self._data)
        return struct.pack("=6Q3I7I", 1, size, size // 512, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0)

    def _answer(self, unique: int, payload: bytes, error: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):  # the one that asked has given up
            os.write(self._fd, struct.pack("=IiQ", 16 + len(payload), -error, unique) + payload)


def _mount(fd: int) -> int:
    """Mount what is served at `fd`, nowhere, its root a regular file; return the descriptor of that. Raises OSError."""
    context = _call(_FSOPEN, b"fuse", 1)
    try:
        mode = oct(stat.S_IFREG | 0o600)[2:]
        for key, value in (("fd", str(fd)), ("rootmode", mode), ("user_id", "0"), ("group_id", "0")):
            _call(_FSCONFIG, context, _SET_STRING, key.encode(), value.encode(), 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextlib.contextmanager
def fuse_disk(data: bytes) -> Iterator[FuseDisk]:
    """Serve a file while the block runs."""
    try:
        disk = FuseDisk(data)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"FUSE cannot be had: {error}")
    try:
        yield disk
    finally:
        disk.close()
