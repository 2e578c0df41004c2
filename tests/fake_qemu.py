"""QEMU's monitor on a socketpair, and clients of ours in memory: for tests of the monitor facade."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from nvmove.vm.monitor.facade import Facade, QemuClient
from nvmove.vm.monitor.qmpserver import QmpSession, serve_stream
from nvmove.vm.monitor.stream import Pipe, Stream

VERSION = {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "fake"}
HELP = (
    "cont|c  -- resume emulation\ninfo [subcommand] -- show information\nstop|s  -- stop emulation\nsum addr -- sum\n"
)


class FakeQemu:
    """Answers each command from `answers` (a value, an exception: an error, or a coroutine function); logs all."""

    def __init__(self, connection: socket.socket) -> None:
        self.stream = Stream.of_socket(connection)
        self.requests: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {"qmp_capabilities": {}, "human-monitor-command": self._hmp}
        self.hmp_answers: dict[str, str] = {"help": HELP, "help info": "info name  -- the name\ninfo numa  -- nodes\n"}
        self.fds: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        self.send({"QMP": {"version": VERSION, "capabilities": ["oob"]}})
        pending = b""
        while data := await self.stream.read():
            while (fd := self.stream.take_fd()) is not None:
                self.fds.append(fd)
            *lines, pending = (pending + data).replace(b"}{", b"}\n{").split(b"\n")
            with contextlib.suppress(ValueError):
                json.loads(pending)
                lines, pending = [*lines, pending], b""
            for line in lines:
                if line.strip():
                    task = asyncio.create_task(self._answer(json.loads(line)))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: dict[str, Any]) -> None:
        self.requests.append(request)
        name = request.get("execute") or request["exec-oob"]
        answer = self.answers.get(name, KeyError)
        if callable(answer) and answer is not KeyError:
            answer = await answer(request.get("arguments", {}))
        if answer is KeyError:
            reply = {"error": {"class": "CommandNotFound", "desc": f"The command {name} has not been found"}}
        elif isinstance(answer, Exception):
            reply = {"error": {"class": "GenericError", "desc": str(answer)}}
        else:
            reply = {"return": answer}
        self.send({**reply, **({"id": request["id"]} if "id" in request else {})})

    async def _hmp(self, arguments: dict[str, Any]) -> str:
        line = arguments["command-line"]
        return self.hmp_answers.get(line, f"unknown command: '{line}'\r\n")

    def send(self, message: dict[str, Any]) -> None:
        self.stream.write(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: Any) -> None:
        self.send({"timestamp": {"seconds": 12, "microseconds": 34}, "event": name, "data": data})


@contextlib.asynccontextmanager
async def facade_on_fake() -> AsyncIterator[tuple[Facade, FakeQemu]]:
    """A facade connected to a fake QEMU; both end with the block."""
    ours, theirs = socket.socketpair()
    qemu = FakeQemu(theirs)
    serving = asyncio.create_task(qemu.run())
    client = QemuClient()
    await client.connect(ours)
    try:
        yield Facade(client), qemu
    finally:
        qemu.stream.close()
        await serving
        with contextlib.suppress(Exception):
            await client.disconnect()


class Terminal:
    """What a client sends and sees, in memory."""

    def __init__(self) -> None:
        self.output = bytearray()
        self._news = asyncio.Event()
        self.stream = Pipe(self._print)
        self.task: asyncio.Task[None] | None = None

    def _print(self, data: bytes) -> None:
        self.output += data
        self._news.set()

    def start(self, session: Callable[[], Awaitable[None]]) -> Terminal:
        self.task = asyncio.create_task(serve_stream(self.stream, session))
        return self

    async def until(self, text: bytes) -> bytes:
        """Wait until the output has `text`; take the output up to there."""
        async with asyncio.timeout(20):
            while text not in self.output:
                self._news.clear()
                await self._news.wait()
        end = self.output.index(text) + len(text)
        seen = bytes(self.output[:end])
        del self.output[:end]
        return seen

    async def talk(self, data: bytes, until: bytes = b"\r\n") -> bytes:
        self.stream.feed(data)
        return await self.until(until)

    async def end(self) -> None:
        self.stream.feed(b"")
        assert self.task is not None
        await asyncio.wait_for(self.task, 20)


async def qmp_terminal(facade: Facade, *, negotiate: bytes = b'{"execute":"qmp_capabilities"}\n') -> Terminal:
    """A QMP client that has read the greeting and, unless told not to, negotiated."""
    terminal = Terminal()
    terminal.start(QmpSession(facade, terminal.stream).run)
    await terminal.until(b"\r\n")
    if negotiate:
        assert await terminal.talk(negotiate) == b'{"return": {}}\r\n'
    return terminal
