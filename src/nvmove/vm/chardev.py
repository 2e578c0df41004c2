"""Where the user's monitors listen or connect: an endpoint's address becomes a source of clients.

Messages are QEMU's; what cannot be opened is a UserError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Protocol

from nvmove.errors import UserError
from nvmove.vm.endpoints import (
    Address,
    FdAddress,
    FileAddress,
    MonitorEndpoint,
    PipeAddress,
    PtyAddress,
    StdioAddress,
    TcpAddress,
    UnixAddress,
)
from nvmove.vm.stream import ByteStream, Stream
from nvmove.vm.telnet import TelnetStream
from nvmove.vm.terminal import Files, PseudoTerminal, Stdio

log = logging.getLogger(__name__)

BACKLOG = 128
"""Clients that connect at the same moment; on a Unix socket, one more would be told to try again."""
UNIX_PATH_MAX = 108
"""Bytes of sun_path (unix(7)), its final zero included."""


class Chardev(Protocol):
    """A source of clients."""

    @property
    def many(self) -> bool:
        """Whether several clients may be connected at once."""

    @property
    def label(self) -> str:
        """How QEMU names it while nobody is connected."""

    async def open(self) -> None:
        """Listen or connect; raise UserError."""

    async def accept(self) -> ByteStream | None:
        """Wait for the next client; None: there will be none."""

    def close(self) -> None:
        """Take no more clients, and leave nothing behind."""


def chardev(endpoint: MonitorEndpoint) -> Chardev:
    """Return the chardev of an endpoint, not open yet."""
    address = endpoint.address
    match address:
        case StdioAddress():
            return Stdio(address.signal)
        case PtyAddress():
            return PseudoTerminal(endpoint.id, address.link)
        case FileAddress():
            return Files(address.path, address.input_path, append=address.append)
        case PipeAddress():
            return Files.pipe(address.path)
        case UnixAddress() | TcpAddress() | FdAddress():
            return SocketServer(endpoint) if endpoint.server else SocketClient(endpoint)


def unix_name(address: UnixAddress) -> str | bytes:
    """Return what to bind or connect to; raise UserError for a path that does not fit."""
    name = os.fsencode(address.path)
    if address.abstract:
        name = b"\0" + name
        return name if address.tight else name.ljust(UNIX_PATH_MAX, b"\0")
    if len(name) >= UNIX_PATH_MAX:
        raise UserError(f"UNIX socket path '{address.path}' is too long: it must be less than {UNIX_PATH_MAX} bytes")
    return address.path


async def _resolve(address: TcpAddress, port: str, flags: int) -> list[tuple[int, tuple[str, int]]]:
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


def _connected(connection: socket.socket, endpoint: MonitorEndpoint) -> ByteStream:
    if connection.family != socket.AF_UNIX and getattr(endpoint.address, "nodelay", False):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = Stream.of_socket(connection)
    return TelnetStream(stream) if endpoint.telnet else stream


def _inherited(address: FdAddress) -> socket.socket:
    try:
        connection = socket.socket(fileno=address.fd)
    except OSError:
        raise UserError(f"File descriptor '{address.fd}' is not a socket") from None
    connection.set_inheritable(False)
    return connection


class SocketServer:
    """A listening socket, Unix or TCP. A stale Unix socket is replaced, as QEMU does; ours goes away at `close`."""

    many = True

    def __init__(self, endpoint: MonitorEndpoint) -> None:
        self._endpoint = endpoint
        self._listeners: list[socket.socket] = []
        self._bound: tuple[str, int] | None = None
        self._accepted: asyncio.Queue[socket.socket] = asyncio.Queue(1)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def label(self) -> str:
        """See `Chardev`."""
        address = self._endpoint.address
        kind = "telnet" if self._endpoint.telnet else "tcp"
        if isinstance(address, UnixAddress):
            where = f"unix:{address.path}"
        elif isinstance(address, FdAddress):
            where = f"{kind}:fd={address.fd}"
        else:
            host, port = self._listeners[0].getsockname()[:2]
            where = f"{kind}:{f'[{host}]' if ':' in host else host}:{port}"
        return f"disconnected:{where},server=on"

    async def open(self) -> None:
        """See `Chardev`."""
        address = self._endpoint.address
        try:
            if isinstance(address, UnixAddress):
                self._listeners.append(self._bind_unix(address))
            elif isinstance(address, TcpAddress):
                await self._bind_tcp(address)
            else:
                assert isinstance(address, FdAddress)
                self._listeners.append(_inherited(address))
            for listener in self._listeners:
                listener.setblocking(False)
                listener.listen(BACKLOG)
        except OSError as error:
            self.close()
            raise UserError(f"Failed to listen on {_plain(address)}: {error.strerror}") from None
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
                for family, where in await _resolve(address, port, socket.AI_PASSIVE):
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
                log.warning("a monitor's client was not accepted: %s", error.strerror)
                await asyncio.sleep(0.2)
                continue
            await self._accepted.put(connection)

    async def accept(self) -> ByteStream | None:
        """See `Chardev`."""
        return _connected(await self._accepted.get(), self._endpoint)

    def close(self) -> None:
        """See `Chardev`."""
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


def _plain(address: Address) -> str:
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


class SocketClient:
    """A socket that nvmove connects; again after its end when the endpoint says so."""

    many = False

    def __init__(self, endpoint: MonitorEndpoint) -> None:
        self._endpoint = endpoint
        self._first: socket.socket | None = None
        self._connected_once = False

    @property
    def label(self) -> str:
        """See `Chardev`."""
        return f"disconnected:{_plain(self._endpoint.address)}"

    async def open(self) -> None:
        """See `Chardev`. With `reconnect`, a peer that is not there yet is no error."""
        try:
            self._first = await self._connect()
        except UserError as error:
            if not self._endpoint.reconnect_ms or isinstance(self._endpoint.address, FdAddress):
                raise
            log.warning("Unable to connect character device %s: %s", self._endpoint.id, error)

    async def _connect(self) -> socket.socket:
        address = self._endpoint.address
        loop = asyncio.get_running_loop()
        if isinstance(address, FdAddress):
            return _inherited(address)
        targets: list[tuple[int, str | bytes | tuple[str, int]]]
        if isinstance(address, UnixAddress):
            targets = [(socket.AF_UNIX, unix_name(address))]
        else:
            assert isinstance(address, TcpAddress)
            targets = list(await _resolve(address, address.port, 0))
        reason = "no address of the family that was asked for"
        for family, where in targets:
            connection = socket.socket(family, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, where)
            except OSError as error:
                connection.close()
                reason = os.strerror(error.errno) if error.errno else str(error)
            except asyncio.CancelledError:
                connection.close()
                raise
            else:
                return connection
        raise UserError(f"Failed to connect to {_plain(address)}: {reason}")

    async def accept(self) -> ByteStream | None:
        """See `Chardev`."""
        connection, self._first = self._first, None
        if connection is None:
            if not self._endpoint.reconnect_ms or isinstance(self._endpoint.address, FdAddress):
                return None
            connection = await self._reconnect()
        return _connected(connection, self._endpoint)

    async def _reconnect(self) -> socket.socket:
        while True:
            await asyncio.sleep(self._endpoint.reconnect_ms / 1000)
            with contextlib.suppress(UserError):
                return await self._connect()

    def close(self) -> None:
        """See `Chardev`."""
        if self._first is not None:
            self._first.close()
