"""QMP's `nvmove-fault-add`, `-list` and `-remove`: faults of the disks, changed while the VM runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nvmove.block.fault import FaultRules
from nvmove.options.faults import read_fault, show_fault
from nvmove.options.syntax import Option, OptionError
from nvmove.vm.monitor.facade import Facade, QmpError


class FaultCommands:
    """The commands of one VM."""

    def __init__(self, rules: FaultRules, drives: Iterable[str]) -> None:
        """`drives` are the names that a rule's `drive` may have."""
        self._rules = rules
        self._drives = frozenset(drives)

    def register(self, facade: Facade) -> None:
        """Put the commands into the facade. They wait for no other: removing a rule may be what another waits for."""
        own = {"nvmove-fault-add": self._add, "nvmove-fault-list": self._list, "nvmove-fault-remove": self._remove}
        facade.handlers.update(own)
        facade.commands.concurrent.update(own)

    async def _add(self, _facade: Facade, arguments: dict[str, Any]) -> Any:
        try:
            rule = read_fault(Option("nvmove-fault-add", arguments, is_json=True), self._drives)
        except OptionError as error:
            raise QmpError("GenericError", str(error)) from None
        return {"id": self._rules.add(rule)}

    async def _list(self, _facade: Facade, arguments: dict[str, Any]) -> Any:
        _only(arguments)
        return [show_fault(fault) for fault in self._rules.list()]

    async def _remove(self, _facade: Facade, arguments: dict[str, Any]) -> Any:
        _only(arguments, "id")
        if "id" not in arguments:
            raise QmpError("GenericError", "Parameter 'id' is missing")
        id = arguments["id"]
        if not isinstance(id, int) or isinstance(id, bool):
            raise QmpError("GenericError", "Invalid parameter type for 'id', expected: integer")
        if not self._rules.remove(id):
            raise QmpError("GenericError", f"nvmove-fault-remove: there is no fault {id}")
        return {}


def _only(arguments: dict[str, Any], *known: str) -> None:
    """Refuse other arguments, in QEMU's words."""
    for name in arguments:
        if name not in known:
            raise QmpError("GenericError", f"Parameter '{name}' is unexpected")
