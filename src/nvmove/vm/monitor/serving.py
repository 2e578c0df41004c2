"""All of the user's monitors of one VM, from the sockets that must exist before QEMU starts to the terminal's reset."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from nvmove.errors import UserError
from nvmove.vm.line.endpoints import MonitorEndpoint, MonitorMode, MuxPort, StdioAddress
from nvmove.vm.monitor.chardev import Chardev, chardev
from nvmove.vm.monitor.facade import Facade
from nvmove.vm.monitor.hmp import HmpSession
from nvmove.vm.monitor.listener import BACKLOG
from nvmove.vm.monitor.mux import HmpParty, Mux, PortParty, QmpParty, terminal_input
from nvmove.vm.monitor.qmpserver import QmpSession, serve_stream
from nvmove.vm.monitor.stream import ByteStream, Stream
from nvmove.vm.monitor.telnet import TelnetStream

log = logging.getLogger(__name__)

CLOSE_SECONDS = 2
"""How long `close` waits for clients to take what they have not read yet."""


class Monitors:
    """The user's monitors. `open` before QEMU starts, `serve` when the facade is ready, `close` in the end."""

    def __init__(self, endpoints: Sequence[MonitorEndpoint]) -> None:
        self._served = [_Served(endpoint, chardev(endpoint)) for endpoint in endpoints]

    @property
    def uses_stdin(self) -> bool:
        """Whether a monitor reads nvmove's stdin, so that QEMU must not."""
        return any(isinstance(served.endpoint.address, StdioAddress) for served in self._served)

    async def open(self) -> None:
        """Listen, connect and open everything, the mux ports' sockets included. Raises UserError, all closed again."""
        try:
            if sum(isinstance(served.endpoint.address, StdioAddress) for served in self._served) > 1:
                raise UserError("cannot use stdio by multiple character devices")
            for served in self._served:
                await served.open()
        except UserError:
            await self.close()
            raise

    async def serve(self, facade: Facade) -> None:
        """Answer clients from now on. Returns when each endpoint with `wait` has had its first."""
        for served in self._served:
            served.start(facade)
        for served in self._served:
            await served.wait()

    async def close(self) -> None:
        """End all clients, after what they have still to read; remove sockets; give the terminal back."""
        await asyncio.gather(*(served.close() for served in self._served))


class _Served:
    """One endpoint, its clients and their tasks."""

    def __init__(self, endpoint: MonitorEndpoint, source: Chardev) -> None:
        self.endpoint = endpoint
        self._source = source
        self._ports: list[_PortListener] = []
        self._parties: list[PortParty] = []
        self._connected = asyncio.Event()
        self._streams: set[ByteStream] = set()
        self._sessions: set[asyncio.Task[None]] = set()
        self._accepting: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        for port in self.endpoint.mux:
            self._ports.append(_PortListener(port))
        await self._source.open()

    def start(self, facade: Facade) -> None:
        mux = bool(self.endpoint.mux or self.endpoint.monitors)
        serving = self._share(facade) if mux else self._accept(facade)
        self._accepting.append(asyncio.create_task(serving))

    async def wait(self) -> None:
        if not (self.endpoint.server and self.endpoint.wait) or self._connected.is_set():
            return
        sys.stderr.write(f"nvmove: info: QEMU waiting for connection on: {self._source.label}\n")
        sys.stderr.flush()
        await self._connected.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)
        return task

    async def _accept(self, facade: Facade) -> None:
        """Give each client a session of its own."""
        while (stream := await self._source.accept()) is not None:
            self._connected.set()
            task = self._spawn(self._session(facade, stream))
            if not self._source.many:
                await asyncio.wait({task})

    async def _session(self, facade: Facade, stream: ByteStream) -> None:
        self._streams.add(stream)
        try:
            if self.endpoint.mode is MonitorMode.CONTROL:
                session = QmpSession(facade, stream, pretty=self.endpoint.pretty).run
            else:
                session = HmpSession(facade, stream).run
            await serve_stream(stream, session)
        finally:
            self._streams.discard(stream)

    async def _share(self, facade: Facade) -> None:
        """Serve one client at a time, whose terminal all ports and monitors share."""
        current: list[ByteStream] = []

        def output(data: bytes) -> None:
            for stream in current:
                stream.write(data)

        async def drain() -> None:
            for stream in list(current):
                await stream.drain()

        mux = Mux(output, facade, self.endpoint.escape)
        monitors: list[HmpParty | QmpParty] = []
        for mode in (self.endpoint.mode, *self.endpoint.monitors):
            if mode is MonitorMode.READLINE:
                monitors.append(HmpParty(facade, mux))
            else:
                monitors.append(QmpParty(facade, mux, pretty=self.endpoint.pretty))
        mux.parties += monitors
        for listener in self._ports:
            port = PortParty(listener.port.id, facade)
            mux.parties.append(port)
            self._parties.append(port)
            self._accepting.append(asyncio.create_task(listener.serve(port, mux, drain)))
        started = False
        try:
            while (stream := await self._source.accept()) is not None:
                self._connected.set()
                current[:] = [stream]
                self._streams.add(stream)
                if not started:
                    mux.start(len(mux.parties) - 1)
                    started = True
                if isinstance(stream, TelnetStream):
                    stream.on_break = functools.partial(self._break, mux)
                await terminal_input(stream, mux)
                if not isinstance(self.endpoint.address, StdioAddress):  # whose output goes on when its input ends
                    current.clear()
                    self._streams.discard(stream)
                    stream.close()
        finally:
            for monitor in monitors:
                await monitor.close()

    def _break(self, mux: Mux) -> None:
        self._spawn(mux.send_break())

    async def close(self) -> None:
        self._source.close()
        for listener, port in zip(self._ports, self._parties, strict=False):
            listener.close()
            with contextlib.suppress(TimeoutError):  # what the guest wrote last
                await asyncio.wait_for(port.idle.wait(), CLOSE_SECONDS)
        for stream in list(self._streams):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stream.drain(), CLOSE_SECONDS)
            stream.close()
        tasks = {*self._accepting, *self._sessions}
        for task in self._accepting:
            task.cancel()
        if tasks:
            _done, left = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in left:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _PortListener:
    """The private socket that a guest's port connects to; there from before QEMU starts."""

    def __init__(self, port: MuxPort) -> None:
        self.port = port
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        try:
            self._listener.bind(os.fspath(port.socket))
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            raise UserError(f"Failed to bind socket to {port.socket}: {error.strerror or error}") from None

    async def serve(self, port: PortParty, mux: Mux, drain: Any) -> None:
        """Serve QEMU's connection, and another one after it."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _address = await loop.sock_accept(self._listener)
            await port.serve(Stream.of_socket(connection), mux, drain)

    def close(self) -> None:
        """Remove the socket; who is connected stays so."""
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self.port.socket)
