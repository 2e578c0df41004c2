"""PCI replay: what QEMU does not save of a vfio-user device, read before a save and put back after a load.

After `loadvm` or an incoming migration QEMU has the function's configuration space as after reset, and its MSI-X
table is empty. All of it is restored here on a stopped VM, with the accesses a guest would make.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from nvmove.vm.pciaddress import ConfigSpace, Hmp, PciAddress, ReplayError

COMMAND = 0x04
COMMAND_MASTER = 0x0004
COMMAND_MEMORY_AND_MASTER = 0x0006
COMMAND_INTX_DISABLE = 0x0400
BAR0 = 0x10
INTERRUPT_LINE = 0x3C
MSIX_CONTROL = 0x42
MSIX_ENABLE = 0x8000
MSIX_FUNCTION_MASK = 0x4000
MSIX_ENTRY = 16
"""Bytes of one MSI-X table entry (PCI Local Bus 3.0, 6.8.2.9)."""

# What a driver may have written besides BARs, COMMAND and MSI-X: register, size in bytes.
OTHER_REGISTERS = (
    (0x0C, 1),  # cache line size
    (0x0D, 1),  # latency timer
    (INTERRUPT_LINE, 1),
    (0x64, 2),  # power management control/status
    (0x88, 2),  # PCI Express device control
    (0x90, 2),  # PCI Express link control
    (0xA8, 2),  # PCI Express device control 2
)


class Replayed(Protocol):
    """The device, as replay needs it."""

    @property
    def pci_config(self) -> bytes:
        """The first 256 bytes of configuration space as the guest left them."""

    @property
    def msix_table_offset(self) -> int:
        """Offset of the MSI-X table in BAR0."""

    @property
    def msix_table(self) -> bytes:
        """The MSI-X table of the loaded state, 16 bytes a vector."""

    def write_guest(self, address: int, data: bytes) -> None:
        """DMA to a guest-physical address that need not be RAM; waits; raises DmaError."""


def word(config: bytes, register: int) -> int:
    """Return the 16-bit register of a configuration space image."""
    return int.from_bytes(config[register : register + 2], "little")


def bar0_address(config: bytes) -> int:
    """Return the guest-physical address in BAR0, a 64-bit memory BAR."""
    return int.from_bytes(config[BAR0 : BAR0 + 8], "little") & ~0xF


def _words(output: str) -> Iterable[int]:
    for line in output.splitlines():
        yield from (int(value, 16) for value in re.findall(r"0x[0-9a-f]+", line.partition(":")[2]))


async def read_msix_table(hmp: Hmp, address: PciAddress, config: bytes, table_offset: int) -> bytes:
    """Read the function's MSI-X table out of QEMU, 16 bytes a vector, and lower its INTx pin; raise ReplayError.

    The table answers only while the function decodes memory, so COMMAND's memory bit is set for the moment where the
    guest has it clear. A BAR the guest never placed has no table worth keeping: all vectors masked, as after reset.
    """
    vectors = (word(config, MSIX_CONTROL) & 0x7FF) + 1
    bar = bar0_address(config)
    command = word(config, COMMAND)
    if not bar:
        return (bytes(12) + b"\x01\0\0\0") * vectors
    space = ConfigSpace(hmp, address)
    hidden = not command & 0x2
    if hidden:
        await space.write16(COMMAND, command | 0x2)
    try:
        if not word(config, MSIX_CONTROL) & MSIX_ENABLE and not command & COMMAND_INTX_DISABLE:
            await _lower_intx(hmp, bar)
        count = vectors * MSIX_ENTRY // 4
        values = list(_words(await hmp(f"xp /{count}xw {bar + table_offset:#x}")))
    finally:
        if hidden:
            await space.write16(COMMAND, command)
    if len(values) != count:
        raise ReplayError(f"QEMU printed {len(values)} of the {count} words of the MSI-X table")
    return b"".join(value.to_bytes(4, "little") for value in values)


async def _lower_intx(hmp: Hmp, bar: int) -> None:
    """Make QEMU lower the function's INTx pin; the device is paused, so it stays low.

    QEMU saves how many devices pull each line of the bus, but not that ours is one of them: a line that is up in the
    stream would stay up for ever after a load. QEMU takes any access to the BAR as the guest's acknowledgement; the
    second one is for a signal that it had not looked at before the first.
    """
    for _ in range(2):
        await hmp(f"xp /1xw {bar:#x}")


@contextlib.asynccontextmanager
async def bus_master(hmp: Hmp, address: PciAddress, config: bytes) -> AsyncIterator[None]:
    """Let the function write to guest memory in the body, though its guest may have switched that off: VM stopped.

    A driver that was unbound, or a guest that boots anew, has left pages written before that.
    """
    command = word(config, COMMAND)
    if command & COMMAND_MASTER:
        yield
        return
    space = ConfigSpace(hmp, address)
    await space.write16(COMMAND, command | COMMAND_MASTER)
    try:
        yield
    finally:
        await space.write16(COMMAND, command)


async def replay(hmp: Hmp, address: PciAddress, device: Replayed) -> None:
    """Give QEMU back what `device` saved of BARs, COMMAND and MSI-X; the VM is stopped. Raises ReplayError, DmaError.

    QEMU answers with SET_IRQS for each vector in use.
    """
    config = device.pci_config
    space = ConfigSpace(hmp, address)
    control = word(config, MSIX_CONTROL)
    await space.write32(BAR0, int.from_bytes(config[BAR0 : BAR0 + 4], "little"))
    await space.write32(BAR0 + 4, int.from_bytes(config[BAR0 + 4 : BAR0 + 8], "little"))
    for register, size in OTHER_REGISTERS:
        value = int.from_bytes(config[register : register + size], "little")
        await (space.write8 if size == 1 else space.write16)(register, value)
    if bar0_address(config):
        await space.write16(COMMAND, word(config, COMMAND) | COMMAND_MEMORY_AND_MASTER)
        if control & MSIX_ENABLE:
            await space.write16(MSIX_CONTROL, control | MSIX_FUNCTION_MASK)
        table_address = bar0_address(config) + device.msix_table_offset
        await asyncio.to_thread(device.write_guest, table_address, device.msix_table)
    await space.write16(MSIX_CONTROL, control)
    await space.write16(COMMAND, word(config, COMMAND))
