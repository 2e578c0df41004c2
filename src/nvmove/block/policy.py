"""What becomes of a request that the back end failed: werror and rerror, as QEMU's -drive has them.

Only the back end's errors come here. What the guest got wrong is the controller's to answer, whatever the policy.
"""

from __future__ import annotations

import enum
import errno as errnos
from dataclasses import dataclass


class ErrorPolicy(enum.Enum):
    """The value of werror or rerror, in QEMU's words (`auto` is resolved before)."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"


class Action(enum.Enum):
    """What is done about one error, in the words of QEMU's event BLOCK_IO_ERROR."""

    REPORT = "report"
    """The guest is told."""
    IGNORE = "ignore"
    """The guest is told that all went well."""
    STOP = "stop"
    """The guest is told nothing: the request is held, and the VM stops until somebody mends the disk."""


NO_SPACE = frozenset({errnos.ENOSPC, errnos.EDQUOT})
"""Errors that making room mends."""

_ACTIONS = {
    ErrorPolicy.REPORT: Action.REPORT,
    ErrorPolicy.IGNORE: Action.IGNORE,
    ErrorPolicy.STOP: Action.STOP,
}


def decide(policy: ErrorPolicy, errno: int) -> Action:
    """Return what `policy` does about `errno`."""
    if policy is ErrorPolicy.ENOSPC:
        return Action.STOP if errno in NO_SPACE else Action.REPORT
    return _ACTIONS[policy]


@dataclass(slots=True)
class DriveErrors:
    """The policies of one drive. They may be changed at any time: what fails from then on follows the new ones."""

    werror: ErrorPolicy = ErrorPolicy.ENOSPC
    rerror: ErrorPolicy = ErrorPolicy.REPORT

    def decide(self, is_read: bool, errno: int) -> Action:
        """Return what is done about `errno` of a read, or of anything else."""
        return decide(self.rerror if is_read else self.werror, errno)


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """A request failed, and what is done about it."""

    drive: str
    """The drive's id or node name: the key of the back end."""
    is_read: bool
    action: Action
    errno: int

    @property
    def is_no_space(self) -> bool:
        """Whether making room mends it (BLOCK_IO_ERROR's `nospace`)."""
        return self.errno in NO_SPACE
