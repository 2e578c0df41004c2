"""Sections in a migration stream that QEMU wrote, found without reading its gigabytes of RAM.

The description at the stream's end (JSON) tells every device section's size, and these sections lie one after the other
right before it. So they are found from the end, whatever form the RAM before them has (mapped-ram, multifd, compressed,
XBZRLE), and each one's header and footer is checked to be where it must be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nvmove.vmstate.schema import Reader, StateError
from nvmove.vmstate.source import Source
from nvmove.vmstate.stream import EOF, MAGIC, SECTION_FOOTER, SECTION_FULL, parse_json
from nvmove.vmstate.tree import Json

TAILS = (1 << 20, 1 << 26)
"""Bytes at the end in which the description is looked for; it has tens of kilobytes, megabytes for hundreds of CPUs."""
DBUS_VMSTATE = "dbus-vmstate"


@dataclass(frozen=True, slots=True)
class QemuSection:
    """A device's section in a stream of QEMU's."""

    name: str
    """QEMU's idstr: `0000:00:01.0/nvme`."""
    instance: int
    kind: str
    """The description's name: `nvme`."""
    version: int
    body: bytes


class QemuFile:
    """A migration stream; raises StateError where it is none, or was written without its description."""

    def __init__(self, source: Source) -> None:
        self._source = source
        if source.size < len(MAGIC) or source.read_at(0, len(MAGIC)) != MAGIC:
            raise StateError("not a QEMU migration stream")
        self._end, self.description = self._find_description()

    def _find_description(self) -> tuple[int, Json]:
        for length in TAILS:
            tail_size = min(length, self._source.size)
            tail = self._source.read_at(self._source.size - tail_size, tail_size)
            for match in re.finditer(rb"(?=\x06(....)\{)", tail, re.DOTALL):
                if int.from_bytes(match[1], "big") == tail_size - match.start() - 5:
                    position = self._source.size - tail_size + match.start()
                    return position, parse_json(tail[match.start() + 5 :])
        raise StateError(
            "no description at the end of the migration stream: it is truncated, or the machine had suppress-vmdesc=on"
        )

    def sections(self) -> Iterator[QemuSection]:
        """Yield the device sections, the last one first, as far as they lie together before the description."""
        position = self._end
        if position and self._source.read_at(position - 1, 1)[0] == EOF:
            position -= 1
        for device in reversed(_devices(self.description)):
            found = self._section_before(position, device)
            if found is None:
                return  # early devices' sections lie before the RAM: not with the others
            position, section = found
            yield section

    def find(self, kind: str) -> list[QemuSection]:
        """Return the sections of this kind, in the stream's order."""
        return [section for section in self.sections() if section.kind == kind][::-1]

    def _section_before(self, end: int, device: Json) -> tuple[int, QemuSection] | None:
        name, body_size = device.get("name"), _size(device)
        if not isinstance(name, str) or not name.isascii():
            raise StateError(f"the description names a device {name!r}")
        header = 1 + 4 + 1 + len(name) + 4 + 4
        start = end - header - body_size - 5
        if start < len(MAGIC):
            return None
        reader = Reader(self._source.read_at(start, header))
        marker, number = reader.number(1, name), reader.number(4, name)
        footer = bytes([SECTION_FOOTER]) + number.to_bytes(4, "big")
        if marker != SECTION_FULL or self._source.read_at(end - 5, 5) != footer:
            return None
        if reader.take(1 + len(name), name) != bytes([len(name)]) + name.encode():
            return None
        instance, version = reader.number(4, name), reader.number(4, name)
        body = self._source.read_at(start + header, body_size)
        return start, QemuSection(name, instance, str(device.get("vmsd_name", name)), version, body)


def dbus_states(section: QemuSection) -> dict[str, bytes]:
    """Return what each helper saved, by Id, in the section of QEMU's `dbus-vmstate` object; raise StateError.

    A size, a number of helpers (both uint32), then of each its Id and its data, each with its length before it.
    QEMU writes its whole buffer: what follows the last helper means nothing.
    """
    reader = Reader(section.body)
    path = section.name
    reader.number(4, f"{path}: size")
    states: dict[str, bytes] = {}
    for _ in range(reader.number(4, f"{path}: number of helpers")):
        ident = reader.take(reader.number(4, f"{path}: length of an Id"), f"{path}: an Id").decode(errors="replace")
        states[ident] = reader.take(reader.number(4, f"{path}: length of {ident}"), f"{path}: data of {ident}")
    return states


def _devices(description: Json) -> list[Json]:
    devices = description.get("devices")
    if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices):
        raise StateError("the description at the end of the stream lists no devices")
    return devices


def _size(described: Json) -> int:
    """Return the bytes of a section's or subsection's fields and subsections."""
    size = 0
    for field in _listed(described, "fields"):
        one, count = field.get("size"), field.get("array_len", 1)
        if not isinstance(one, int) or not isinstance(count, int) or one < 0 or count < 0:
            raise StateError(f"the description gives {field.get('name')!r} no size")
        size += one * count
    for sub in _listed(described, "subsections"):
        size += 1 + 1 + len(str(sub.get("vmsd_name"))) + 4 + _size(sub)
    return size


def _listed(described: Json, key: str) -> list[Json]:
    found = described.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise StateError(f"the description's {key!r} is no list")
    return found
