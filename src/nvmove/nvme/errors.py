"""What goes wrong with a command, and with a saved state."""

from __future__ import annotations

from nvmove.nvme.spec import Status
from nvmove.vmstate.schema import StateError

__all__ = ["CommandError", "StateError"]


class CommandError(Exception):
    """What ends a command with an error status; raised by handlers, never seen by the guest as anything else."""

    def __init__(self, status: Status, *, dnr: bool = True, location: int = 0xFFFF, lba: int = 0) -> None:
        super().__init__(status.name)
        self.status = status
        self.dnr = dnr
        """Do Not Retry: the same command would fail again."""
        self.location = location
        """Parameter error location for the Error Information log: byte in the SQE | bit << 8 (Base 5.16.1.2)."""
        self.lba = lba
        """The first block that failed."""
