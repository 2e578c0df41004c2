"""Character devices as QEMU's options name them, and those of monitors as endpoints of nvmove."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvmove.options import syntax
from nvmove.options.syntax import Option, OptionError, parse
from nvmove.vm.line import endpoints

_COMMON = frozenset({"backend", "id", "mux"})
_SOCKET = frozenset(
    "host port to ipv4 ipv6 nodelay path abstract tight fd server wait telnet reconnect reconnect-ms delay".split()  # noqa: SIM905
)
_OTHERS = {
    "stdio": frozenset({"signal"}),
    "pty": frozenset({"path"}),
    "file": frozenset({"path", "input-path", "append"}),
    "pipe": frozenset({"path"}),
    "null": frozenset[str](),
}
_NOT_YET = frozenset({"websocket", "tls-creds", "tls-authz", "logfile", "logappend", "tn3270"})
_PLAIN = ("stdio", "null", "pty")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a monitor's bytes come from and go to; `address` is None for null."""

    address: endpoints.Address | None
    server: bool = False
    wait: bool = False
    telnet: bool = False
    reconnect_ms: int = 0


def read(argument: str) -> Option:
    """Read the argument of `-chardev`; raises OptionError."""
    option = parse("-chardev", argument, implied="backend")
    if not option.get("id"):
        raise option.error("Parameter 'id' is missing")
    return option


def from_short_form(name: str, device: str, ident: str) -> Option:
    """Read what stands after -monitor, -qmp or -serial (`unix:vm.sock,server=on`) as the -chardev that it means.

    `name` is the option's, `ident` the id of the chardev. Raises OptionError.
    """
    where = f"{name} {device}"
    if device == "mon:stdio":  # as QEMU: Ctrl-C is for whoever has the terminal, such as the guest
        return Option(where, {"backend": "stdio", "id": ident, "signal": "off"})
    device = device.removeprefix("mon:")
    if device in _PLAIN:
        return Option(where, {"backend": device, "id": ident})
    kind, colon, rest = device.partition(":")
    if kind == "vc":
        raise OptionError(
            f"{where}: a monitor on QEMU's own display is not supported; use stdio or unix:PATH,server=on"
        )
    if not colon or kind not in ("unix", "tcp", "telnet", "file", "pipe", "pty"):
        if kind in ("websocket", "tn3270", "udp"):
            raise OptionError(f"{where}: {kind} is not supported yet for a monitor")
        raise OptionError(f"{where}: '{device}' is not a valid char driver")
    if kind in ("file", "pipe", "pty"):
        return Option(where, {"backend": kind, "id": ident, "path": rest})
    # the first word is the address, and never a key, even with an equals sign in it
    first, *others = syntax.split(rest)
    values = {"backend": "socket", "id": ident}
    if others:
        values |= dict(parse(name, ",".join(map(syntax.escape, others))).values)
    if kind == "unix":
        values["path"] = first
    else:
        match = re.fullmatch(r"(\[.*\]|[^:]*):([^:,]+)", first)
        if not match:
            raise OptionError(f"{where}: parse error: HOST:PORT expected")
        values |= {"host": match[1].strip("[]"), "port": match[2]}
        if kind == "telnet":
            values["telnet"] = "on"
    return Option(where, values)


def endpoint(option: Option) -> Endpoint:
    """Return what nvmove serves for a monitor's chardev; raises OptionError for what it cannot."""
    backend = option.get("backend")
    if backend != "socket" and backend not in _OTHERS:
        raise option.error(f"the chardev backend '{backend}' is not supported for a monitor; use stdio or socket")
    for name in option.values:
        if name in _NOT_YET:
            raise option.error(f"{name} is not supported yet for a monitor")
    option.unknown(_COMMON | _OTHERS.get(backend, _SOCKET), "Invalid parameter '{}'")
    if backend == "null":
        return Endpoint(None)
    if backend == "stdio":
        return Endpoint(endpoints.StdioAddress(syntax.boolean(option, "signal", True)))
    if backend == "pty":
        return Endpoint(endpoints.PtyAddress(option.get("path")))
    if backend == "pipe":
        return Endpoint(endpoints.PipeAddress(_path(option)))
    if backend == "file":
        append = syntax.boolean(option, "append", False)
        return Endpoint(endpoints.FileAddress(_path(option), option.get("input-path"), append))
    return _socket(option)


def _socket(option: Option) -> Endpoint:
    address: endpoints.Address
    if "path" in option.values:
        abstract = syntax.boolean(option, "abstract", False)
        address = endpoints.UnixAddress(option.get("path"), abstract, syntax.boolean(option, "tight", True))
    elif "fd" in option.values:
        fd = option.get("fd")
        if not fd.isdigit():
            raise option.error(f"file descriptor named '{fd}' has not been found")
        address = endpoints.FdAddress(int(fd))
    elif "port" in option.values:
        address = endpoints.TcpAddress(
            option.get("host"),
            option.get("port"),
            syntax.integer(option, "to", 0, 16) if "to" in option.values else None,
            syntax.boolean(option, "ipv4", True) if "ipv4" in option.values else None,
            syntax.boolean(option, "ipv6", True) if "ipv6" in option.values else None,
            not syntax.boolean(option, "delay", not syntax.boolean(option, "nodelay", False)),
        )
    else:
        raise option.error("chardev: socket: no socket address given")
    server = syntax.boolean(option, "server", False)
    milliseconds = syntax.integer(option, "reconnect-ms", 0, 32) or 1000 * syntax.integer(option, "reconnect", 0, 32)
    if "wait" in option.values and not server:
        raise option.error("'wait' option is incompatible with socket in client mode")
    if milliseconds and server:
        raise option.error("'reconnect-ms' option is incompatible with socket in server listen mode")
    return Endpoint(address, server, server and syntax.boolean(option, "wait", True), _telnet(option), milliseconds)


def _telnet(option: Option) -> bool:
    return syntax.boolean(option, "telnet", False)


def _path(option: Option) -> str:
    if not option.get("path"):
        raise option.error(f"chardev: {option.get('backend')}: no filename given")
    return option.get("path")
