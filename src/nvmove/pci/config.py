"""Configuration space as QEMU's nvme device presents it: the same bytes at the same offsets, the same bits writable.

Measured with QEMU 11.1.3 through qtest (all ones, then all zeroes, into each register) and lspci in a guest. The one
thing that depends on where the function sits, PCI Express type Endpoint or Root Complex Integrated Endpoint, is QEMU's
vfio layer's work: we are an Endpoint, as QEMU's nvme is behind a root port.

Not here: what BARs and COMMAND do. QEMU maps the BARs by its own copy of these registers; ours only records them.
"""

from __future__ import annotations

import struct

from nvmove.nvme.config import ControllerConfig
from nvmove.vmstate.schema import StateError

CONFIG_SIZE = 4096
"""PCI Express configuration space, bytes (PCIe Base 4.0 §7.2.1)."""

# Offsets in the type 0 header (PCIe Base 4.0 §7.5.1).
COMMAND, STATUS = 0x04, 0x06
BAR0 = 0x10
STATUS_INTERRUPT = 1 << 3

# Where QEMU's nvme has its capabilities.
MSIX_CAP, PM_CAP, EXPRESS_CAP = 0x40, 0x60, 0x80
MSIX_CONTROL = MSIX_CAP + 2
MSIX_ENABLE, MSIX_FUNCTION_MASK = 1 << 15, 1 << 14
"""MSI-X Message Control (PCIe Base 4.0 §7.7.2.2)."""
PM_CONTROL = PM_CAP + 4
DEVICE_CONTROL = EXPRESS_CAP + 8
INITIATE_FLR = 1 << 15
"""Device Control: Initiate Function Level Reset (PCIe Base 4.0 §7.5.3.4). Reads as zero."""

_VENDOR_QEMU = (0x1B36, 0x0010)
_VENDOR_INTEL = (0x8086, 0x5845)
_SUBSYSTEM = (0x1AF4, 0x1100)
_CLASS_NVME = (0x02, 0x08, 0x01)
_REVISION = 2

_DOORBELLS = 0x1000
"""Offset of the doorbells in BAR0 (NVMe PCIe Transport 1.0 §3.1.2)."""
_PAGE = 0x1000
_MSIX_ENTRY = 16


class BarLayout:
    """What is where in BAR0: registers, doorbells at 0x1000, MSI-X table and PBA, a page each or more, as in QEMU."""

    def __init__(self, max_ioqpairs: int, msix_qsize: int) -> None:
        self.table = _page_up(_DOORBELLS + 8 * (max_ioqpairs + 1))
        self.table_size = _MSIX_ENTRY * msix_qsize
        self.pba = _page_up(self.table + self.table_size)
        self.pba_size = -(-msix_qsize // 64) * 8
        self.size = 1 << (self.pba + self.pba_size - 1).bit_length()


class ConfigSpace:
    """4096 bytes and which of their bits the guest may write."""

    def __init__(self, config: ControllerConfig) -> None:
        self.layout = BarLayout(config.max_ioqpairs, config.msix_qsize)
        self._initial = bytes(_initial(config, self.layout))
        self._writable = bytes(_writable(self.layout))
        self._data = bytearray(self._initial)

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest has set MSI-X Enable."""
        return bool(self._word(MSIX_CONTROL) & MSIX_ENABLE)

    def read(self, offset: int, count: int, intx: bool = False) -> bytes:
        """Return `count` bytes; `intx` is the level of the pin, which the Status register shows."""
        data = bytearray(self._data[offset : offset + count])
        if intx and offset <= STATUS < offset + count:
            data[STATUS - offset] |= STATUS_INTERRUPT
        return bytes(data)

    def write(self, offset: int, data: bytes) -> bool:
        """Store what may be stored; return whether the guest asked for a function-level reset."""
        for position, value in enumerate(data, offset):
            mask = self._writable[position]
            self._data[position] = self._data[position] & ~mask | value & mask
        high = DEVICE_CONTROL + 1 - offset
        return 0 <= high < len(data) and bool(data[high] & INITIATE_FLR >> 8)

    def reset(self) -> None:
        """Every register as after power-on."""
        self._data[:] = self._initial

    def save(self) -> bytes:
        """Return all 4096 bytes."""
        return bytes(self._data)

    def check(self, saved: bytes) -> None:
        """Raise StateError when `saved` cannot be this function's: its read-only bits are the configuration."""
        if len(saved) != CONFIG_SIZE:
            raise StateError(f"PCI configuration space of {len(saved)} bytes, expected {CONFIG_SIZE}")
        for offset, (ours, theirs, writable) in enumerate(zip(self._initial, saved, self._writable, strict=True)):
            if (ours ^ theirs) & ~writable:
                where = f"PCI configuration space at {offset:#x}"
                raise StateError(f"{where} is {ours:#04x} here, and was {theirs:#04x} when saved")

    def load(self, saved: bytes) -> None:
        """Take over saved bytes. Raises StateError, with nothing changed, where `check` does."""
        self.check(saved)
        self._data[:] = saved

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._data[offset : offset + 2], "little")


def _initial(config: ControllerConfig, layout: BarLayout) -> bytearray:
    data = bytearray(CONFIG_SIZE)
    vendor, device = _VENDOR_INTEL if config.use_intel_id else _VENDOR_QEMU
    struct.pack_into("<HHHH", data, 0, vendor, device, 0, 0x0010)  # Status: capabilities list
    struct.pack_into("<BBBB", data, 0x08, _REVISION, *_CLASS_NVME)
    struct.pack_into("<I", data, BAR0, 0x4)  # memory, 64 bits, not prefetchable
    struct.pack_into("<HH", data, 0x2C, *_SUBSYSTEM)
    data[0x34] = MSIX_CAP
    data[0x3D] = 1  # INTA#
    struct.pack_into("<BBHII", data, MSIX_CAP, 0x11, EXPRESS_CAP, config.msix_qsize - 1, layout.table, layout.pba)
    struct.pack_into("<BBHHH", data, PM_CAP, 0x01, 0, 0x0003, 0x0008, 0)  # version 3, No_Soft_Reset
    struct.pack_into(
        "<BBHIHHIHH",
        data,
        EXPRESS_CAP,
        0x10,
        PM_CAP,
        0x0002,  # version 2, Endpoint
        0x10008020,  # Function Level Reset, Role-Based Error Reporting, Extended Tags
        0,
        0,
        0x00000411,  # link: 2.5 GT/s, x1, ASPM L0s
        0,
        0x0011,
    )
    struct.pack_into("<I", data, EXPRESS_CAP + 0x24, 0x00300000)  # Extended Fmt, End-End TLP Prefixes
    return data


def _writable(layout: BarLayout) -> bytearray:
    mask = bytearray(CONFIG_SIZE)
    struct.pack_into("<H", mask, COMMAND, 0x0507)  # I/O, memory, bus master, SERR#, INTx disable
    mask[0x0C] = 0xFF  # cache line size
    struct.pack_into("<Q", mask, BAR0, -layout.size & (1 << 64) - 1)
    mask[0x3C] = 0xFF  # interrupt line
    # What no capability covers in the first 256 bytes is memory in QEMU's devices.
    for start, end in ((0x4C, 0x60), (0x68, 0x80), (0xBC, 0x100)):
        mask[start:end] = b"\xff" * (end - start)
    struct.pack_into("<H", mask, MSIX_CONTROL, MSIX_ENABLE | MSIX_FUNCTION_MASK)
    struct.pack_into("<H", mask, PM_CONTROL, 0x0003)  # PowerState
    struct.pack_into("<H", mask, DEVICE_CONTROL, 0x000F)  # error reporting enables
    struct.pack_into("<H", mask, EXPRESS_CAP + 0x28, 0x8000)  # Device Control 2: End-End TLP Prefix Blocking
    return mask


def _page_up(value: int) -> int:
    return -(-value // _PAGE) * _PAGE
