"""Where a function sits on the guest's PCI buses, and the accesses to its configuration space that a guest would make.

PCs have the ports 0xcf8 and 0xcfc, Arm's and RISC-V's machines a window of memory (ECAM: PCI Express Base, 7.2.2).
Where that is, QEMU tells in HMP `info mtree`. Other machines may have one of both, and are refused: nobody has tried
them.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from nvmove.vm.moves.qtest import ReplayError

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC
_PORTS = re.compile(r"^ *0*cf8-\w+ .*: pci-conf-idx", re.MULTILINE)
_WINDOW = re.compile(r"^ *([0-9a-f]+)-[0-9a-f]+ .*: pcie-mmcfg-mmio\s*$", re.MULTILINE)
_PCS, _WINDOWED = frozenset({"x86_64", "i386"}), frozenset({"aarch64", "riscv64"})
"""QAPI's SysEmuTarget."""
_SUFFIXES = {1: "b", 2: "w", 4: "l"}


class Cpu(Protocol):
    """Memory and ports as the guest's CPU reaches them (vm/moves/qtest.py). Everything raises ReplayError."""

    async def ask(self, *lines: str) -> list[str]:
        """Run qtest's own commands."""

    async def read(self, address: int, size: int) -> int:
        """Return what `size` bytes hold, with one access."""

    async def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes with one access."""

    async def read_bytes(self, address: int, length: int) -> bytes:
        """Return bytes of memory."""

    async def write_bytes(self, address: int, data: bytes) -> None:
        """Write bytes of memory."""


@dataclass(frozen=True, slots=True)
class PciAddress:
    """Bus number as the guest assigned it, slot and function."""

    bus: int
    slot: int
    function: int

    def config_address(self, register: int) -> int:
        """Return the CONFIG_ADDRESS value that selects the dword of `register` (PCI Local Bus 3.0, 3.2.2.3.2)."""
        return 0x8000_0000 | self.bus << 16 | self.slot << 11 | self.function << 8 | (register & 0xFC)

    def offset(self, register: int) -> int:
        """Return where `register` is in the window of all configuration spaces."""
        return self.bus << 20 | self.slot << 15 | self.function << 12 | register

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.slot:02x}.{self.function:x}"


def _functions(buses: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for bus in buses:
        for device in bus["devices"]:
            yield device
            yield from _functions([device["pci_bridge"]] if "devices" in device.get("pci_bridge", {}) else [])


def _address(device: dict[str, Any]) -> PciAddress:
    return PciAddress(device["bus"], device["slot"], device["function"])


def find(query_pci: list[dict[str, Any]], qdev_id: str) -> PciAddress:
    """Return where the device with `qdev_id` is, in the answer of QMP `query-pci`; raise ReplayError."""
    for device in _functions(query_pci):
        if device["qdev_id"] == qdev_id:
            return _address(device)
    raise ReplayError(f"QEMU's query-pci does not show the device '{qdev_id}'")


class ConfigSpaces:
    """The way to configuration space on this machine; `window` is its address, or None where there are the ports."""

    def __init__(self, cpu: Cpu, window: int | None) -> None:
        self.cpu = cpu
        self._window = window

    @classmethod
    async def of_machine(
        cls, cpu: Cpu, hmp: Callable[[str], Awaitable[str]], query_pci: list[dict[str, Any]], target: str
    ) -> ConfigSpaces:
        """Find the way on a machine of the architecture `target`; raises ReplayError where nvmove can go none."""
        tree = await hmp("info mtree -f")
        window = _WINDOW.search(tree)
        if target in _PCS and _PORTS.search(tree):
            found = cls(cpu, None)
        elif target in _WINDOWED and window:
            found = cls(cpu, int(window[1], 16))
        else:
            raise ReplayError(f"nvmove does not know how to reach PCI configuration space on this {target} machine")
        root = query_pci[0]["devices"][0]  # functions behind bridges have no place until the guest gives them one
        ident = root["id"]["device"] << 16 | root["id"]["vendor"]
        if await found.read(_address(root), 0, 4) != ident:
            raise ReplayError(f"PCI configuration space of this machine does not show the function {_address(root)}")
        return found

    async def read(self, address: PciAddress, register: int, size: int) -> int:
        """Return what a register of 1, 2 or 4 bytes holds; it is aligned. Raises ReplayError."""
        if self._window is not None:
            return await self.cpu.read(self._window + address.offset(register), size)
        return int(await self._by_port(address, register, f"in{_SUFFIXES[size]} {CONFIG_DATA + register % 4:#x}"), 16)

    async def write(self, address: PciAddress, register: int, size: int, value: int) -> None:
        """Write a register of 1, 2 or 4 bytes; it is aligned. Raises ReplayError."""
        if self._window is not None:
            await self.cpu.write(self._window + address.offset(register), size, value)
        else:
            await self._by_port(address, register, f"out{_SUFFIXES[size]} {CONFIG_DATA + register % 4:#x} {value:#x}")

    async def _by_port(self, address: PciAddress, register: int, access: str) -> str:
        """Do one access. A guest that was stopped between its two finds the first one's value as it was."""
        (before,) = await self.cpu.ask(f"inl {CONFIG_ADDRESS:#x}")
        _, answer, _ = await self.cpu.ask(
            f"outl {CONFIG_ADDRESS:#x} {address.config_address(register):#x}",
            access,
            f"outl {CONFIG_ADDRESS:#x} {int(before, 16):#x}",
        )
        return answer


class ConfigSpace:
    """The first 256 bytes of one function's configuration space, and memory behind its BARs."""

    def __init__(self, spaces: ConfigSpaces, address: PciAddress) -> None:
        self.cpu = spaces.cpu
        self._spaces = spaces
        self._address = address

    async def check(self, config: bytes) -> None:
        """Raise ReplayError unless the function is the one whose configuration space begins as `config`."""
        expected = int.from_bytes(config[:4], "little")
        found = await self.read(0, 4)
        if found != expected:
            raise ReplayError(f"PCI function {self._address} is {found:08x} to the guest, not {expected:08x}")

    async def read(self, register: int, size: int) -> int:
        """Return what a register of 1, 2 or 4 bytes holds; it is aligned. Raises ReplayError."""
        return await self._spaces.read(self._address, register, size)

    async def write(self, register: int, size: int, value: int) -> None:
        """Write a register of 1, 2 or 4 bytes; it is aligned. Raises ReplayError."""
        await self._spaces.write(self._address, register, size, value)
