"""Which commands are ours: name → handler. All others are forwarded to QEMU."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvmove.vm.monitor import Facade

Handler = Callable[["Facade", dict[str, Any]], Awaitable[Any]]
"""A QMP command of ours: gets its arguments, returns the value of "return", raises QmpError."""

HmpHandler = Callable[["Facade", str, Callable[[str], None]], Awaitable[str]]
"""An HMP command of ours: gets the rest of the line and `out`, which prints at once; returns the rest of its output."""

# HMP's other names of commands (QEMU 11.1: `help`).
ALIASES = {"?": "help", "c": "cont", "p": "print", "q": "quit", "s": "stop"}


class Commands:
    """The tables of QMP and HMP handlers."""

    def __init__(self) -> None:
        self.qmp: dict[str, Handler] = {}
        self.hmp: dict[str, HmpHandler] = {}
        self.concurrent: set[str] = {"human-monitor-command", "quit"}
        """QMP handlers that need not wait for another one to finish."""

    def find_hmp(self, line: str) -> tuple[str, HmpHandler, str] | None:
        """Return name, handler and arguments of an HMP line that is ours; `info x` is found under "info x"."""
        words = line.strip().split(None, 1)
        if not words:
            return None
        name = ALIASES.get(words[0], words[0])
        rest = words[1] if len(words) > 1 else ""
        if name == "info" and rest:
            topic, _, rest = rest.partition(" ")
            name = f"info {topic}"
        handler = self.hmp.get(name)
        return None if handler is None else (name, handler, rest.strip())
