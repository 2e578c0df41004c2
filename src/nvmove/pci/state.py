"""What a saved PCI function consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PciState:
    """Plain data. Eventfds and the client's INTx automask are not in it: QEMU sets them up again after a load."""

    config: bytes
    """Configuration space, 4096 bytes, with the BARs, COMMAND and MSI-X control as the guest wrote them."""
    pending: tuple[int, ...] = ()
    """MSI-X vectors signalled while they had no way to the guest, in ascending order."""
    intx: bool = False
    """The level of the INTx pin."""
