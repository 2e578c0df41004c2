"""Lifts what nvmove serves out of a QEMU command line: (the user's arguments) → (nvmove's part, QEMU's arguments).

All else passes untouched, in order. Nothing is opened or started here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from nvmove.errors import UserError
from nvmove.options import drives as drive_options
from nvmove.options import syntax
from nvmove.options.devices import MSG_TIMEOUT, ParsedController, is_nvme, parse_controllers, parse_device
from nvmove.options.drives import Drive
from nvmove.options.syntax import Option, OptionError, parse
from nvmove.vm.line import argv as words
from nvmove.vm.line import defaults, iommu, memory, monitors, placement, ports
from nvmove.vm.line import program as programs
from nvmove.vm.line.argv import Item
from nvmove.vm.line.plan import DEFER, DRIVER, Plan, PlannedDevice, PlannedDrive

QMP_CHARDEV = "nvmove-qmp"
QTEST = "nvmove-qtest"
"""Both the object and its chardev."""
_REFUSED: Mapping[str, str] = {
    "daemonize": "nvmove serves the disk from the foreground; start it in the background with systemd-run or setsid",
    "preconfig": "not supported yet",
    "runas": "QEMU would lose its way to nvmove's sockets; start nvmove as that user",
    "chroot": "QEMU would lose its way to nvmove's sockets",
}
_LIFTED = ("S", "loadvm", "incoming")
_SETTABLE = ("device", "drive", "chardev", "blockdev", "netdev")
_NO_REFERENCE = frozenset({"id", "driver", "node-name", "serial", "filename", "bus", "addr", "model", "qom-type"})


class Qemu(Protocol):
    """What lifting wants to know of QEMU (`vm.program.QemuProgram` knows it)."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def version_text(self) -> str:
        """`11.1.3`."""

    def property_types(self, driver: str) -> Mapping[str, str]:
        """The types of a device's properties by name."""

    def compat_properties(self, machine: str) -> Mapping[str, Mapping[str, str]]:
        """What a versioned machine type sets of devices, by their types."""


def lift(arguments: Sequence[str], run_directory: Path, program: Qemu | None = None) -> Plan:
    """Read `QEMU ARGUMENTS…` and return the plan; `program` is looked for when it is not given.

    Raises UserError: one line, in QEMU's words where QEMU would refuse the same.
    """
    if not arguments:
        raise UserError("run: which QEMU? (nvmove run qemu-system-x86_64 ARGUMENTS…)", status=2)
    name, rest = arguments[0], list(arguments[1:])
    items = words.read(rest)
    if words.asks_for_help(items) or not any(_is_nvme(item) for item in items):
        _look_into_files(items, any_nvme=False)
        return Plan(program=name, arguments=tuple(rest), passthrough=True)
    return _Lifting(items, run_directory, program or programs.find(name)).plan()


class _Lifting:
    def __init__(self, items: list[Item], directory: Path, program: Qemu) -> None:
        self.directory = directory
        self.program = program
        self.warnings: list[str] = []
        _refuse(items)
        _look_into_files(items, any_nvme=True)
        self.items, self.defaults = defaults.take(_apply_set(items), program.compat_properties)

    def plan(self) -> Plan:
        at, parsed = self._controllers()
        used = self._drives(parsed)
        devices = self._devices(parsed, used)
        substitutes: dict[int, Item | None] = dict.fromkeys(at)
        for place, controller, device in zip(
            [place for place in at if at[place].get("driver") == "nvme"], parsed, devices, strict=True
        ):
            substitutes[place] = self.items[place].instead(_vfio_user_pci(controller, device))
        told, is_translated = iommu.told(self.items, self.program.property_types, self.warnings)
        items = placement.place(told, substitutes, self.program.property_types)
        buses = [str(one.pci.get("bus", "")) for one in parsed]
        items = ports.without_hot_plug(items, buses, self.defaults.compat, self.program.property_types)
        items = _without_drives(items, used.values())
        lifted = monitors.lift(items, self.directory)
        items = memory.share(lifted.items)
        qmp_socket, qtest_socket = self.directory / "qmp", self.directory / "qtest"
        own = [
            Item(("-S",), "S"),
            _connected(QMP_CHARDEV, qmp_socket),
            Item.make("qmp", f"chardev:{QMP_CHARDEV}"),
            _connected(QTEST, qtest_socket),
            Item.make("object", f"qtest,id={QTEST},chardev={QTEST},log=none"),
        ]
        incoming = next((item.value for item in reversed(items) if item.name == "incoming"), None)
        if incoming is not None and any(item.name == "loadvm" for item in items):
            raise OptionError("-loadvm: a VM that arrives (-incoming) brings its own state")
        if incoming is not None:
            own.append(Item.make("incoming", DEFER))
        names = [item.name for item in items]
        return Plan(
            program=str(self.program.path),
            arguments=tuple(words.words([*(item for item in items if item.name not in _LIFTED), *own])),
            devices=devices,
            drives=self._planned_drives(parsed, devices, used),
            endpoints=lifted.endpoints,
            qmp_socket=qmp_socket,
            qtest_socket=qtest_socket,
            is_translated=is_translated,
            paused="S" in names,
            loadvm=next((item.value for item in reversed(items) if item.name == "loadvm"), None),
            incoming=incoming,
            qemu_uses_stdio=lifted.qemu_uses_stdio,
            warnings=tuple(self.warnings),
            wording=words.wording(items),
        )

    def _controllers(self) -> tuple[dict[int, Option], list[ParsedController]]:
        """Return the nvme and nvme-ns options by their places, in the order of creation, and what they say."""
        at = {}
        seen: set[str] = set()
        for place, option in placement.creation_order(self.items):
            ident = str(option.values.get("id", ""))
            if ident and ident in seen:
                raise option.error(f"Duplicate ID '{ident}' for device")
            seen.add(ident)
            if is_nvme(option):
                self.warnings += [
                    f"{option.where}: short-form boolean option '{flag}' deprecated" for flag in option.flags
                ]
                if "num_queues" in option.values:
                    self.warnings.append(f"{option.where}: num_queues is deprecated; please use max_ioqpairs instead")
                at[place] = self.defaults.under(option)
        return at, parse_controllers(at.values(), self.program.version_text)

    def _drives(self, parsed: Sequence[ParsedController]) -> dict[str, Drive]:
        snapshot = any(item.name == "snapshot" for item in self.items)
        plain = _drives_by_id(self.items)
        by_node = {option.get("node-name"): option for option in plain.values() if option.get("node-name")}
        nodes = _nodes(self.items)
        shared = frozenset(name for name, count in self._references().items() if count > 1)
        found: dict[str, Drive] = {}
        for controller in parsed:
            for use in controller.drives:
                option = plain.get(use.name) or by_node.get(use.name)
                if option is not None:
                    if option.get("if", "ide") != "none":
                        raise use.option.error(
                            f"Drive '{use.name}' is already in use because it has been automatically connected to "
                            "another device (did you need 'if=none' in the drive options?)"
                        )
                    drive = self._named(drive_options.read_drive(option, snapshot, use.image_owner), len(found))
                elif use.name in nodes:
                    drive = drive_options.read_blockdev(nodes[use.name], nodes, shared, use.image_owner)
                else:
                    driver = use.option.get("driver")
                    raise use.option.error(f"Property '{driver}.drive' can't find value '{use.name}'")
                cached = {"on": True, "off": False, "auto": drive.config.options.writeback}[use.write_cache]
                options = msgspec.structs.replace(drive.config.options, share_rw=use.share_rw, writeback=cached)
                config = drive_options.with_device_actions(drive.config, use.werror, use.rerror)
                found[use.name] = msgspec.structs.replace(
                    drive, config=msgspec.structs.replace(config, options=options)
                )
        self._refuse_other_users(found)
        return found

    def _named(self, drive: Drive, number: int) -> Drive:
        """Give a `-drive` a node name where it has none: the export needs one.

        An overlay of -snapshot lies on top of the node that node-name= names, and only QEMU knows its name.
        """
        overlaid = any(item.name == "snapshot" for item in self.items) or "snapshot" in drive.option.values
        node = "" if overlaid and drive.in_qemu else drive.config.node_name or f"nvmove-node{number}"
        return msgspec.structs.replace(drive, config=msgspec.structs.replace(drive.config, node_name=node))

    def _references(self) -> Counter[str]:
        """Count how often each name stands as a value where it may mean a block node."""
        counted: Counter[str] = Counter()
        for item in self.items:
            if item.name in ("blockdev", "device", "object"):
                option = parse(f"-{item.name}", item.value, "driver", json_allowed=True)
                flat = syntax.flatten(option.values)
                counted.update(str(v) for k, v in flat.items() if k.rpartition(".")[2] not in _NO_REFERENCE)
        return counted

    def _refuse_other_users(self, used: Mapping[str, Drive]) -> None:
        for item in self.items:
            if item.name == "device":
                option = parse_device(item.value)
                drive = option.values.get("drive")
                if not is_nvme(option) and drive in used:
                    raise option.error(f"Drive '{drive}' is already in use by another device")

    def _devices(self, parsed: Sequence[ParsedController], used: Mapping[str, Drive]) -> tuple[PlannedDevice, ...]:
        taken = {str(option.values.get("id")) for _, option in placement.creation_order(self.items)}
        free = (f"nvmove{number}" for number in range(len(taken) + len(parsed) + 1))
        unused = (ident for ident in free if ident not in taken)
        cached = {name: drive.config.options.writeback for name, drive in used.items()}
        return tuple(
            PlannedDevice(one.config.id or next(unused), one.finish(cached), self.directory / f"nvme{number}")
            for number, one in enumerate(parsed)
        )

    def _planned_drives(
        self, parsed: Sequence[ParsedController], devices: Sequence[PlannedDevice], used: Mapping[str, Drive]
    ) -> tuple[PlannedDrive, ...]:
        return tuple(
            PlannedDrive(
                key=use.name,
                name=used[use.name].config.id,
                node=used[use.name].config.node_name,
                device=device.id,
                config=used[use.name].config,
                in_qemu=used[use.name].in_qemu,
            )
            for controller, device in zip(parsed, devices, strict=True)
            for use in controller.drives
        )


def _connected(ident: str, socket: Path) -> Item:
    """Return the chardev by which QEMU connects to a socket of ours."""
    return Item.make("chardev", syntax.unparse({"backend": "socket", "id": ident, "path": str(socket)}, "backend"))


def _is_nvme(item: Item) -> bool:
    return item.name == "device" and is_nvme(parse_device(item.value))


def _refuse(items: Iterable[Item]) -> None:
    for item in items:
        if item.name in _REFUSED:
            raise OptionError(f"-{item.name}: {_REFUSED[item.name]}")
        if item.name == "run-with":
            option = parse("-run-with", item.value)
            for name, why in (("chroot", _REFUSED["chroot"]), ("user", _REFUSED["runas"])):
                if name in option.values:
                    raise option.error(f"{name}: {why}")
        if item.name == "icount" and parse("-icount", item.value, "shift").values.get("rr") in ("record", "replay"):
            raise OptionError(f"-icount {item.value}: record and replay are not possible with a device outside QEMU")


_SECTIONS_LIFTED = ("memory", "machine", "mon", "drive", "chardev", "numa", "object")


def _look_into_files(items: Iterable[Item], any_nvme: bool) -> None:
    """Refuse what nvmove would have to lift out of a `-readconfig` file; raises OptionError."""
    for item in items:
        if item.name != "readconfig":
            continue
        try:
            text = Path(item.value).read_text(errors="replace")
        except OSError:
            continue  # QEMU says so
        for line in text.splitlines():
            word = line.strip()
            if word.replace(" ", "").startswith('driver="nvme'):
                raise OptionError(f"-readconfig {item.value}: an nvme device in it is not supported: use -device")
            section = word.removeprefix("[").partition(" ")[0].rstrip("]")
            if any_nvme and word.startswith("[") and section in _SECTIONS_LIFTED:
                raise OptionError(f"-readconfig {item.value}: section [{section}] is not supported: use -{section}")


def _apply_set(items: Sequence[Item]) -> list[Item]:
    """Return the items with each `-set GROUP.ID.KEY=VALUE` put into the option that it changes."""
    kept: list[Item] = []
    for item in items:
        path, equals, value = item.value.partition("=")
        group, _, rest = path.partition(".")
        ident, dot, key = rest.partition(".")
        if item.name != "set" or group not in _SETTABLE or not (equals and dot):
            kept.append(item)
            continue
        for at, other in enumerate(kept):
            if other.name == group and _id_in_words(other) == ident:
                kept[at] = other.instead(f"{other.value},{key}={syntax.escape(value)}")
                break
        else:
            kept.append(item)  # QEMU says that there is none
    return kept


def _id_in_words(item: Item) -> str:
    """Return the id of an option in key=value form; -set does not reach those in JSON form."""
    option = parse(f"-{item.name}", item.value, "driver", json_allowed=True)
    return "" if option.is_json else option.get("id")


def _vfio_user_pci(controller: ParsedController, device: PlannedDevice) -> str:
    values = {
        "driver": DRIVER,
        "id": device.id,
        "socket": {"type": "unix", "path": str(device.socket)},
        "x-msg-timeout": MSG_TIMEOUT,
        **controller.pci,
    }
    return syntax.to_json(values)


def _drives_by_id(items: Iterable[Item]) -> dict[str, Option]:
    """Return the `-drive`s by id: the user's, or QEMU's none0, none1, … for those of if=none without one."""
    found: dict[str, Option] = {}
    unnamed = 0
    for item in items:
        if item.name != "drive":
            continue
        option = parse("-drive", item.value, implied="file")
        ident = option.get("id")
        if option.get("if") == "none":
            ident = ident or f"none{unnamed}"
            unnamed += 1
        if not ident:
            continue
        if ident in found:
            raise option.error(f"Duplicate ID '{ident}' for drive")
        found[ident] = Option(option.where, {**option.values, "id": ident})
    return found


def _nodes(items: Iterable[Item]) -> dict[str, Option]:
    found = {}
    for item in items:
        if item.name == "blockdev":
            option = parse("-blockdev", item.value, implied="driver", json_allowed=True)
            if not option.get("node-name"):
                raise option.error("'node-name' must be specified for the root node")
            found[option.get("node-name")] = option
    return found


def _without_drives(items: Sequence[Item], used: Iterable[Drive]) -> list[Item]:
    """Return the items without the drives that nvmove opens, and without werror and rerror on those that QEMU keeps."""
    drives = list(used)
    gone = {node for drive in drives if not drive.in_qemu for node in drive.nodes}
    lifted = {drive.option.where: drive for drive in drives}
    kept = []
    for item in items:
        drive = lifted.get(f"-{item.name} {item.value}") if item.name in ("drive", "blockdev") else None
        if item.name == "blockdev":
            node = parse("-blockdev", item.value, implied="driver", json_allowed=True).get("node-name")
            if node in gone:
                continue
        elif drive is not None:
            if not drive.in_qemu:
                continue
            left = drive_options.without_error_actions(parse("-drive", item.value, implied="file"))
            values = dict(left.values)
            if drive.config.node_name:
                values.setdefault("node-name", drive.config.node_name)
            item = item.instead(syntax.unparse(values))  # noqa: PLW2901
        kept.append(item)
    return kept
