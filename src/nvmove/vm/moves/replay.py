"""PCI replay: what QEMU does not save of a vfio-user device, read before a save and put back after a load.

After `loadvm` or an incoming migration QEMU has the function's configuration space as after reset, and its MSI-X
table is empty. All of it is restored here on a stopped VM, with the accesses a guest's CPU would make (qtest.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

from nvmove.vm.moves.pciaddress import ConfigSpace
from nvmove.vm.moves.qtest import ReplayError

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


def word(config: bytes, register: int) -> int:
    """Return the 16-bit register of a configuration space image."""
    return int.from_bytes(config[register : register + 2], "little")


def bar0_address(config: bytes) -> int:
    """Return the guest-physical address in BAR0, a 64-bit memory BAR."""
    return int.from_bytes(config[BAR0 : BAR0 + 8], "little") & ~0xF


async def read_msix_table(space: ConfigSpace, config: bytes, table_offset: int) -> bytes:
    """Read the function's MSI-X table out of QEMU, 16 bytes a vector, and lower its INTx pin; raise ReplayError.

    The table answers only while the function decodes memory, so COMMAND's memory bit is set for the moment where the
    guest has it clear. A BAR the guest never placed has no table worth keeping: all vectors masked, as after reset.
    """
    vectors = (word(config, MSIX_CONTROL) & 0x7FF) + 1
    bar = bar0_address(config)
    command = word(config, COMMAND)
    if not bar:
        return (bytes(12) + b"\x01\0\0\0") * vectors
    await space.check(config)
    hidden = not command & 0x2
    if hidden:
        await space.write(COMMAND, 2, command | 0x2)
    try:
        if not word(config, MSIX_CONTROL) & MSIX_ENABLE and not command & COMMAND_INTX_DISABLE:
            await _lower_intx(space, bar)
        return await space.cpu.read_bytes(bar + table_offset, vectors * MSIX_ENTRY)
    finally:
        if hidden:
            await space.write(COMMAND, 2, command)


async def _lower_intx(space: ConfigSpace, bar: int) -> None:
    """Make QEMU lower the function's INTx pin; the device is paused, so it stays low.

    QEMU saves how many devices pull each line of the bus, but not that ours is one of them: a line that is up in the
    stream would stay up for ever after a load. QEMU takes any access to the BAR as the guest's acknowledgement; the
    second one is for a signal that it had not looked at before the first.
    """
    for _ in range(2):
        await space.cpu.read(bar, 4)


@contextlib.asynccontextmanager
async def bus_master(space: ConfigSpace, config: bytes) -> AsyncIterator[None]:
    """Let the function write to guest memory in the body, though its guest may have switched that off: VM stopped.

    A driver that was unbound, or a guest that boots anew, has left pages written before that.
    """
    command = word(config, COMMAND)
    if command & COMMAND_MASTER:
        yield
        return
    await space.write(COMMAND, 2, command | COMMAND_MASTER)
    try:
        yield
    finally:
        await space.write(COMMAND, 2, command)


async def replay(space: ConfigSpace, device: Replayed) -> None:
    """Give QEMU back what `device` saved of BARs, COMMAND and MSI-X; the VM is stopped. Raises ReplayError.

    QEMU answers with SET_IRQS for each vector in use.
    """
    config = device.pci_config
    if not bar0_address(config):
        await _registers(space, config)
        await space.write(MSIX_CONTROL, 2, word(config, MSIX_CONTROL))
        await space.write(COMMAND, 2, word(config, COMMAND))
        return
    await space.check(config)
    await _registers(space, config)
    control = word(config, MSIX_CONTROL)
    await space.write(COMMAND, 2, word(config, COMMAND) | COMMAND_MEMORY_AND_MASTER)
    if control & MSIX_ENABLE:
        await space.write(MSIX_CONTROL, 2, control | MSIX_FUNCTION_MASK)
    table_address = bar0_address(config) + device.msix_table_offset
    await space.cpu.write_bytes(table_address, device.msix_table)
    if await space.cpu.read_bytes(table_address, len(device.msix_table)) != device.msix_table:
        raise ReplayError("the MSI-X table was written and does not hold what was written")
    await space.write(MSIX_CONTROL, 2, control)
    await space.write(COMMAND, 2, word(config, COMMAND))


async def _registers(space: ConfigSpace, config: bytes) -> None:
    for register, size in ((BAR0, 4), (BAR0 + 4, 4), *OTHER_REGISTERS):
        await space.write(register, size, int.from_bytes(config[register : register + size], "little"))
