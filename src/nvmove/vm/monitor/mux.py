"""One terminal for several parties, as `mux=on`: the guest's ports and monitors; Ctrl-a commands choose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

from nvmove.vm.monitor.facade import Facade, QemuGone, QmpError
from nvmove.vm.monitor.hmp import HmpSession
from nvmove.vm.monitor.qmpserver import QmpSession, serve_stream
from nvmove.vm.monitor.stream import ByteStream, Pipe

log = logging.getLogger(__name__)

CTRL_A = 0x01

_COMMANDS = (
    ("h", "print this help"),
    ("x", "exit emulator"),
    ("s", "save disk data back to file (if -snapshot)"),
    ("t", "toggle console timestamps"),
    ("b", "send break (magic sysrq)"),
    ("c", "switch between console and monitor"),
)


def help_text(escape: int) -> bytes:
    """Return what the help command prints; QEMU's lines end in LF CR."""
    key = f"C-{chr(escape - 1 + ord('a'))}" if 1 <= escape < 27 else f"Escape-Char (0x{escape:02x})"
    lines = ["", *(f"{key} {command}    {what}" for command, what in _COMMANDS), f"{key} {key}  sends {key}", ""]
    return "\n\r".join(lines).encode()


class EscapeDecoder:
    """Input in; text for the focused party and commands out. Sans-IO."""

    def __init__(self, escape: int) -> None:
        self._escape = escape
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, str]]:
        """Yield text, then the command that follows it (empty: none), in order."""
        text = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == self._escape:
                    text.append(byte)
                else:
                    yield bytes(text), chr(byte)
                    text.clear()
            elif byte == self._escape:
                self._escaped = True
            else:
                text.append(byte)
        if text:
            yield bytes(text), ""


class Party(Protocol):
    """One of those that share the terminal."""

    async def feed(self, data: bytes) -> None:
        """Input, while it has the focus. Returns when what it shows of it has been shown."""

    def focus(self, gained: bool) -> None:
        """The focus has come, or is about to go."""

    async def send_break(self) -> None:
        """The user asks for a break."""


class Mux:
    """The terminal's side: focus, escape commands, timestamps."""

    def __init__(self, output: Callable[[bytes], None], facade: Facade, escape: int = CTRL_A) -> None:
        self._output = output
        self._facade = facade
        self._escape = escape
        self._decoder = EscapeDecoder(escape)
        self._focus = 0
        self._timestamps: float | None = None
        self._show_timestamps = False
        self._line_start = True
        self.parties: list[Party] = []

    def start(self, focus: int) -> None:
        """Give the focus to a party for the first time."""
        self._focus = focus
        self.parties[focus].focus(True)

    def write(self, data: bytes) -> None:
        """Print a party's output; all of them are seen, whoever has the focus."""
        if self._show_timestamps:
            data = self._stamp(data)
        elif data:
            self._line_start = data.endswith(b"\n")
        self._output(data)

    def _stamp(self, data: bytes) -> bytes:
        if self._timestamps is None:
            self._timestamps = time.monotonic()
        milliseconds = int((time.monotonic() - self._timestamps) * 1000)
        seconds = milliseconds // 1000
        stamp = f"[{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds % 1000:03d}] "
        out = bytearray()
        for line in data.splitlines(keepends=True) if b"\r" not in data.replace(b"\r\n", b"") else [data]:
            out += (stamp.encode() if self._line_start else b"") + line
            self._line_start = line.endswith(b"\n")
        return bytes(out)

    async def feed(self, data: bytes) -> None:
        """Take the terminal's input."""
        for text, command in self._decoder.feed(data):
            if text:
                await self.parties[self._focus].feed(text)
            if command:
                await self._command(command)

    async def _command(self, command: str) -> None:
        try:
            match command:
                case "h" | "?":
                    self._output(help_text(self._escape))
                case "x":
                    self._output(b"QEMU: Terminated\n\r")
                    await self._facade.dispatch("quit")
                case "s":
                    await self._facade.dispatch_hmp("commit all")
                case "t":
                    self._show_timestamps = not self._show_timestamps
                    self._timestamps = None
                    self._line_start = False
                case "b":
                    await self.parties[self._focus].send_break()
                case "c":
                    self.parties[self._focus].focus(False)
                    self._focus = (self._focus + 1) % len(self.parties)
                    self.parties[self._focus].focus(True)
        except QmpError as error:
            log.warning("QEMU refused what was asked with the escape character and '%s': %s", command, error.desc)

    async def send_break(self) -> None:
        """The terminal itself has sent a break (telnet)."""
        await self._command("b")


class PortParty:
    """A guest's port: QEMU's private chardev is connected to us."""

    def __init__(self, chardev: str, facade: Facade) -> None:
        self._chardev = chardev
        self._facade = facade
        self._stream: ByteStream | None = None
        self.idle = asyncio.Event()
        """QEMU is not connected."""
        self.idle.set()

    async def serve(self, stream: ByteStream, mux: Mux, drain: Callable[[], Awaitable[None]]) -> None:
        """Print what the guest writes until QEMU closes the port."""
        self._stream = stream
        self.idle.clear()
        try:
            while data := await stream.read():
                mux.write(data)
                await drain()
        finally:
            self._stream = None
            self.idle.set()
            stream.close()

    async def feed(self, data: bytes) -> None:
        """See `Party`. With no QEMU at the other end, input is lost, as on a port nobody opened."""
        if self._stream is not None:
            self._stream.write(data)

    def focus(self, gained: bool) -> None:
        """See `Party`: a port does not care."""

    async def send_break(self) -> None:
        """See `Party`."""
        await self._facade.execute("chardev-send-break", {"id": self._chardev})


class HmpParty:
    """A monitor that prints only while it has the focus; what it has to say meanwhile is kept."""

    def __init__(self, facade: Facade, mux: Mux) -> None:
        self._mux = mux
        self._focused = False
        self._kept = bytearray()
        self._pipe = Pipe(self._write)
        self._session = HmpSession(facade, self._pipe)
        self._session.quiet = True
        self._task: asyncio.Task[None] | None = None

    def _write(self, data: bytes) -> None:
        if self._focused:
            self._mux.write(data)
        else:
            self._kept += data

    async def feed(self, data: bytes) -> None:
        """See `Party`."""
        self._pipe.feed(data)
        while not (self._pipe.starving or self._session.executing or self._task is None or self._task.done()):
            await asyncio.sleep(0)

    def focus(self, gained: bool) -> None:
        """See `Party`: the banner the first time, and a new prompt each time."""
        if not gained:
            self._write(b"\r\n")
            self._session.quiet = True
            self._focused = False
            return
        self._focused = True
        self._session.quiet = False
        if self._task is None:
            self._task = asyncio.create_task(serve_stream(self._pipe, self._session.run))
            return
        kept, self._kept = bytes(self._kept), bytearray()
        self._write(kept)
        self._session.prompt()

    async def send_break(self) -> None:
        """See `Party`: means nothing to a monitor."""

    async def close(self) -> None:
        """End the session."""
        self._pipe.close()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=1)


class QmpParty:
    """A QMP monitor on a shared terminal: its output is always seen, and out-of-band commands are not offered."""

    def __init__(self, facade: Facade, mux: Mux, *, pretty: bool) -> None:
        self._pipe = Pipe(mux.write)
        session = QmpSession(facade, self._pipe, pretty=pretty, oob=False)
        self._task = asyncio.create_task(serve_stream(self._pipe, session.run))

    async def feed(self, data: bytes) -> None:
        """See `Party`."""
        self._pipe.feed(data)

    def focus(self, gained: bool) -> None:
        """See `Party`."""

    async def send_break(self) -> None:
        """See `Party`."""

    async def close(self) -> None:
        """End the session."""
        self._pipe.close()
        await asyncio.wait({self._task}, timeout=1)


async def terminal_input(stream: ByteStream, mux: Mux) -> None:
    """Feed what the terminal sends until it has gone, or QEMU has."""
    with contextlib.suppress(QemuGone):
        while data := await stream.read():
            await mux.feed(data)
