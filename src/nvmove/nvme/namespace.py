"""Namespaces: a disk with a geometry, an identity, and whether it is attached (Base 3.2.1).

Namespace ids count from 1; a namespace that is configured is allocated, and active while it is attached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from nvmove.block.backend import Backend
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.counters import Counters
from nvmove.nvme.errors import CommandError
from nvmove.nvme.spec import ALL_NAMESPACES, CSI_NVM, LOCATION_CDW10, LOCATION_NSID, MAX_NAMESPACES, Status
from nvmove.nvme.state import saved as state


class LbaFormat(NamedTuple):
    """An LBA format. `shift` is log2 of the block's bytes; 0: this index is not available (NVM 4.1.5.1, LBADS)."""

    shift: int


LISTED_FORMATS = tuple(LbaFormat(shift) for shift in (9, 0, 0, 0, 12, 0, 0, 0))
"""The formats by QEMU's indices: those with metadata, which nvmove does not have, are listed as not available."""
DEFAULT_DISCARD_GRANULARITY = 4096
"""QEMU's, when the block is not larger."""


def lba_formats(block_size: int) -> tuple[LbaFormat, ...]:
    """Return the formats of a namespace configured with `block_size` bytes: an uncommon size comes last, as QEMU's."""
    wanted = LbaFormat(block_size.bit_length() - 1)
    return LISTED_FORMATS if wanted in LISTED_FORMATS else (*LISTED_FORMATS, wanted)


class Namespace:
    """One namespace. What changes (`format_index`, `attached`, …) changes with the controller's lock held."""

    def __init__(self, nsid: int, config: NamespaceConfig, backend: Backend) -> None:
        self.nsid = nsid
        self.config = config
        self.backend = backend
        self.formats = lba_formats(config.logical_block_size)
        self.format_index = self.formats.index(LbaFormat(config.logical_block_size.bit_length() - 1))
        self.attached = not config.detached
        self.error_recovery = 0
        """Feature 05h: dword 11 as the guest set it."""
        self.cluster_size = 0
        """Bytes that the image allocates at once, where that is known: qcow2's clusters."""
        self.counters = Counters()
        self.formatting = False
        """A Format NVM is under way; it ends before a save."""

    csi = CSI_NVM
    """Command Set Identifier."""

    @property
    def block_shift(self) -> int:
        """log2 of the logical block size in bytes."""
        return self.formats[self.format_index].shift

    @property
    def block_size(self) -> int:
        """Logical block size in bytes."""
        return 1 << self.block_shift

    @property
    def blocks(self) -> int:
        """NSZE: logical blocks; a rest at the end of the image that is no whole block is not used."""
        return self.backend.size >> self.block_shift

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.backend.read_only

    @property
    def discard_granularity(self) -> int:
        """Bytes that should be deallocated together, never less than a block or, as with QEMU's, a cluster."""
        wanted = self.config.discard_granularity or DEFAULT_DISCARD_GRANULARITY
        return max(wanted, self.block_size, self.cluster_size)

    def byte_range(self, lba: int, blocks: int) -> tuple[int, int]:
        """Return offset and length in bytes of `blocks` blocks from `lba`; raise CommandError outside the namespace."""
        if lba + blocks > self.blocks:
            raise CommandError(Status.LBA_OUT_OF_RANGE, location=LOCATION_CDW10, lba=lba)
        return lba << self.block_shift, blocks << self.block_shift

    def reset(self) -> None:
        """Controller level reset: features of the namespace return to their defaults."""
        self.error_recovery = 0

    def save(self) -> state.NamespaceState:
        """Return identity and changeable part as plain data."""
        return state.NamespaceState(
            nsid=self.nsid,
            attached=self.attached,
            blocks=self.blocks,
            block_shift=self.block_shift,
            uuid=self.config.uuid.bytes,
            nguid=self.config.nguid,
            eui64=self.config.eui64,
            read_only=self.read_only,
            error_recovery=self.error_recovery,
        )

    def load(self, saved: state.NamespaceState) -> None:
        """Take the changeable part of `saved`, which was checked against this namespace."""
        self.format_index = self.formats.index(LbaFormat(saved.block_shift))
        self.attached = saved.attached
        self.error_recovery = saved.error_recovery


class NamespaceTable:
    """The namespaces of a controller by id; iterating gives all of them, attached or not, in order of id.

    Raises ValueError when the configuration asks for an id that is taken or out of range, or for too many namespaces.
    """

    def __init__(self, config: ControllerConfig, backends: Mapping[str, Backend]) -> None:
        self._by_id: dict[int, Namespace] = {}
        self._by_backend: dict[int, Namespace] = {}
        fixed = [namespace for namespace in config.namespaces if namespace.nsid]
        free = [namespace for namespace in config.namespaces if not namespace.nsid]
        for namespace in fixed:
            if not 1 <= namespace.nsid <= MAX_NAMESPACES:
                raise ValueError(f"namespace id {namespace.nsid}: must be 1 to {MAX_NAMESPACES}")
            if namespace.nsid in self._by_id:
                raise ValueError(f"namespace id {namespace.nsid}: given to two namespaces")
            self._add(namespace.nsid, namespace, backends)
        for namespace in free:
            nsid = next((n for n in range(1, MAX_NAMESPACES + 1) if n not in self._by_id), None)
            if nsid is None:
                raise ValueError(f"a controller has at most {MAX_NAMESPACES} namespaces")
            self._add(nsid, namespace, backends)
        self._by_id = dict(sorted(self._by_id.items()))

    def _add(self, nsid: int, config: NamespaceConfig, backends: Mapping[str, Backend]) -> None:
        namespace = Namespace(nsid, config, backends[config.drive])
        self._by_id[nsid] = namespace
        self._by_backend.setdefault(id(namespace.backend), namespace)

    def __iter__(self) -> Iterator[Namespace]:
        return iter(self._by_id.values())

    @property
    def active(self) -> list[Namespace]:
        """The attached ones."""
        return [namespace for namespace in self if namespace.attached]

    def get(self, nsid: int) -> Namespace | None:
        """Return the allocated namespace `nsid`."""
        return self._by_id.get(nsid)

    def of(self, backend: Backend) -> Namespace:
        """Return the namespace on `backend`, which is one of ours."""
        return self._by_backend[id(backend)]

    def find(self, nsid: int) -> Namespace | None:
        """Return the allocated namespace `nsid`, or None for a valid id without one; raise CommandError otherwise."""
        check_nsid(nsid)
        return self._by_id.get(nsid)

    def require_active(self, nsid: int) -> Namespace:
        """Return the attached namespace `nsid`; raise CommandError: an invalid id, or an inactive one (Base 3.2.1)."""
        namespace = self.find(nsid)
        if namespace is None or not namespace.attached:
            raise CommandError(Status.INVALID_FIELD, location=LOCATION_NSID)
        return namespace

    def reset(self) -> None:
        """Controller level reset."""
        for namespace in self:
            namespace.reset()


def check_nsid(nsid: int) -> None:
    """Raise CommandError when `nsid` names no single namespace that could exist (Base 3.2.1.2)."""
    if not 1 <= nsid <= MAX_NAMESPACES:
        raise CommandError(Status.INVALID_NAMESPACE, location=LOCATION_NSID)


def selected(table: NamespaceTable, nsid: int) -> list[Namespace]:
    """Return the attached namespaces that `nsid` stands for, FFFFFFFFh all of them; raise CommandError."""
    return table.active if nsid == ALL_NAMESPACES else [table.require_active(nsid)]
