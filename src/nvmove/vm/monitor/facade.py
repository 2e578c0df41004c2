"""The monitor facade: one connection to QEMU's own monitor, shared by all of the user's clients.

A command is ours (`Facade.handlers`, `Facade.hmp_handlers`) or goes to QEMU as it is. Events come from QEMU, pass the
filters, and go to every client; `emit` adds one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, StateError
from qemu.qmp.qmp_client import BadReplyError

log = logging.getLogger(__name__)

Event = dict[str, Any]
EventFilter = Callable[[Event], Iterable[Event]]
"""Gets an event and returns what clients see instead: itself, changed ones, more, or nothing."""

READ_LIMIT = 256 << 20
"""Bytes of one reply line; the longest known is some MiB (an HMP dump)."""


class QmpError(Exception):
    """A command failed, as QMP says it: error class and description."""

    def __init__(self, class_: str, desc: str) -> None:
        super().__init__(desc)
        self.class_ = class_
        self.desc = desc


class QemuGone(Exception):
    """The connection to QEMU ended: it has quit, or died."""


class Monitor(Protocol):
    """QEMU's monitor, for whoever runs its commands only."""

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a QMP command of QEMU's."""


class QemuClient(QMPClient):
    """QMPClient with what a facade needs besides: events in order with replies, file descriptors in order."""

    def __init__(self, name: str = "nvmove") -> None:
        super().__init__(name, READ_LIMIT)
        self._fd_lock = asyncio.Lock()

    def listen_sync(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` for each event, before any reply that QEMU sent after it is seen.

        The default listener, which would keep every event for ever, keeps none from now on.
        """

        def deliver(event: Message) -> bool:
            callback(dict(event))
            return False

        self.events.event_filter = deliver
        for event in self.events.clear():
            callback(dict(event))

    @property
    def version(self) -> Mapping[str, object]:
        """The greeting's version member."""
        assert self.greeting is not None
        return self.greeting.QMP.version

    @property
    def capabilities(self) -> Sequence[object]:
        """The greeting's capabilities member."""
        assert self.greeting is not None
        return self.greeting.QMP.capabilities

    async def execute_with_fd(self, cmd: str, arguments: Mapping[str, object] | None, fd: int) -> object:
        """Run a command that takes a file descriptor, which stays the caller's.

        The descriptor travels with a byte of its own, so it must not get into the middle of a message.
        """
        async with self._fd_lock:
            while self._writer is not None and self._writer.transport.get_write_buffer_size():
                await asyncio.sleep(0.005)
            self.send_fd_scm(fd)
            return await self.execute(cmd, arguments)


Handler = Callable[["Facade", dict[str, Any]], Awaitable[Any]]
"""A QMP command of ours: gets its arguments, returns the value of "return", raises QmpError."""

HmpHandler = Callable[["Facade", str, Callable[[str], None]], Awaitable[str]]
"""An HMP command of ours: gets the rest of the line and `out`, which prints at once; returns the rest of its output."""

# HMP's other names of commands (QEMU 11.1: `help`).
ALIASES = {"?": "help", "c": "cont", "p": "print", "q": "quit", "s": "stop"}


class Commands:
    """Which commands are ours: the tables of QMP and HMP handlers. All others are forwarded to QEMU."""

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


# Which acquisition of the facade's handler lock the current task runs under.
_holder: contextvars.ContextVar[object | None] = contextvars.ContextVar("nvmove_handler", default=None)
# Whether the current task runs an HMP command for a terminal.
_on_terminal: contextvars.ContextVar[bool] = contextvars.ContextVar("nvmove_on_terminal", default=False)


class Facade:
    """All of the user's monitors, and ours, in front of one QEMU."""

    def __init__(self, qmp: QemuClient) -> None:
        self.qmp = qmp
        self.commands = Commands()
        self.handlers = self.commands.qmp
        self.hmp_handlers = self.commands.hmp
        self.filters: list[EventFilter] = []
        self._listeners: list[tuple[str | None, Callable[[Event], None]]] = []
        self._clients: dict[object, Callable[[Event], None]] = {}
        self.fd_watchers: list[Callable[[str, Mapping[str, Any], int], None]] = []
        """Called with each command that passes a descriptor on to QEMU, before it does."""
        self._lock = asyncio.Lock()
        self._owner: object | None = None
        self.handlers["human-monitor-command"] = _human_monitor_command
        qmp.listen_sync(self._on_qemu_event)

    # Commands

    async def execute(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, oob: bool = False, fd: int | None = None
    ) -> Any:
        """Run `name` in QEMU, ours or not, and return its value. Raises QmpError, QemuGone. `fd` stays the caller's."""
        try:
            if fd is not None:
                return await self.qmp.execute_with_fd(name, arguments, fd)
            return await self.qmp.execute(name, arguments, oob)
        except ExecuteError as error:
            raise QmpError(error.error.error.class_, error.error.error.desc) from None
        except (ExecInterruptedError, BadReplyError, StateError, ConnectError, OSError, EOFError) as error:
            raise QemuGone("the connection to QEMU is closed") from error

    async def dispatch(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, oob: bool = False, fd: int | None = None
    ) -> Any:
        """Run `name` as a client of the user's means it: our handler, else QEMU. Raises as `execute` does."""
        handler = self.handlers.get(name)
        if fd is not None:
            for watch in self.fd_watchers:
                watch(name, arguments or {}, fd)
        if handler is None or oob:
            return await self.execute(name, arguments, oob=oob, fd=fd)
        async with self._turn(name):
            return await handler(self, dict(arguments or {}))

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a handler's turn; what it did not foresee is an error to the client and a log line."""
        try:
            if name in self.commands.concurrent:
                yield
            else:
                async with self.exclusive():
                    yield
        except (QmpError, QemuGone):
            raise
        except Exception as error:
            log.exception("command %s failed", name)
            raise QmpError("GenericError", f"nvmove: internal error in '{name}': {error}") from error

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock under which our handlers run one at a time; a handler's own calls hold it already."""
        mine = _holder.get()
        if mine is not None and mine is self._owner:
            yield
            return
        async with self._lock:
            self._owner = object()
            token = _holder.set(self._owner)
            try:
                yield
            finally:
                _holder.reset(token)
                self._owner = None

    async def hmp(self, line: str, cpu_index: int | None = None) -> str:
        """Run an HMP line in QEMU, ours or not, and return what it prints."""
        arguments: dict[str, Any] = {"command-line": line}
        if cpu_index is not None:
            arguments["cpu-index"] = cpu_index
        return cast(str, await self.execute("human-monitor-command", arguments))

    @property
    def is_on_terminal(self) -> bool:
        """Whether the HMP handler that asks prints to a terminal, line by line; not to a QMP client, all at once."""
        return _on_terminal.get()

    async def dispatch_hmp(
        self, line: str, cpu_index: int | None = None, out: Callable[[str], None] | None = None
    ) -> str:
        """Run an HMP line as the user means it; return what is left to print after what `out` has printed."""
        found = self.commands.find_hmp(line)
        if found is None:
            return await self.hmp(line, cpu_index)
        name, handler, rest = found
        printed: list[str] = []
        token = _on_terminal.set(out is not None)
        try:
            async with self._turn(name):
                last = await handler(self, rest, out or printed.append)
        except QmpError as error:
            last = f"Error: {error.desc}\n"
        finally:
            _on_terminal.reset(token)
        return "".join(printed) + last

    # Events

    def on_event(self, name: str | None, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with each event `name` (None: all) that QEMU sends, before filters; returns what ends it."""
        entry = (name, callback)
        self._listeners.append(entry)
        return lambda: self._listeners.remove(entry)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Send an event of ours to the clients, past the filters; it gets a timestamp when it has none."""
        now = time.time_ns()
        stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
        self._broadcast({"timestamp": stamp, **event})

    def subscribe(self, client: object, callback: Callable[[Event], None]) -> None:
        """Send events to a client from now on; `callback` must not wait."""
        self._clients[client] = callback

    def unsubscribe(self, client: object) -> None:
        """End what `subscribe` began."""
        self._clients.pop(client, None)

    def _on_qemu_event(self, event: Event) -> None:
        for name, callback in list(self._listeners):
            if name is None or name == event["event"]:
                _guarded(callback, event)
        events: list[Event] = [event]
        for event_filter in self.filters:
            events = [passed for one in events for passed in _filtered(event_filter, one)]
        for passed in events:
            self._broadcast(passed)

    def _broadcast(self, event: Event) -> None:
        for callback in list(self._clients.values()):
            _guarded(callback, event)


def _guarded(callback: Callable[[Event], None], event: Event) -> None:
    """Call a listener; its failure must not end the connection to QEMU, nor reach the other listeners."""
    try:
        callback(event)
    except Exception:
        log.exception("a listener failed on event %s", event.get("event"))


def _filtered(event_filter: EventFilter, event: Event) -> list[Event]:
    """Apply a filter; one that fails lets the event pass."""
    try:
        return list(event_filter(event))
    except Exception:
        log.exception("a filter failed on event %s", event.get("event"))
        return [event]


async def _human_monitor_command(facade: Facade, arguments: dict[str, Any]) -> Any:
    """QMP `human-monitor-command`: an HMP line that is ours stays ours."""
    line = arguments.get("command-line")
    if isinstance(line, str) and arguments.keys() <= {"command-line", "cpu-index"} and facade.commands.find_hmp(line):
        return await facade.dispatch_hmp(line)
    return await facade.execute("human-monitor-command", arguments)
