"""Where a function sits on the guest's PCI buses, and its configuration space through ports 0xcf8/0xcfc.

Every access is an HMP command `o` or `i` on a stopped VM, so that QEMU itself sees it as the guest's
(docs/design.md, "Saving and loading"). In HMP, `/b`, `/h` and `/w` are 8, 16 and 32 bits.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

Hmp = Callable[[str], Awaitable[str]]
"""Runs one HMP command line and returns what it prints."""

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC


class ReplayError(Exception):
    """QEMU did not do what was asked of it: one line."""


@dataclass(frozen=True, slots=True)
class PciAddress:
    """Bus number as the guest assigned it, slot and function."""

    bus: int
    slot: int
    function: int

    def config_address(self, register: int) -> int:
        """Return the CONFIG_ADDRESS value that selects the dword of `register` (PCI Local Bus 3.0, 3.2.2.3.2)."""
        return 0x8000_0000 | self.bus << 16 | self.slot << 11 | self.function << 8 | (register & 0xFC)


def _functions(buses: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for bus in buses:
        for device in bus["devices"]:
            yield device
            yield from _functions([device["pci_bridge"]] if "devices" in device.get("pci_bridge", {}) else [])


def find(query_pci: list[dict[str, Any]], qdev_id: str) -> PciAddress:
    """Return where the device with `qdev_id` is, in the answer of QMP `query-pci`; raise ReplayError."""
    for device in _functions(query_pci):
        if device["qdev_id"] == qdev_id:
            return PciAddress(device["bus"], device["slot"], device["function"])
    raise ReplayError(f"QEMU's query-pci does not show the device '{qdev_id}'")


class ConfigSpace:
    """The first 256 bytes of one function's configuration space."""

    def __init__(self, hmp: Hmp, address: PciAddress) -> None:
        self._hmp = hmp
        self._address = address

    async def _select(self, register: int) -> None:
        await self._run(f"o /w {CONFIG_ADDRESS:#x} {self._address.config_address(register):#x}")

    async def _run(self, line: str) -> str:
        output = (await self._hmp(line)).strip()
        if line.startswith("o ") and output:
            raise ReplayError(f"QEMU refused '{line}': {output}")
        return output

    async def write32(self, register: int, value: int) -> None:
        """Write a dword; `register` is a multiple of four."""
        await self._select(register)
        await self._run(f"o /w {CONFIG_DATA:#x} {value:#x}")

    async def write16(self, register: int, value: int) -> None:
        """Write a word; `register` is even."""
        await self._select(register)
        await self._run(f"o /h {CONFIG_DATA + register % 4:#x} {value:#x}")

    async def write8(self, register: int, value: int) -> None:
        """Write a byte."""
        await self._select(register)
        await self._run(f"o /b {CONFIG_DATA + register % 4:#x} {value:#x}")

    async def read16(self, register: int) -> int:
        """Read a word; `register` is even."""
        await self._select(register)
        output = await self._run(f"i /h {CONFIG_DATA + register % 4:#x}")
        found = re.search(r"= (0x[0-9a-f]+)", output)
        if found is None:
            raise ReplayError(f"QEMU's answer to an HMP port read is not understood: {output}")
        return int(found[1], 16)
