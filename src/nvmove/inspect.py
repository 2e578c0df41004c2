"""`nvmove inspect FILE`: the device state in a qcow2 snapshot, a migration file or a state file, as a tree or JSON.

It reads and changes nothing. What it shows are the fields as they are in the file (docs/reference/state-format.md), and
whether this version would load them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvmove.errors import UserError
from nvmove.nvme.state import vmsd
from nvmove.nvme.state.vmsd_qemu import QEMU_NVME
from nvmove.vmstate import machine, stream
from nvmove.vmstate.qcow2 import MAGIC as QCOW2_MAGIC
from nvmove.vmstate.qcow2 import Qcow2, Snapshot
from nvmove.vmstate.qemu_file import DBUS_VMSTATE, QemuFile, dbus_states
from nvmove.vmstate.schema import Reader, StateError, VMStateDescription
from nvmove.vmstate.source import FileSource, Source
from nvmove.vmstate.tree import Tree

HEX_FROM = 4096
"""Numbers from here on are shown in hexadecimal: addresses and registers, not ring positions."""
SHOWN_BYTES = 32
LARGEST_STATE = 1 << 28
"""Bytes: a state file larger than this is none."""


@dataclass(frozen=True, slots=True)
class Found:
    """One device's state."""

    ident: str
    """The Id under which QEMU carried it, or the section's name."""
    origin: str
    """Who wrote it: `nvmove`, or `qemu` for QEMU's own nvme."""
    size: int
    """Bytes."""
    tree: Tree
    problem: str = ""
    """Why this version would not load it; empty when it would."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is in a file."""

    kind: str
    devices: list[Found]
    snapshot: Snapshot | None = None
    others: list[str] = field(default_factory=list)
    """Ids of helpers that are not ours."""
    vm: Tree | None = None
    """The state of the VM as a whole, where it was saved."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `nvmove inspect` takes."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a qcow2 image, a QEMU migration file or a state file")
    parser.add_argument("--snapshot", metavar="TAG", help="the snapshot of a qcow2 image: its name or its ID")
    parser.add_argument("--json", action="store_true", help="print JSON; bytes are in hexadecimal")
    parser.add_argument("--all", action="store_true", help="show fields that are zero or empty, too")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 when a state in it would not load. Raise UserError."""
    try:
        source = FileSource(args.file)
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    try:
        report = inspect(source, args.snapshot)
    except StateError as error:
        raise UserError(f"{args.file}: {error}") from None
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    finally:
        source.close()
    if args.json:
        json.dump(as_json(report), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        sys.stdout.writelines(line + "\n" for line in as_text(report, everything=args.all))
    return 1 if any(found.problem for found in report.devices if found.origin == "nvmove") else 0


def inspect(source: Source, tag: str | None = None) -> Report:
    """Return what is in `source`; `tag` chooses a snapshot of a qcow2 image. Raise StateError."""
    magic = source.read_at(0, min(4, source.size))
    if magic == QCOW2_MAGIC:
        image = Qcow2(source)
        snapshot = _choose(image, tag)
        return _of_qemu("snapshot", QemuFile(image.vm_state(snapshot)), snapshot)
    if tag is not None:
        raise StateError("--snapshot is for qcow2 images, and this is none")
    if magic != stream.MAGIC:
        raise StateError(
            f"neither a qcow2 image nor a QEMU migration file nor a state file: it begins with {magic!r}"
            f"{_compressed(magic)}"
        )
    file = QemuFile(source)
    if "checksum" in file.description:
        if source.size > LARGEST_STATE:
            raise StateError(f"a state of {source.size} bytes is none of nvmove's")
        return Report("state", [_of_nvmove("nvme", source.read_at(0, source.size))])
    return _of_qemu("migration", file)


def _compressed(magic: bytes) -> str:
    known = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"\xfd7": "xz", b"BZ": "bzip2"}
    program = known.get(magic[:2])
    return f" (decompress it first: {program} -d)" if program else ""


def _choose(image: Qcow2, tag: str | None) -> Snapshot:
    with_state = [snapshot for snapshot in image.snapshots if snapshot.vm_state_size]
    tags = ", ".join(snapshot.name for snapshot in with_state) or "none"
    if tag is None:
        if len(with_state) == 1:
            return with_state[0]
        if not with_state:
            raise StateError("the image has no snapshot with VM state")
        raise StateError(f"the image has several snapshots with VM state, choose with --snapshot: {tags}")
    # As QEMU does: an ID goes before a name.
    for key in ("ident", "name"):
        for snapshot in image.snapshots:
            if getattr(snapshot, key) == tag:
                if not snapshot.vm_state_size:
                    raise StateError(f"snapshot {tag!r} has no VM state: it is of the disk alone")
                return snapshot
    raise StateError(f"no snapshot {tag!r}; those with VM state: {tags}")


def _of_qemu(kind: str, file: QemuFile, snapshot: Snapshot | None = None) -> Report:
    devices: list[Found] = []
    others: list[str] = []
    whole: Tree | None = None
    for section in file.find(DBUS_VMSTATE):
        for ident, data in dbus_states(section).items():
            if ident == machine.IDENT:
                whole = _load(ident, data, {machine.IDENT: machine.VM})
            elif data.startswith(stream.MAGIC):
                devices.append(_of_nvmove(ident, data))
            else:
                others.append(ident)
    for section in file.find(QEMU_NVME.name):
        reader = Reader(section.body)
        tree = QEMU_NVME.read(reader, section.version)
        if reader.left:
            raise StateError(f"{section.name}: {reader.left} bytes more than QEMU 11.1 writes")
        problem = "saved by QEMU's own nvme, nvmove does not load it"
        devices.append(Found(section.name, "qemu", len(section.body), tree, problem))
    if not devices:
        raise StateError("there is no NVMe device's state in it")
    return Report(kind, devices, snapshot, others, whole)


def _load(ident: str, data: bytes, descriptions: Mapping[str, VMStateDescription]) -> Tree:
    try:
        sections = stream.load(data, descriptions)
        if len(sections) != 1:
            raise StateError(f"{len(sections)} sections instead of one")
    except StateError as error:
        raise StateError(f"{ident}: {error}") from None
    return sections[0].tree


def _of_nvmove(ident: str, data: bytes) -> Found:
    tree = _load(ident, data, vmsd.DESCRIPTIONS)
    problem = ""
    try:
        vmsd.from_tree(tree)
    except StateError as error:
        problem = str(error)
    return Found(ident, "nvmove", len(data), tree, problem)


def as_json(report: Report) -> dict[str, Any]:
    """Return `report` for JSON; bytes become hexadecimal digits."""
    shown: dict[str, Any] = {"kind": report.kind}
    if report.snapshot is not None:
        snapshot = report.snapshot
        shown["snapshot"] = {"id": snapshot.ident, "name": snapshot.name, "date": snapshot.seconds}
        shown["snapshot"]["vm-state-size"] = snapshot.vm_state_size
    shown["devices"] = [
        {
            "id": found.ident,
            "origin": found.origin,
            "size": found.size,
            "loadable": not found.problem,
            **({"problem": found.problem} if found.problem else {}),
            "state": _plain(found.tree),
        }
        for found in report.devices
    ]
    if report.vm is not None:
        shown["vm"] = _plain(report.vm)
    if report.others:
        shown["others"] = report.others
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def as_text(report: Report, everything: bool = False) -> Iterator[str]:
    """Yield the lines of `report`; without `everything`, fields that are zero or empty are left out."""
    if report.snapshot is not None:
        snapshot = report.snapshot
        yield f"snapshot {snapshot.name} (ID {snapshot.ident}), {snapshot.vm_state_size} bytes of VM state"
    for found in report.devices:
        verdict = f"does not load: {found.problem}" if found.problem else "loads"
        yield f"{found.ident}: NVMe controller, saved by {found.origin}, {found.size} bytes; {verdict}"
        yield from _lines(found.tree, "  ", everything)
    if report.vm is not None:
        yield f"{machine.IDENT}: the VM as a whole"
        yield from _lines(report.vm, "  ", everything)
    for ident in report.others:
        yield f"{ident}: not an nvmove device"


def _lines(tree: Tree, indent: str, everything: bool) -> Iterator[str]:
    for name, value in tree.items():
        if everything or not _is_zero(value):
            yield from _entry(name, value, indent, everything)


def _entry(name: str, value: Any, indent: str, everything: bool) -> Iterator[str]:
    if isinstance(value, dict):
        inner = list(_lines(value, indent + "  ", everything))
        flat = " ".join(line.strip().replace(": ", "=", 1) for line in inner)
        shown = [item for item in value.values() if everything or not _is_zero(item)]
        if any(isinstance(item, dict | list) for item in shown) or len(flat) > 100:
            yield f"{indent}{name}:"
            yield from inner
        else:
            yield f"{indent}{name}: {flat}".rstrip()
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if everything or not _is_zero(item):
                yield from _entry(f"{name}[{index}]", item, indent, everything)
    else:
        yield f"{indent}{name}: {_shown(value)}"


def _is_zero(value: Any) -> bool:
    """Whether there is nothing to see. An element of a list that exists is something, even when it is all zeroes."""
    if isinstance(value, dict):
        return all(_is_zero(item) for item in value.values())
    if isinstance(value, list):
        return all(item is None or (not isinstance(item, dict) and _is_zero(item)) for item in value)
    if isinstance(value, bytes):
        return not any(value)
    return not value


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        used = value.rstrip(b"\0")
        more = "…" if len(used) > SHOWN_BYTES else ""
        return f"{used[:SHOWN_BYTES].hex(' ') or '0'}{more} ({len(value)} bytes)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return hex(value) if value >= HEX_FROM else str(value)
    return "none" if value is None else str(value)
