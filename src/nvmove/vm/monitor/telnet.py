"""Telnet as QEMU's chardevs speak it (RFC 854): options announced once, commands of the client skipped."""

from __future__ import annotations

from collections.abc import Callable

from nvmove.vm.monitor.stream import ByteStream

IAC, DONT, DO, WONT, WILL, BREAK = 255, 254, 253, 252, 251, 243
BINARY, ECHO, SUPPRESS_GO_AHEAD = 0, 1, 3

# What QEMU 11.1.3 sends to a client that connects.
GREETING = bytes(
    (IAC, WILL, ECHO, IAC, WILL, SUPPRESS_GO_AHEAD, IAC, WILL, BINARY, IAC, DO, BINARY),
)


class TelnetDecoder:
    """Bytes in, the client's own bytes out. Sans-IO."""

    def __init__(self) -> None:
        self._command: bytes = b""
        self.breaks = 0
        """Breaks that were received."""

    def feed(self, data: bytes) -> bytes:
        """Take the telnet commands out of `data`, also ones that go on in the next piece."""
        if not self._command and IAC not in data:
            return data
        out = bytearray()
        for byte in data:
            if not self._command:
                if byte == IAC:
                    self._command = bytes([IAC])
                else:
                    out.append(byte)
            elif len(self._command) == 2:  # the option of DO, DONT, WILL, WONT
                self._command = b""
            elif byte in (DO, DONT, WILL, WONT):
                self._command += bytes([byte])
            else:
                self._command = b""
                if byte == IAC:
                    out.append(IAC)
                elif byte == BREAK:
                    self.breaks += 1
        return bytes(out)


class TelnetStream:
    """A `ByteStream` to a telnet client."""

    def __init__(self, inner: ByteStream) -> None:
        self._inner = inner
        self._decoder = TelnetDecoder()
        self.on_break: Callable[[], None] | None = None
        inner.write(GREETING)

    async def read(self) -> bytes:
        """See `ByteStream`."""
        while data := await self._inner.read():
            plain = self._decoder.feed(data)
            while self._decoder.breaks and self.on_break is not None:
                self._decoder.breaks -= 1
                self.on_break()
            if plain:
                return plain
        return b""

    def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        self._inner.write(data.replace(b"\xff", b"\xff\xff"))

    async def drain(self) -> None:
        """See `ByteStream`."""
        await self._inner.drain()

    def take_fd(self) -> int | None:
        """See `ByteStream`."""
        return self._inner.take_fd()

    def close(self) -> None:
        """See `ByteStream`."""
        self._inner.close()
