"""A byte stream to one client on any file descriptor, for asyncio: with received file descriptors, and never blocking.

asyncio's own streams lose descriptors sent by SCM_RIGHTS, and know no terminals.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Protocol

READ_SIZE = 64 << 10
MAX_FDS = 16
"""Descriptors one message may bring, as in QEMU's chardevs."""
MAX_UNREAD = 64 << 20
"""Bytes kept for a client that does not read; then it is dropped."""


class ByteStream(Protocol):
    """What a monitor session talks to."""

    async def read(self) -> bytes:
        """Return the next bytes; empty at the end."""

    def write(self, data: bytes) -> None:
        """Send, without waiting; after the client has gone, nothing happens."""

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written, or has gone."""

    def take_fd(self) -> int | None:
        """Return a descriptor that the client has sent; it is the caller's. Others that came with it are closed."""

    def close(self) -> None:
        """End it. What was not sent by then is lost."""


class Stream:
    """A `ByteStream` over descriptors, which it takes over: one for both ways, or one for each."""

    def __init__(
        self,
        read_fd: int | None,
        write_fd: int | None,
        connection: socket.socket | None = None,
        *,
        poll_first: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._socket = connection
        self._received: collections.deque[int] = collections.deque()
        self._unsent = bytearray()
        self._writing = False
        self._wait: asyncio.Future[None] | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._closed = asyncio.Event()
        self._poll_first = poll_first

    @classmethod
    def of_socket(cls, connection: socket.socket) -> Stream:
        """Take a connected socket over."""
        connection.setblocking(False)
        return cls(connection.fileno(), connection.fileno(), connection)

    @property
    def closed(self) -> bool:
        """Whether it has ended on this side."""
        return self._closed.is_set()

    async def wait_closed(self) -> None:
        """Wait for `close`, or for the client to be found gone by a write."""
        await self._closed.wait()

    # Reading

    async def read(self) -> bytes:
        """See `ByteStream`."""
        while not self._closed.is_set():
            if self._read_fd is None:
                await self._closed.wait()
                break
            try:
                if self._poll_first:  # a descriptor that blocks
                    await self._readable()
                return self._receive()
            except BlockingIOError:
                await self._readable()
            except OSError:
                break  # ECONNRESET; EIO of a terminal that was hung up
        return b""

    def _receive(self) -> bytes:
        assert self._read_fd is not None
        if self._socket is None:
            return os.read(self._read_fd, READ_SIZE)
        if self._socket.family != socket.AF_UNIX:
            return self._socket.recv(READ_SIZE)
        data, fds, _flags, _address = socket.recv_fds(self._socket, READ_SIZE, MAX_FDS)
        if fds:
            self._drop_fds()
            self._received.extend(fds)
            for fd in fds:
                os.set_inheritable(fd, False)
        return data

    async def _readable(self) -> None:
        assert self._read_fd is not None
        self._wait = self._loop.create_future()
        try:
            self._loop.add_reader(self._read_fd, self._wake)
        except PermissionError:  # a plain file, or /dev/null: always readable
            return
        try:
            await self._wait
        finally:
            if not self._closed.is_set():
                self._loop.remove_reader(self._read_fd)
            self._wait = None

    def _wake(self) -> None:
        if self._wait is not None and not self._wait.done():
            self._wait.set_result(None)

    def take_fd(self) -> int | None:
        """See `ByteStream`."""
        if not self._received:
            return None
        fd = self._received.popleft()
        self._drop_fds()
        return fd

    def _drop_fds(self) -> None:
        while self._received:
            os.close(self._received.popleft())

    # Writing

    def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        if self._closed.is_set() or self._write_fd is None:
            return
        self._unsent += data
        if not self._writing:
            self._flush()
        if len(self._unsent) > MAX_UNREAD:
            self.close()

    def _flush(self) -> None:
        assert self._write_fd is not None
        try:
            while self._unsent:
                view = memoryview(self._unsent)
                try:
                    sent = os.write(self._write_fd, view[: 1 << 20])
                finally:
                    view.release()
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:  # EPIPE, ECONNRESET, EIO: the client has gone
            self.close()
            return
        if self._unsent and not self._writing:
            self._loop.add_writer(self._write_fd, self._flush)
            self._writing = True
            self._drained.clear()
        elif not self._unsent and self._writing:
            self._loop.remove_writer(self._write_fd)
            self._writing = False
            self._drained.set()

    async def drain(self) -> None:
        """See `ByteStream`."""
        await self._drained.wait()

    def close(self) -> None:
        """See `ByteStream`."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._drained.set()
        self._unsent.clear()
        self._drop_fds()
        for fd, remove in ((self._read_fd, self._loop.remove_reader), (self._write_fd, self._loop.remove_writer)):
            if fd is not None and not self._loop.is_closed():
                remove(fd)
        self._wake()
        if self._socket is not None:
            self._socket.close()
            return
        for fd in {self._read_fd, self._write_fd} - {None}:
            with contextlib.suppress(OSError):
                os.close(fd or 0)


class Pipe:
    """A `ByteStream` in memory: one side of a multiplexed transport; also what tests talk through."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._ended = False
        self.starving = False
        """All input was taken, and more is waited for."""

    def feed(self, data: bytes) -> None:
        """Make `data` what `read` returns next; empty ends the stream."""
        self.starving = False
        self._input.put_nowait(data)

    async def read(self) -> bytes:
        """See `ByteStream`."""
        if self._ended:
            return b""
        self.starving = self._input.empty()
        data = await self._input.get()
        self._ended = not data
        return data

    def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        if not self._ended:
            self._output(data)

    async def drain(self) -> None:
        """See `ByteStream`."""

    def take_fd(self) -> int | None:
        """See `ByteStream`: nothing brings descriptors here."""
        return None

    def close(self) -> None:
        """See `ByteStream`."""
        self.feed(b"")
