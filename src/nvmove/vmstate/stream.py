"""QEMU's migration stream, written and read: a few full sections and their description in JSON.

    "QEVM"  version (uint32, 3)
    0x04  section id (uint32)  name (byte, characters)  instance (uint32)  version (uint32)  fields, subsections
    0x7e  section id (uint32)                                               … once per section
    0x00  0x06  length (uint32)  JSON

QEMU's scripts/analyze-migration.py reads it. One key of the JSON is ours: `checksum`, the CRC-32 of all that comes
before the JSON's marker, so that a state that was damaged on its way is refused and not guessed at.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from nvmove.vmstate.schema import Reader, StateError, VMStateDescription
from nvmove.vmstate.tree import Json, Tree

MAGIC = b"QEVM"
VERSION = 3
EOF = 0x00
SECTION_FULL = 0x04
VMDESCRIPTION = 0x06
SECTION_FOOTER = 0x7E

PAGE_SIZE = 4096
"""What QEMU's description says of the target; analyze-migration wants it."""


@dataclass(frozen=True, slots=True)
class Section:
    """A device's state in a stream."""

    name: str
    """QEMU's idstr: `nvme`, or `0000:00:01.0/nvme`."""
    tree: Tree
    instance: int = 0


def dump(sections: Sequence[tuple[Section, VMStateDescription]]) -> bytes:
    """Return the stream of `sections`; raise ValueError when a tree has not its description's shape."""
    out = bytearray(MAGIC + VERSION.to_bytes(4, "big"))
    devices: list[Json] = []
    for number, (section, description) in enumerate(sections):
        name = section.name.encode("ascii")
        out += bytes([SECTION_FULL]) + number.to_bytes(4, "big") + bytes([len(name)]) + name
        out += section.instance.to_bytes(4, "big") + description.version.to_bytes(4, "big")
        devices.append(
            {"name": section.name, "instance_id": section.instance, **description.write(out, section.tree)},
        )
        out += bytes([SECTION_FOOTER]) + number.to_bytes(4, "big")
    out.append(EOF)
    described = {"page_size": PAGE_SIZE, "checksum": zlib.crc32(out), "devices": devices}
    text = _padded(msgspec.json.encode(described))
    return bytes(out) + bytes([VMDESCRIPTION]) + len(text).to_bytes(4, "big") + text


def _padded(text: bytes) -> bytes:
    """Return `text`, with spaces after it where its length has a byte `{`: analyze-migration looks for the brace."""
    while b"{" in len(text).to_bytes(4, "big"):
        text += b" "
    return text


def load(data: bytes, descriptions: Mapping[str, VMStateDescription]) -> list[Section]:
    """Return the sections of a stream that `dump` wrote; `descriptions` are by section name. Raise StateError."""
    reader = Reader(data)
    if data[:4] != MAGIC:
        raise StateError(f"not a saved state: it begins with {data[:4]!r}, not {MAGIC!r}")
    reader.take(4, "magic")
    if (version := reader.number(4, "the stream's version")) != VERSION:
        raise StateError(f"the stream's version is {version}, not {VERSION}")
    sections: list[Section] = []
    while (marker := reader.number(1, "the next section")) == SECTION_FULL:
        section = _load_section(reader, len(sections), descriptions)
        if any((s.name, s.instance) == (section.name, section.instance) for s in sections):
            raise StateError(f"section {section.name!r} is there twice")
        sections.append(section)
    if marker != EOF:
        after = sections[-1].name if sections else "the header"
        raise StateError(f"surplus data after {after}: a byte {marker:#04x} where a section or the end should be")
    _check_description(reader, sections)
    return sections


def _load_section(reader: Reader, number: int, descriptions: Mapping[str, VMStateDescription]) -> Section:
    if (found := reader.number(4, "a section's number")) != number:
        raise StateError(f"section {number} has the number {found}")
    name = reader.name("a section's name")
    instance = reader.number(4, f"{name}: instance")
    version = reader.number(4, f"{name}: version")
    if name not in descriptions:
        raise StateError(f"section {name!r} is not known here")
    tree = descriptions[name].read(reader, version)
    if (marker := reader.number(1, f"{name}: footer")) != SECTION_FOOTER:
        raise StateError(f"{name}: surplus data: a byte {marker:#04x} where its end should be")
    if (found := reader.number(4, f"{name}: footer")) != number:
        raise StateError(f"{name}: its footer has the number {found}, not {number}")
    return Section(name, tree, instance)


def _check_description(reader: Reader, sections: Sequence[Section]) -> None:
    end = reader.position
    if (marker := reader.number(1, "the description")) != VMDESCRIPTION:
        raise StateError(f"a byte {marker:#04x} where the description should begin")
    text = reader.take(reader.number(4, "the description"), "the description")
    if reader.left:
        raise StateError(f"surplus data: {reader.left} bytes after the description")
    described = parse_json(text)
    checksum = zlib.crc32(reader.data[:end])
    if described.get("checksum") != checksum:
        raise StateError(f"the state is damaged: its checksum is {checksum}, it says {described.get('checksum')!r}")
    devices = described.get("devices")
    names = [d.get("name") for d in devices if isinstance(d, dict)] if isinstance(devices, list) else None
    if names != [section.name for section in sections]:
        raise StateError("the description names other sections than there are")


def parse_json(text: bytes) -> Json:
    """Return the JSON object in `text`; raise StateError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise StateError("the description is not JSON") from None
    if not isinstance(value, dict):
        raise StateError("the description is not a JSON object")
    return value
