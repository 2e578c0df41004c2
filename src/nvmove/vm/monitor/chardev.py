"""Where the user's monitors listen or connect: an endpoint's address becomes a source of clients.

Messages are QEMU's; what cannot be opened is a UserError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import Protocol

from nvmove.errors import UserError
from nvmove.vm.line.endpoints import (
    FdAddress,
    FileAddress,
    MonitorEndpoint,
    PipeAddress,
    PtyAddress,
    StdioAddress,
    TcpAddress,
    UnixAddress,
)
from nvmove.vm.monitor.listener import Listener, inherited, plain, resolve, unix_name
from nvmove.vm.monitor.stream import ByteStream, Stream
from nvmove.vm.monitor.telnet import TelnetStream
from nvmove.vm.monitor.terminal import Files, PseudoTerminal, Stdio

log = logging.getLogger(__name__)


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


def _connected(connection: socket.socket, endpoint: MonitorEndpoint) -> ByteStream:
    if connection.family != socket.AF_UNIX and getattr(endpoint.address, "nodelay", False):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = Stream.of_socket(connection)
    return TelnetStream(stream) if endpoint.telnet else stream


class SocketServer:
    """A listening socket for monitors."""

    many = True

    def __init__(self, endpoint: MonitorEndpoint) -> None:
        address = endpoint.address
        assert isinstance(address, UnixAddress | TcpAddress | FdAddress)
        self._endpoint = endpoint
        self._listener = Listener(address)

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
            host, port = self._listener.name
            where = f"{kind}:{f'[{host}]' if ':' in host else host}:{port}"
        return f"disconnected:{where},server=on"

    async def open(self) -> None:
        """See `Chardev`."""
        await self._listener.open()

    async def accept(self) -> ByteStream | None:
        """See `Chardev`."""
        return _connected(await self._listener.accept(), self._endpoint)

    def close(self) -> None:
        """See `Chardev`."""
        self._listener.close()


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
        return f"disconnected:{plain(self._endpoint.address)}"

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
            return inherited(address)
        targets: list[tuple[int, str | bytes | tuple[str, int]]]
        if isinstance(address, UnixAddress):
            targets = [(socket.AF_UNIX, unix_name(address))]
        else:
            assert isinstance(address, TcpAddress)
            targets = list(await resolve(address, address.port, 0))
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
        raise UserError(f"Failed to connect to {plain(address)}: {reason}")

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
