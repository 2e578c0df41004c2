"""The user's monitors, as typed by `-monitor`, `-qmp`, `-mon` and their chardevs: nvmove serves them in QEMU's place.

`vm/line/arguments.py` produces these; the monitor serves them. QEMU itself gets one private QMP socket only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class MonitorMode(enum.Enum):
    """The language of a monitor: the values are those of `-mon mode=`."""

    CONTROL = "control"
    """QMP."""
    READLINE = "readline"
    """HMP."""


@dataclass(frozen=True, slots=True)
class StdioAddress:
    """The terminal or pipe nvmove was started on. With `signal` off, Ctrl-C is a byte and not SIGINT."""

    signal: bool = True


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix stream socket; `abstract` names begin with a zero byte, and `tight` ones end with the name."""

    path: str
    abstract: bool = False
    tight: bool = True


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP socket. `host` may be empty (any); the first free port of `port`…`to` is taken when `to` is set."""

    host: str
    port: str
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    nodelay: bool = False


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A socket that nvmove inherited: listening with `server`, connected otherwise."""

    fd: int


@dataclass(frozen=True, slots=True)
class PtyAddress:
    """A new pseudo terminal; `link`, when set, becomes a symbolic link to it."""

    link: str = ""


@dataclass(frozen=True, slots=True)
class FileAddress:
    """Output to `path`, truncated unless `append`; input, if any, from `input_path`."""

    path: str
    input_path: str = ""
    append: bool = False


@dataclass(frozen=True, slots=True)
class PipeAddress:
    """FIFOs `path`.in and `path`.out, or one `path` for both ways."""

    path: str


Address = StdioAddress | UnixAddress | TcpAddress | FdAddress | PtyAddress | FileAddress | PipeAddress


@dataclass(frozen=True, slots=True)
class MuxPort:
    """A guest port that shares the monitor's transport (`mux=on`): Ctrl-A c goes from one to the next.

    nvmove listens on `socket` before QEMU starts, and QEMU's chardev `id` connects to it. As in QEMU, the port that was
    attached last has the focus at first, so the guest's console does and not the monitor.
    """

    id: str
    socket: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorEndpoint:
    """One monitor that the user asked for."""

    mode: MonitorMode
    address: Address
    id: str = ""
    """The chardev's id."""
    server: bool = False
    """Sockets: listen, else connect."""
    wait: bool = True
    """With `server`: the VM starts only when a client has connected."""
    telnet: bool = False
    """Sockets: the telnet protocol (its options are negotiated, then character at a time)."""
    reconnect_ms: int = 0
    """Sockets without `server`: after the connection is lost, or refused, try again this often; 0: never."""
    pretty: bool = False
    """CONTROL: indented JSON."""
    mux: tuple[MuxPort, ...] = ()
    """The guest's ports on the same transport, in the order they were attached."""
    escape: int = 0x01
    """The character before a mux command: Ctrl-a, or what `-echr` says."""
    monitors: tuple[MonitorMode, ...] = ()
    """Further monitors on the same `mux=on` transport."""
