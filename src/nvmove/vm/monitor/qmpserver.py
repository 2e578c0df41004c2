"""A QMP client of the user's: greeting, capabilities negotiation, commands in order, events."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

from nvmove.vm.monitor.facade import Event, Facade, QemuGone, QmpError
from nvmove.vm.monitor.qmpjson import ParseError, Reader, Value, encode
from nvmove.vm.monitor.stream import ByteStream

QUEUE_LENGTH = 8
"""Commands of one client that wait for their turn; then nothing more is read from it (as in QEMU)."""

TAKES_FD = frozenset({"getfd", "add-fd"})
"""Commands that use a descriptor sent along with them."""


class QmpSession:
    """One client from its connection to its end.

    States: negotiating (only `qmp_capabilities` is known, no events) → commands. In-band commands run one after the
    other; out-of-band ones, once the client has enabled them, at once.
    """

    def __init__(self, facade: Facade, stream: ByteStream, *, pretty: bool = False, oob: bool = True) -> None:
        self._facade = facade
        self._stream = stream
        self._pretty = pretty
        self._offers = [name for name in facade.qmp.capabilities if oob or name != "oob"]
        self._negotiated = False
        self._oob = False
        self._queue: asyncio.Queue[tuple[Value | ParseError, int | None] | None] = asyncio.Queue(QUEUE_LENGTH)
        self._reader = Reader()
        self._immediate: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the client or QEMU has gone. A command under way is finished in any case."""
        version = self._facade.qmp.version
        self._send({"QMP": {"version": version, "capabilities": self._offers}})
        worker = asyncio.create_task(self._work())
        reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait({worker, reading}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._facade.unsubscribe(self)
            reading.cancel()
            await asyncio.wait({reading})
            if not worker.done():
                await self._queue.put(None)
                await worker
            await asyncio.gather(*self._immediate, return_exceptions=True)
            while not self._queue.empty():  # QEMU has gone before they had their turn
                entry = self._queue.get_nowait()
                _close(None if entry is None else entry[1])

    async def _read(self) -> None:
        while data := await self._stream.read():
            for item in self._reader.feed(data):
                await self._take(item)

    async def _take(self, item: Value | ParseError) -> None:
        request = item.value if isinstance(item, Value) and isinstance(item.value, dict) else {}
        if self._oob and "exec-oob" in request:
            task = asyncio.create_task(self._answer(item))
            self._immediate.add(task)
            task.add_done_callback(self._immediate.discard)
            return
        # Taken now: a descriptor that comes with the next command replaces it.
        fd = self._stream.take_fd() if request.get("execute") in TAKES_FD else None
        try:
            await self._queue.put((item, fd))
        except asyncio.CancelledError:
            _close(fd)
            raise

    async def _work(self) -> None:
        with contextlib.suppress(QemuGone):
            while (entry := await self._queue.get()) is not None:
                item, fd = entry
                try:
                    await self._answer(item, fd)
                finally:
                    _close(fd)
                await self._stream.drain()

    async def _answer(self, item: Value | ParseError, fd: int | None = None) -> None:
        if isinstance(item, ParseError):
            self._send({"error": {"class": "GenericError", "desc": item.message}})
            return
        request = item.value
        identified = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        try:
            value = await self._execute(request, fd)
        except QmpError as error:
            self._send({**identified, "error": {"class": error.class_, "desc": error.desc}})
        else:
            self._send({"return": value, **identified})

    async def _execute(self, request: Any, fd: int | None) -> Any:
        name, arguments, oob = self._check(request)
        if not self._negotiated:
            return self._negotiate(name, arguments)
        if name == "qmp_capabilities" and not oob:
            raise QmpError("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
        return await self._facade.dispatch(name, arguments, oob=oob, fd=fd)

    def _check(self, request: Any) -> tuple[str, dict[str, Any] | None, bool]:
        """Return command, arguments and whether it is out-of-band; raise QEMU's own errors."""
        if not isinstance(request, dict):
            raise QmpError("GenericError", "QMP input must be a JSON object")
        command: str | None = None
        oob = False
        for member, value in request.items():
            if member == "execute" or (member == "exec-oob" and self._oob):
                if not isinstance(value, str):
                    raise QmpError("GenericError", f"QMP input member '{member}' must be a string")
                if command is not None:
                    raise QmpError("GenericError", "QMP input member 'execute' clashes with 'exec-oob'")
                command, oob = value, member == "exec-oob"
            elif member == "arguments":
                if not isinstance(value, dict):
                    raise QmpError("GenericError", "QMP input member 'arguments' must be an object")
            elif member != "id":
                raise QmpError("GenericError", f"QMP input member '{member}' is unexpected")
        if command is None:
            raise QmpError("GenericError", "QMP input lacks member 'execute'")
        return command, request.get("arguments"), oob

    def _negotiate(self, name: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        if name != "qmp_capabilities":
            raise QmpError("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        enable = (arguments or {}).get("enable", [])
        for argument in arguments or {}:
            if argument != "enable":
                raise QmpError("GenericError", f"Parameter '{argument}' is unexpected")
        if not isinstance(enable, list):
            raise QmpError("GenericError", "Invalid parameter type for 'enable', expected: array")
        for capability in enable:
            if not isinstance(capability, str):
                raise QmpError("GenericError", "Invalid parameter type for 'enable[0]', expected: string")
            if capability != "oob":
                raise QmpError("GenericError", f"Parameter 'null' does not accept value '{capability}'")
            if capability not in self._offers:
                raise QmpError("GenericError", "Capability 'oob' not available")
        self._oob = "oob" in enable
        self._negotiated = True
        self._facade.subscribe(self, self._event)
        return {}

    def _event(self, event: Event) -> None:
        self._send(event)

    def _send(self, message: dict[str, Any]) -> None:
        self._stream.write(encode(message, self._pretty))


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


async def serve_stream(stream: ByteStream, session: Callable[[], Awaitable[None]]) -> None:
    """Run a session to its end and close its stream; QEMU's end is an end like any other."""
    try:
        with contextlib.suppress(QemuGone):
            await session()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stream.drain(), 1)
    finally:
        stream.close()
