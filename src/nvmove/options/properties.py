"""Every property of QEMU 11.1's `-device nvme` and `-device nvme-ns`: its type, and what nvmove does with it.

The list is that of `qemu-system-x86_64 -device nvme,help`; a test compares it with the sysroot's QEMU.
`OWN` and `OWN_CONTROLLER` come on top.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from nvmove.options import syntax
from nvmove.options.syntax import Option


class Use(enum.Enum):
    """Who takes a property."""

    NVMOVE = "configuration of the controller, the namespace or the drive"
    PCI = "goes to the vfio-user-pci device, unread"
    DEFAULT = "accepted with QEMU's default only: what else it could say is not supported yet"


class Kind(enum.Enum):
    """How QEMU reads a value."""

    TEXT = "str"
    BOOL = "bool"
    AUTO = "OnOffAuto"
    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"
    INT32 = "int32"
    UINT64 = "uint64"
    SIZE = "size"
    ON_ERROR = "BlockdevOnError"
    OWNER = "ImageOwner"


class Property(NamedTuple):
    """One property; `default` is QEMU's."""

    kind: Kind
    use: Use = Use.NVMOVE
    default: str | int | bool | None = None


_T, _B, _A, _SZ = Kind.TEXT, Kind.BOOL, Kind.AUTO, Kind.SIZE
_8, _16, _32, _64 = Kind.UINT8, Kind.UINT16, Kind.UINT32, Kind.UINT64
_D, _P = Use.DEFAULT, Use.PCI

OWN: Mapping[str, Property] = {
    # QEMU's nvme has no such properties, but its virtio-blk and scsi-hd have them
    "werror": Property(Kind.ON_ERROR, default="auto"),
    "rerror": Property(Kind.ON_ERROR, default="auto"),
    # who opens the drive's image: QEMU, so that its block jobs reach it, or nvmove, which is faster
    "image-owner": Property(Kind.OWNER, default="auto"),
}

_OWNERS = ("auto", "qemu", "nvmove")
OWN_CONTROLLER: Mapping[str, Property] = {
    "x-doorbells": Property(Kind.TEXT, default="messages"),
}

_ON_ERROR = ("report", "ignore", "enospc", "stop", "auto")

_BLOCK: Mapping[str, Property] = {
    **OWN,
    "drive": Property(_T),
    "logical_block_size": Property(_SZ, default=0),
    "physical_block_size": Property(_SZ, default=0),
    "min_io_size": Property(_SZ, default=0),
    "opt_io_size": Property(_SZ, default=0),
    "discard_granularity": Property(_SZ, default=0xFFFFFFFF),
    "write-cache": Property(_A, default="auto"),
    "share-rw": Property(_B, default=False),
    "backend_defaults": Property(_A, _D, "auto"),
    "account-failed": Property(_A, _D, "auto"),
    "account-invalid": Property(_A, _D, "auto"),
    "stats-intervals": Property(_T, _D),
}

_PCI: Mapping[str, Property] = {
    "acpi-index": Property(_32, _P),
    "addr": Property(_T, _P),
    "bootindex": Property(Kind.INT32, _P),
    "bus": Property(_T, _P),
    "busnr": Property(_T, _P),
    "failover_pair_id": Property(_T, _P),
    "multifunction": Property(_B, _P),
    "rombar": Property(Kind.INT32, _P),
    "romfile": Property(_T, _P),
    "romsize": Property(_32, _P),
    "sriov-pf": Property(_T, _P),
    "x-max-bounce-buffer-size": Property(_SZ, _P),
    "x-pcie-ari-nextfn-1": Property(_B, _P),
    "x-pcie-err-unc-mask": Property(_B, _P),
    "x-pcie-ext-tag": Property(_B, _P),
    "x-pcie-lnksta-dllla": Property(_B, _P),
}

CONTROLLER: Mapping[str, Property] = {
    "driver": Property(_T),
    "id": Property(_T),
    **_BLOCK,
    **_PCI,
    **OWN_CONTROLLER,
    "aer_max_queued": Property(_32, default=64),
    "aerl": Property(_8, default=3),
    "atomic.awun": Property(_16, _D, 0),
    "atomic.awupf": Property(_16, _D, 0),
    "atomic.dn": Property(_B, _D, False),
    "cmb_size_mb": Property(_32, _D, 0),
    "ctratt.mem": Property(_B, _D, False),
    "dbcs": Property(_B, default=True),
    "firmware-version": Property(_T),
    "ioeventfd": Property(_B, _D, False),
    "legacy-cmb": Property(_B, _D, False),
    "max_ioqpairs": Property(_32, default=64),
    "mdts": Property(_8, default=7),
    "model": Property(_T, default="QEMU NVMe Ctrl"),
    "mqes": Property(_16, default=2047),
    "msix-exclusive-bar": Property(_B, _D, False),
    "msix_qsize": Property(_16, default=65),
    "num_queues": Property(_32, default=0),
    "ocp": Property(_B, _D, False),
    "pmrdev": Property(_T, _D),
    "serial": Property(_T),
    "smart_critical_warning": Property(_8, default=0),
    "spdm_port": Property(_16, _D, 0),
    "spdm_trans": Property(_T, _D, "doe"),
    "sriov_max_vfs": Property(_16, _D, 0),
    "sriov_max_vi_per_vf": Property(_32, _D, 0),
    "sriov_max_vq_per_vf": Property(_32, _D, 0),
    "sriov_vi_flexible": Property(_16, _D, 0),
    "sriov_vq_flexible": Property(_16, _D, 0),
    "subsys": Property(_T, _D),
    "use-intel-id": Property(_B, default=False),
    "vsl": Property(_8, default=7),
    "zoned.auto_transition": Property(_B, _D, True),
    "zoned.zasl": Property(_8, _D, 0),
}

NAMESPACE: Mapping[str, Property] = {
    "driver": Property(_T),
    "id": Property(_T),
    "bus": Property(_T),
    **_BLOCK,
    "atomic.nabo": Property(_16, _D, 0),
    "atomic.nabsn": Property(_16, _D, 0),
    "atomic.nabspf": Property(_16, _D, 0),
    "atomic.nawun": Property(_16, _D, 0),
    "atomic.nawupf": Property(_16, _D, 0),
    "bootindex": Property(Kind.INT32, _D),
    "detached": Property(_B, default=False),
    "eui64": Property(_64, default=0),
    "eui64-default": Property(_B, default=False),
    "fdp.ruhs": Property(_T, _D),
    "mcl": Property(_32, default=128),
    "ms": Property(_16, _D, 0),
    "mset": Property(_8, _D, 0),
    "msrc": Property(_8, default=127),
    "mssrl": Property(_16, default=128),
    "nguid": Property(_T),
    "nsid": Property(_32, default=0),
    "pi": Property(_8, _D, 0),
    "pif": Property(_8, _D, 0),
    "pil": Property(_8, _D, 0),
    "shared": Property(_B, default=True),
    "uuid": Property(_T),
    "zoned": Property(_B, _D, False),
    "zoned.cross_read": Property(_B, _D, False),
    "zoned.descr_ext_size": Property(_32, _D, 0),
    "zoned.max_active": Property(_32, _D, 0),
    "zoned.max_open": Property(_32, _D, 0),
    "zoned.numzrwa": Property(_32, _D, 0),
    "zoned.zone_capacity": Property(_SZ, _D, 0),
    "zoned.zone_size": Property(_SZ, _D, 128 << 20),
    "zoned.zrwafg": Property(_SZ, _D, (1 << 64) - 1),
    "zoned.zrwas": Property(_SZ, _D, 0),
}

PROPERTIES: Mapping[str, Mapping[str, Property]] = {"nvme": CONTROLLER, "nvme-ns": NAMESPACE}

_BITS = {Kind.UINT8: 8, Kind.UINT16: 16, Kind.UINT32: 32, Kind.UINT64: 64}


class Values:
    """The values of one device, read by type; what was not given has QEMU's default."""

    def __init__(self, option: Option, driver: str) -> None:
        """Check every name and value of `option`; raises OptionError in QEMU's words."""
        self.option = option
        self._table = PROPERTIES[driver]
        for name in option.values:
            if name not in self._table:
                raise option.error(f"Property '{driver}.{name}' not found")
            known = self._table[name]
            value = self._read(name)
            if known.use is Use.DEFAULT and value != known.default:
                raise option.error(f"property '{name}' is not supported yet")

    def text(self, name: str) -> str:
        """Return a string; empty when there is none."""
        value = self._read(name)
        return "" if value is None else str(value)

    def number(self, name: str) -> int:
        """Return an integer or a size in bytes."""
        value = self._read(name)
        assert isinstance(value, int)
        return value

    def switch(self, name: str) -> bool:
        """Return a bool."""
        return self._read(name) is True

    def pci(self) -> dict[str, str | int | bool]:
        """Return what the vfio-user-pci device is to have, typed as its JSON form wants it."""
        found: dict[str, str | int | bool] = {}
        for name in self.option.values:
            if self._table[name].use is Use.PCI and (value := self._read(name)) is not None:
                found[name] = value
        return found

    def _read(self, name: str) -> str | int | bool | None:
        known = self._table[name]
        if name not in self.option.values:
            return known.default
        option = self.option
        if known.kind is Kind.BOOL:
            return syntax.boolean(option, name, False)
        if known.kind is Kind.SIZE:
            return syntax.size(option, name, 0)
        if known.kind is Kind.INT32:
            return syntax.signed(option, name, 0)
        if known.kind is Kind.AUTO:
            return syntax.on_off_auto(option, name)
        if known.kind is Kind.ON_ERROR:
            return _on_error(option, name)
        if known.kind is Kind.OWNER:
            return _enumerated(option, name, _OWNERS)
        if known.kind is Kind.TEXT:
            if option.is_json and name == "addr" and isinstance(option.values[name], int):
                return int(option.values[name])  # a PCI address may be a number there
            return option.get(name)
        return syntax.integer(option, name, 0, _BITS[known.kind])


def _on_error(option: Option, name: str) -> str:
    value = _enumerated(option, name, _ON_ERROR)
    if name == "rerror" and value == "enospc":
        raise option.error(f"'{value}' invalid read error action")  # as -drive says: no read needs room
    return value


def _enumerated(option: Option, name: str, values: tuple[str, ...]) -> str:
    value = option.get(name)
    if value not in values:
        raise option.error(f"Parameter '{name}' does not accept value '{value}'")
    return value
