"""The guest's shell on its serial port: commands in, output and exit status out.

Every command is framed by two lines that no other command has, and that do not stand in the command line itself, so an
echo, a prompt, a kernel message before, or a late answer to an earlier command cannot be mistaken for the output.
"""

from __future__ import annotations

import re
import socket
import time
import uuid
from typing import NamedTuple

READY = "nvmove-guest: ready"
MAX_LINE = 4000  # Linux's line discipline keeps 4095 bytes of a line
_FATAL = re.compile(r"Kernel panic[^\r\n]*|---\[ end Kernel panic")


class GuestError(Exception):
    """The guest did not do what it was asked to, or said that it is broken."""


class Result(NamedTuple):
    """What a command printed (stdout and stderr) and its exit status."""

    output: str
    status: int


class Console:
    """The guest's end of a serial port, connected by a Unix socket; one caller at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._text = ""
        self.transcript: list[str] = []
        """All that the guest wrote, in the pieces it came in."""

    def read_until(self, pattern: str, timeout: float) -> tuple[str, re.Match[str]]:
        """Read until `pattern` (a regular expression) matches; return what came before it, and the match.

        `pattern` should begin with a literal: it is searched anew with every piece that comes.
        Raises TimeoutError, or GuestError when the guest panics or the port closes.
        """
        deadline = time.monotonic() + timeout
        regex = re.compile(pattern)
        while True:
            if match := regex.search(self._text):
                before = self._text[: match.start()]
                self._text = self._text[match.end() :]
                return before, match
            if fatal := _FATAL.search(self._text):
                raise GuestError(f"the guest's kernel died: {fatal[0]}; {self.tail()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the guest did not print {pattern!r} within {timeout:.0f} s; {self.tail()}")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(1 << 16)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise GuestError(f"the serial port closed; {self.tail()}")
            piece = data.decode(errors="replace")
            self.transcript.append(piece)
            self._text += piece.replace("\r", "")

    def tail(self, lines: int = 12) -> str:
        """Return the end of what the guest wrote, for a message."""
        last = "".join(self.transcript[-200:]).replace("\r", "").splitlines()[-lines:]
        return "it wrote last:\n  " + "\n  ".join(last) if last else "it wrote nothing"

    def send(self, text: str) -> None:
        """Type `text`; raise GuestError when the port is closed."""
        try:
            self._sock.sendall(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            raise GuestError("the serial port is closed") from None

    def wait_boot(self, timeout: float = 240) -> None:
        """Wait for the guest's shell after a boot; keep echo and kernel messages off the port (dmesg has them)."""
        self.read_until(re.escape(READY), timeout)
        self.read_until("guest# ", timeout)
        self.run("dmesg -n 1; stty -F /dev/ttyS0 -echo -onlcr")

    def run(self, command: str, timeout: float = 240) -> Result:
        """Run a shell command line; raise TimeoutError or GuestError."""
        key = uuid.uuid4().hex[:12]
        # The quotes keep the frame out of the echo of this very line. Newlines would end the line early: none here.
        line = f"echo B'':{key}; ({command}) </dev/null 2>&1; echo E'':{key}:$?:"
        if "\n" in command or len(line) > MAX_LINE:
            raise ValueError(f"a guest command must be one line of at most {MAX_LINE} bytes")
        self.send(line + "\n")
        self.read_until(f"B:{key}\n", timeout)
        output, match = self.read_until(rf"E:{key}:(\d+):\n", timeout)
        return Result(output.removesuffix("\n"), int(match[1]))

    def check(self, command: str, timeout: float = 240) -> str:
        """Run a shell command line and return its output; raise GuestError when its status is not 0."""
        output, status = self.run(command, timeout)
        if status:
            raise GuestError(f"{command!r} ended with status {status}: {output}")
        return output

    def close(self) -> None:
        """Unplug."""
        self._sock.close()
