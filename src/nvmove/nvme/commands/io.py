"""I/O commands (Base 7): which command set its namespace has says what an opcode is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nvmove.nvme.commands import nvm
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.errors import CommandError
from nvmove.nvme.namespace import Namespace
from nvmove.nvme.spec import ALL_NAMESPACES, CSI_NVM, FUSE, Nvm, Status

Handler = Callable[[Controller, Namespace, Command], None]

COMMAND_SETS: Mapping[int, Mapping[int, Handler]] = {CSI_NVM: nvm.HANDLERS}
"""Handlers by Command Set Identifier and opcode; `effects.IO_EFFECTS` says what they do."""


def execute(controller: Controller, command: Command) -> None:
    """Run an I/O command; raises CommandError."""
    if command.opcode == Nvm.FLUSH and command.nsid == ALL_NAMESPACES:
        _check_flags(command)
        nvm.flush(controller, controller.namespaces.active, command)
        return
    namespace = controller.namespaces.require_active(command.nsid)
    handler = COMMAND_SETS[namespace.csi].get(command.opcode)
    if handler is None:
        raise CommandError(Status.INVALID_OPCODE)
    _check_flags(command)
    if namespace.formatting:
        raise CommandError(Status.FORMAT_IN_PROGRESS, dnr=False)
    handler(controller, namespace, command)


def _check_flags(command: Command) -> None:
    if command.flags & FUSE:  # Identify's FUSES is 0
        raise CommandError(Status.INVALID_FIELD)
