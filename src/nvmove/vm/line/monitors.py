"""Takes the user's monitors out of QEMU's arguments: nvmove serves them, QEMU keeps one private QMP connection.

A chardev that a monitor shares with ports of the guest (`mux=on`, `-serial mon:…`, -nographic) is nvmove's whole;
each port gets a private socket instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nvmove.options import syntax
from nvmove.options.syntax import Option, OptionError, parse
from nvmove.vm.line import chardevs
from nvmove.vm.line.argv import Item
from nvmove.vm.line.endpoints import MonitorEndpoint, MonitorMode, MuxPort, StdioAddress

_MONITOR_OBJECTS = {"monitor-hmp": MonitorMode.READLINE, "monitor-qmp": MonitorMode.CONTROL}
_MODES = {mode.value: mode for mode in MonitorMode}
_PORT_OPTIONS = ("serial", "parallel", "debugcon")
_SERIAL_DEVICES = ("isa-serial", "serial", "usb-serial")


@dataclass(frozen=True, slots=True)
class Monitors:
    """What is left for QEMU, and what nvmove serves."""

    items: list[Item]
    endpoints: tuple[MonitorEndpoint, ...]
    qemu_uses_stdio: bool


@dataclass(slots=True)
class _Line:
    """A chardev of at least one monitor."""

    chardev: Option
    monitors: list[tuple[MonitorMode, bool]] = field(default_factory=list)
    ports: list[MuxPort] = field(default_factory=list)


class _Lifter:
    def __init__(self, items: Sequence[Item], directory: Path) -> None:
        self.given = items
        self.directory = directory
        self.kept: list[Item] = []
        self.lines: dict[str, _Line] = {}
        self.declared: dict[str, Option] = {}
        self.compat = 0
        self.serials = 0
        self.ports = 0
        self.escape = 0x01

    def lift(self) -> Monitors:
        for item in self.given:
            if item.name == "chardev":
                option = chardevs.read(item.value)
                if option.get("id") in self.declared:
                    raise option.error(f"Duplicate ID '{option.get('id')}' for chardev")
                self.declared[option.get("id")] = option
        for item in self._with_defaults():
            self.kept += self._take(item)
        self.kept = [replaced for item in self.kept for replaced in self._port(item)]
        found = tuple(filter(None, map(self._endpoint, self.lines.values())))
        return Monitors(self.kept, found, self._check_stdio(found))

    def _with_defaults(self) -> list[Item]:
        """Return the items with those that QEMU adds for -nographic; the monitor on QEMU's display is left out."""
        names = {item.name for item in self.given}
        monitor = not names & {"nodefaults", "monitor", "qmp", "qmp-pretty", "mon"}
        monitor = monitor and not any(item.value.startswith("mon:") for item in self.given)
        if "nographic" not in names or not monitor:
            return list(self.given)
        return [
            *self.given,
            Item.make("serial", "mon:stdio") if _default_serial(self.given) else Item.make("monitor", "stdio"),
        ]

    def _take(self, item: Item) -> list[Item]:
        """Return what stays of `item` for QEMU, after its monitors are noted."""
        name, value = item.name, item.value
        if name in ("monitor", "qmp", "qmp-pretty"):
            mode = MonitorMode.READLINE if name == "monitor" else MonitorMode.CONTROL
            if value != "none":
                self._line(name, value).monitors.append((mode, name == "qmp-pretty"))
            return []
        if name == "mon":
            option = parse("-mon", value, implied="chardev")
            option.unknown(frozenset({"chardev", "mode", "pretty", "id"}), "Invalid parameter '{}'")
            language = option.get("mode", "readline")
            if language not in _MODES:
                raise option.error(f"Parameter 'mode' does not accept value '{language}'")
            self._add(option, _MODES[language], syntax.boolean(option, "pretty", False))
            return []
        if name == "object":
            option = parse("-object", value, implied="qom-type", json_allowed=True)
            kind = option.values.get("qom-type")
            if kind in _MONITOR_OBJECTS:
                option.unknown(
                    frozenset({"qom-type", "id", "chardev", "pretty"}), "{} is not supported yet for a monitor"
                )
                self._add(option, _MONITOR_OBJECTS[str(kind)], syntax.boolean(option, "pretty", False))
                return []
        if name == "echr":
            self.escape = _escape(value)
        if name in _PORT_OPTIONS and value.startswith("mon:"):
            ident = f"{name}{self.serials if name == 'serial' else ''}"
            self.serials += name == "serial"
            option = chardevs.from_short_form(f"-{name}", value, ident)
            self.declared[ident] = replace(option, values={**option.values, "mux": "on"})
            self.lines[ident] = _Line(self.declared[ident], [(MonitorMode.READLINE, False)])
            return [Item.make("chardev", f"null,id={ident}"), Item.make(name, f"chardev:{ident}")]
        self.serials += name == "serial"
        return [item]

    def _add(self, option: Option, mode: MonitorMode, pretty: bool) -> None:
        ident = option.get("chardev")
        if ident not in self.declared:
            raise option.error(f'chardev "{ident}" not found')
        self._of(ident).monitors.append((mode, pretty))

    def _line(self, name: str, value: str) -> _Line:
        if value.startswith("chardev:"):
            ident = value.removeprefix("chardev:")
            if ident not in self.declared:
                raise OptionError(f'-{name} {value}: chardev "{ident}" not found')
            return self._of(ident)
        ident = f"compat_monitor{self.compat}"  # QEMU's own name for it
        self.compat += 1
        return self.lines.setdefault(ident, _Line(chardevs.from_short_form(f"-{name}", value, ident)))

    def _of(self, ident: str) -> _Line:
        return self.lines.setdefault(ident, _Line(self.declared[ident]))

    def _port(self, item: Item) -> list[Item]:
        """Return `item` with a socket of its own instead of a monitor's chardev."""
        if item.name == "chardev" and chardevs.read(item.value).get("id") in self.lines:
            return []
        ident = _chardev_of(item)
        if ident not in self.lines:
            return [item]
        line = self.lines[ident]
        if not syntax.boolean(line.chardev, "mux", False):
            raise OptionError(f"{' '.join(item.words)}: chardev '{ident}' is a monitor's too: it needs mux=on")
        port = MuxPort(f"{ident}-port{len(line.ports)}" if line.ports else ident, self.directory / f"mux{self.ports}")
        self.ports += 1
        line.ports.append(port)
        socket = {"backend": "socket", "id": port.id, "path": str(port.socket)}
        return [Item.make("chardev", syntax.unparse(socket, "backend")), _with_chardev(item, ident, port.id)]

    def _endpoint(self, line: _Line) -> MonitorEndpoint | None:
        chardev = line.chardev
        if len(line.monitors) > 1 and not syntax.boolean(chardev, "mux", False):
            raise chardev.error("several monitors on one chardev need mux=on")
        found = chardevs.endpoint(chardev)
        if found.address is None:
            if line.ports:
                raise chardev.error("a monitor on null cannot share it")
            return None
        (mode, pretty), *further = line.monitors
        return MonitorEndpoint(
            mode=mode,
            address=found.address,
            id=chardev.get("id"),
            server=found.server,
            wait=found.wait,
            telnet=found.telnet,
            reconnect_ms=found.reconnect_ms,
            pretty=pretty,
            mux=tuple(line.ports),
            monitors=tuple(other for other, _ in further),
            escape=self.escape,
        )

    def _check_stdio(self, found: Sequence[MonitorEndpoint]) -> bool:
        """Return whether QEMU itself uses stdio; raises OptionError when two want it."""
        users = [self.lines[one.id].chardev.where for one in found if isinstance(one.address, StdioAddress)]
        qemus = [
            " ".join(item.words)
            for item in self.kept
            if (item.name in (*_PORT_OPTIONS, "virtioconsole", "gdb") and item.value == "stdio")
            or (item.name == "chardev" and chardevs.read(item.value).get("backend") == "stdio")
        ]
        if any(item.name == "nographic" for item in self.kept) and _default_serial(self.kept):
            qemus.append("-nographic")
        if len(users) + len(qemus) > 1:
            raise OptionError(f"{[*users, *qemus][-1]}: cannot use stdio by multiple character devices")
        return bool(qemus)


def lift(items: Sequence[Item], directory: Path) -> Monitors:
    """Take the monitors out; `directory` is for the sockets of ports that share a monitor's chardev.

    Raises OptionError.
    """
    return _Lifter(items, directory).lift()


def _escape(value: str) -> int:
    """Return the character of `-echr`; QEMU reads a number at the start as C does, and looks no further."""
    found = re.match(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", value)
    if not found:
        raise OptionError(f"-echr {value}: Bad argument to echr")
    digits = found[2]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    return int(found[1] + digits, base) & 0xFF


def _default_serial(items: Sequence[Item]) -> bool:
    """Whether QEMU adds a serial port of its own."""
    return not any(
        item.name in ("serial", "nodefaults") or (item.name == "device" and _driver(item) in _SERIAL_DEVICES)
        for item in items
    )


def _driver(item: Item) -> str:
    return str(parse("-device", item.value, implied="driver", json_allowed=True).values.get("driver", ""))


def _chardev_of(item: Item) -> str:
    """Return the id of the chardev that an option refers to, or nothing."""
    if item.value.startswith("chardev:"):
        return item.value.removeprefix("chardev:")
    if item.name in ("device", "object", "netdev", "tpmdev"):
        return str(_values(item).get("chardev", ""))
    return ""


def _values(item: Item) -> Mapping[str, object]:
    implied = {"device": "driver", "object": "qom-type"}.get(item.name, "type")
    return parse(f"-{item.name}", item.value, implied, json_allowed=True).values


def _with_chardev(item: Item, old: str, new: str) -> Item:
    if old == new:
        return item
    if item.value.startswith("chardev:"):
        return item.instead(f"chardev:{new}")
    if item.value.lstrip().startswith("{"):
        return item.instead(syntax.to_json({**_values(item), "chardev": new}))
    return item.instead(f"{item.value},chardev={syntax.escape(new)}")  # the last value counts
