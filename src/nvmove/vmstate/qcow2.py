"""Internal snapshots of a qcow2 image, read only as far as the VM state in one of them needs it.

VM state lies after the end of the virtual disk, mapped by the snapshot's own L1 table. (QEMU's docs/interop/qcow2.)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nvmove.vmstate.schema import StateError
from nvmove.vmstate.source import Source

MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""magic, version, backing file (2), cluster_bits, size, crypt_method, l1 (2), refcount (2), snapshots (2)."""
INCOMPATIBLE = 72
"""Offset of the incompatible feature bits (version 3)."""
EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = 1 << 2, 1 << 3, 1 << 4
KNOWN_INCOMPATIBLE = 0b11 | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2
"""Dirty and corrupt, which do not change the format, and those named."""
SNAPSHOT = struct.Struct(">QIHHIIQII")
"""L1 table (offset, entries), lengths of id and name, date (s, ns), VM clock (ns), sizes of VM state and extra data."""
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62
ALL_ZEROES = 1
MAX_SNAPSHOTS = 65536
MAX_L1 = 1 << 22
"""Entries: QEMU takes L1 tables of up to 32 MiB."""
MAX_EXTRA = 1024


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An entry of the snapshot table."""

    ident: str
    name: str
    l1_offset: int
    l1_size: int
    """Entries."""
    vm_state_size: int
    """Bytes; 0 when the snapshot is of the disk alone."""
    disk_size: int
    seconds: int
    """When it was taken, since the epoch."""


class Qcow2:
    """An image; raises StateError where it is none, or of a form that is not read here."""

    def __init__(self, source: Source) -> None:
        self._source = source
        header = HEADER.unpack(source.read_at(0, HEADER.size))
        magic, version, _, _, self.cluster_bits, self.size, crypt, *_, count, offset = header
        if magic != MAGIC:
            raise StateError("not a qcow2 image")
        if version not in (2, 3) or not 9 <= self.cluster_bits <= 21:
            raise StateError(
                f"a qcow2 image of version {version} with clusters of 2^{self.cluster_bits} bytes: not known"
            )
        features = int.from_bytes(source.read_at(INCOMPATIBLE, 8), "big") if version == 3 else 0
        if features & ~KNOWN_INCOMPATIBLE:
            raise StateError(f"a qcow2 image with unknown incompatible features ({features:#x})")
        if crypt:
            raise StateError("the image is encrypted: its VM state cannot be read without QEMU")
        if features & EXTERNAL_DATA:
            raise StateError("the image has an external data file, where VM state cannot be read from here")
        self._l2_entry = 16 if features & EXTENDED_L2 else 8
        self.snapshots = self._read_snapshots(count, offset)

    def _read_snapshots(self, count: int, offset: int) -> list[Snapshot]:
        if count > MAX_SNAPSHOTS:
            raise StateError(f"the image claims to have {count} snapshots")
        snapshots = []
        for _ in range(count):
            fixed = SNAPSHOT.unpack(self._source.read_at(offset, SNAPSHOT.size))
            l1_offset, l1_size, id_length, name_length, seconds, _, _, vm_state_size, extra_length = fixed
            if extra_length > MAX_EXTRA or l1_size > MAX_L1:
                raise StateError("the image's snapshot table is damaged")
            extra = self._source.read_at(offset + SNAPSHOT.size, extra_length)
            names = self._source.read_at(offset + SNAPSHOT.size + extra_length, id_length + name_length)
            snapshots.append(
                Snapshot(
                    ident=names[:id_length].decode(errors="replace"),
                    name=names[id_length:].decode(errors="replace"),
                    l1_offset=l1_offset,
                    l1_size=l1_size,
                    vm_state_size=int.from_bytes(extra[:8], "big") if extra_length >= 8 else vm_state_size,
                    disk_size=int.from_bytes(extra[8:16], "big") if extra_length >= 16 else self.size,
                    seconds=seconds,
                )
            )
            length = SNAPSHOT.size + extra_length + id_length + name_length
            offset += (length + 7) & ~7
        return snapshots

    def vm_state(self, snapshot: Snapshot) -> VmState:
        """Return the VM state of `snapshot`."""
        table = self._source.read_at(snapshot.l1_offset, 8 * snapshot.l1_size)
        l1 = struct.unpack(f">{snapshot.l1_size}Q", table)
        return VmState(self._source, l1, self.cluster_bits, self._l2_entry, snapshot)


class VmState:
    """The VM state of a snapshot, as a Source."""

    def __init__(
        self, source: Source, l1: tuple[int, ...], cluster_bits: int, l2_entry: int, snapshot: Snapshot
    ) -> None:
        self.size = snapshot.vm_state_size
        self._source = source
        self._l1 = l1
        self._cluster = 1 << cluster_bits
        self._l2_entry = l2_entry
        self._l2_entries = self._cluster // l2_entry
        reach = self._cluster * self._l2_entries
        self._start = -(-snapshot.disk_size // reach) * reach

    def read_at(self, offset: int, length: int) -> bytes:
        """See Source."""
        if offset < 0 or offset + length > self.size:
            raise StateError(f"truncated: {length} bytes at {offset} expected, the VM state has {self.size}")
        out = bytearray()
        position = self._start + offset
        while len(out) < length:
            within = position % self._cluster
            size = min(self._cluster - within, length - len(out))
            host = self._map(position // self._cluster)
            out += bytes(size) if host is None else self._source.read_at(host + within, size)
            position += size
        return bytes(out)

    def _map(self, cluster: int) -> int | None:
        """Return where a cluster lies in the file, None where it reads as zeroes."""
        index, entry = divmod(cluster, self._l2_entries)
        table = self._l1[index] & OFFSET_MASK if index < len(self._l1) else 0
        if not table:
            return None
        raw = self._source.read_at(table + entry * self._l2_entry, 8)
        value = int.from_bytes(raw, "big")
        if value & COMPRESSED:
            raise StateError("the VM state has compressed clusters, which cannot be read here")
        if not value & OFFSET_MASK or (self._l2_entry == 8 and value & ALL_ZEROES):
            return None
        return value & OFFSET_MASK
