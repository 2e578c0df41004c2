"""Listening sockets as QEMU's addresses name them, Unix or TCP, and the connections that come.

Messages are QEMU's; what cannot be opened is a UserError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator

from nvmove.errors import UserError
from nvmove.vm.line.endpoints import Address, FdAddress, TcpAddress, UnixAddress

log = logging.getLogger(__name__)

BACKLOG = 128
"""Clients that connect at the same moment; on a Unix socket, one more would be told to try again."""
UNIX_PATH_MAX = 108
"""Bytes of sun_path (unix(7)), its final zero included."""


def unix_name(address: UnixAddress) -> str | bytes:
    """Return what to bind or connect to; raise UserError for a path that does not fit."""
    name = os.fsencode(address.path)
    if address.abstract:
        name = b"\0" + name
        return name if address.tight else name.ljust(UNIX_PATH_MAX, b"\0")
    if len(name) >= UNIX_PATH_MAX:
        raise UserError(f"UNIX socket path '{address.path}' is too long: it must be less than {UNIX_PATH_MAX} bytes")
    return address.path


async def resolve(address: TcpAddress, port: str, flags: int) -> list[tuple[int, tuple[str, int]]]:
    """Return the families and addresses of a host that were asked for; raise UserError."""
    family = socket.AF_UNSPEC
    if address.ipv4 and not address.ipv6:
        family = socket.AF_INET
    elif address.ipv6 and not address.ipv4:
        family = socket.AF_INET6
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host or None, port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except (socket.gaierror, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"address resolution failed for {address.host}:{port}: {reason}") from None
    wanted = {socket.AF_INET: address.ipv4 is not False, socket.AF_INET6: address.ipv6 is not False}
    return [(entry[0], entry[4]) for entry in found if wanted.get(entry[0])]  # type: ignore[misc]


def inherited(address: FdAddress) -> socket.socket:
    """Return a socket that nvmove was started with; raise UserError."""
    try:
        connection = socket.socket(fileno=address.fd)
    except OSError:
        raise UserError(f"File descriptor '{address.fd}' is not a socket") from None
    connection.set_inheritable(False)
    return connection


class Listener:
    """A listening socket, Unix or TCP. A stale Unix socket is replaced, as QEMU does; ours goes away at `close`."""

    def __init__(self, address: UnixAddress | TcpAddress | FdAddress) -> None:
        self._address = address
        self._listeners: list[socket.socket] = []
        self._bound: tuple[str, int] | None = None
        self._accepted: asyncio.Queue[socket.socket] = asyncio.Queue(1)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def name(self) -> tuple[str, int]:
        """The host and the port that it listens on; for TCP."""
        host, port = self._listeners[0].getsockname()[:2]
        return host, port

    async def open(self) -> None:
        """Listen; raise UserError."""
        address = self._address
        try:
            if isinstance(address, UnixAddress):
                self._listeners.append(self._bind_unix(address))
            elif isinstance(address, TcpAddress):
                await self._bind_tcp(address)
            else:
                self._listeners.append(inherited(address))
            for listener in self._listeners:
                listener.setblocking(False)
                listener.listen(BACKLOG)
        except OSError as error:
            self.close()
            raise UserError(f"Failed to listen on {plain(address)}: {error.strerror}") from None
        except UserError:
            self.close()
            raise
        self._tasks = [asyncio.create_task(self._listen(listener)) for listener in self._listeners]

    def _bind_unix(self, address: UnixAddress) -> socket.socket:
        name = unix_name(address)
        listener = socket.socket(socket.AF_UNIX)
        try:
            if not address.abstract:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(address.path)
            listener.bind(name)
        except OSError as error:
            listener.close()
            raise UserError(f"Failed to bind socket to {address.path}: {error.strerror}") from None
        if not address.abstract:
            status = os.stat(address.path)
            self._bound = (os.path.abspath(address.path), status.st_ino)
        return listener

    async def _bind_tcp(self, address: TcpAddress) -> None:
        """Listen on all addresses of the host, at the first port of the range that is free on all of them."""
        failure: OSError | None = None
        for port in _ports(address):
            try:
                for family, where in await resolve(address, port, socket.AI_PASSIVE):
                    chosen = self._listeners[0].getsockname()[1] if self._listeners else where[1]
                    self._listeners.append(_listen_tcp(family, (where[0], chosen, *where[2:])))
            except OSError as error:
                failure = error
                self._close_listeners()
                continue
            if self._listeners:
                return
        reason = failure.strerror if failure else "no address of the family that was asked for"
        raise UserError(f"Failed to find an available port: {reason}")

    async def _listen(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _address = await loop.sock_accept(listener)
            except OSError as error:  # EMFILE, ECONNABORTED: try again, but not at full speed
                log.warning("a client was not accepted: %s", error.strerror)
                await asyncio.sleep(0.2)
                continue
            try:
                await self._accepted.put(connection)
            except asyncio.CancelledError:
                connection.close()
                raise

    async def accept(self) -> socket.socket:
        """Wait for the next connection; it does not block."""
        return await self._accepted.get()

    def close(self) -> None:
        """Take no more connections, and leave nothing behind."""
        for task in self._tasks:
            task.cancel()
        self._close_listeners()
        while not self._accepted.empty():
            self._accepted.get_nowait().close()
        if self._bound is not None:
            path, inode = self._bound
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:  # else somebody has replaced it since
                    os.unlink(path)
            self._bound = None

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()


def plain(address: Address) -> str:
    """Return an address as messages show it."""
    match address:
        case UnixAddress():
            return f"'{address.path}'"
        case TcpAddress():
            return f"'{address.host}:{address.port}'"
        case _:
            return str(address)


def _ports(address: TcpAddress) -> Iterator[str]:
    yield address.port
    if address.to is not None and address.port.isdigit():
        yield from map(str, range(int(address.port) + 1, address.to + 1))


def _listen_tcp(family: int, where: tuple[str | int, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
