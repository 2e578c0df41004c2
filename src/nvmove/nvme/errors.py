"""What goes wrong with a command, and with a saved state."""

from __future__ import annotations

from nvmove.nvme.spec import Status


class CommandError(Exception):
    """What ends a command with an error status; raised by handlers, never seen by the guest as anything else."""

    def __init__(self, status: Status, *, dnr: bool = True) -> None:
        super().__init__(status.name)
        self.status = status
        self.dnr = dnr
        """Do Not Retry: the same command would fail again."""


class StateError(Exception):
    """A saved state that cannot be loaded here: one line that names what is wrong; nothing was touched."""
