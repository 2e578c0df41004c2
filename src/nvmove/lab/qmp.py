"""A small blocking QMP client: one thread, one socket, every wait with a limit."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class QmpError(Exception):
    """QEMU's answer was an error: its class and description."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error.get("desc", str(error)))
        self.error_class = error.get("class", "")


class QmpClosed(Exception):
    """The monitor hung up."""


def connect_unix(path: Path, timeout: float, alive: Callable[[], bool]) -> socket.socket:
    """Connect to a Unix socket that is about to appear; raise TimeoutError, or ConnectionError when `alive` ends."""
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if not alive():
                raise ConnectionError(f"the program ended before it listened on {path}") from None
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens on {path} after {timeout:.0f} s") from None
            time.sleep(0.02)
        else:
            return sock


class Qmp:
    """A QMP session, capabilities negotiated. Events that arrive are kept in `events`."""

    def __init__(self, sock: socket.socket, timeout: float = 60) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._id = 0
        self.events: deque[Event] = deque()
        self.greeting = self._receive(time.monotonic() + timeout)["QMP"]
        self.execute("qmp_capabilities", timeout=timeout)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer from the monitor in time")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            except TimeoutError:
                continue
            if not data:
                raise QmpClosed("the monitor hung up")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None, timeout: float = 300
    ) -> Any:
        """Run a QMP command, with a descriptor sent along, and return its value.

        Raises QmpError, QmpClosed or TimeoutError.
        """
        self._id += 1
        request: dict[str, Any] = {"execute": command, "id": self._id}
        if arguments is not None:
            request["arguments"] = arguments
        try:
            data = json.dumps(request).encode() + b"\n"
            if fd is None:
                self._sock.sendall(data)
            else:
                socket.send_fds(self._sock, [data], [fd])
        except (BrokenPipeError, ConnectionResetError):
            raise QmpClosed("the monitor hung up") from None
        deadline = time.monotonic() + timeout
        while True:
            message = self._receive(deadline)
            if "event" in message:
                self.events.append(message)
            elif message.get("id", self._id) == self._id:
                if "error" in message:
                    raise QmpError(message["error"])
                return message["return"]

    def hmp(self, line: str, *, timeout: float = 300) -> str:
        """Run an HMP command line and return what it printed; HMP's errors are part of that text."""
        text: str = self.execute("human-monitor-command", {"command-line": line}, timeout=timeout)
        return text.replace("\r\n", "\n")

    def wait_event(self, *names: str, timeout: float = 120) -> Event:
        """Return the first event (kept or to come) of one of these names, and drop those before it."""
        deadline = time.monotonic() + timeout
        while True:
            while self.events:
                event = self.events.popleft()
                if event["event"] in names:
                    return event
            message = self._receive(deadline)
            if "event" in message:
                self.events.append(message)

    def wait_closed(self, timeout: float = 60) -> None:
        """Wait until the monitor hangs up."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                message = self._receive(deadline)
                if "event" in message:
                    self.events.append(message)
        except QmpClosed:
            return

    @property
    def status(self) -> str:
        """The run state, as `query-status` gives it."""
        return str(self.execute("query-status")["status"])

    def close(self) -> None:
        """Hang up."""
        self._sock.close()
