"""`io-status` of a drive: whether its errors have stopped the VM, as `query-block` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.vm.moves.machinestate import FAILED, NO_SPACE, OK


@dataclass(slots=True)
class IoStatus:
    """The policies of one drive, and what came of them."""

    errors: DriveErrors = field(default_factory=DriveErrors)
    value: str = OK

    @property
    def is_shown(self) -> bool:
        """Whether there is a status at all: in QEMU, where an error may stop the VM."""
        return self.errors.werror in {ErrorPolicy.ENOSPC, ErrorPolicy.STOP} or self.errors.rerror is ErrorPolicy.STOP

    def fail(self, is_no_space: bool) -> None:
        """An error stops the VM; the first one since `reset` sticks."""
        if self.value == OK:
            self.value = NO_SPACE if is_no_space else FAILED

    def reset(self) -> None:
        """The VM runs again."""
        self.value = OK
