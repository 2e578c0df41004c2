"""Migration capabilities: the user's view of them, apart from what nvmove needs set underneath while a VM moves.

While `override` is in force, QEMU has other values than the user gave; the user sees and changes their own, which QEMU
gets back at `restore`. At all other times QEMU has the user's values, and everything passes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from nvmove.vm.monitor.facade import Facade, QmpError

EVENTS, PAUSE, RETURN_PATH = "events", "pause-before-switchover", "return-path"
SET, QUERY = "migrate-set-capabilities", "query-migrate-capabilities"

REFUSED: Mapping[str, str] = {
    "postcopy-ram": "nvmove's disks reach guest memory past QEMU, which would not notice that a page is still missing",
    "background-snapshot": "nvmove's disks write to guest memory past QEMU, which would not notice that a page changes",
    "x-colo": "nvmove's disks are not kept in step with a second VM",
}
"""Capabilities that cannot be had with our disks, and why."""

_SETTING = re.compile(r"(\S+)\s+(on|off|true|false|yes|no|y|n)\s*")
_SHOWN = re.compile(r"^(\S+): (?:on|off)", re.MULTILINE)


class Capabilities:
    """One VM's."""

    def __init__(self, facade: Facade) -> None:
        self._facade = facade
        self._users: dict[str, bool] = {}
        """The user's values of those that are overridden."""

    def register(self) -> None:
        """Put the commands into the facade."""
        self._facade.handlers[SET] = self._qmp_set
        self._facade.handlers[QUERY] = self._qmp_query
        self._facade.hmp_handlers["migrate_set_capability"] = self._hmp_set
        self._facade.hmp_handlers["info migrate_capabilities"] = self._hmp_query
        self._facade.commands.concurrent |= {QUERY, "info migrate_capabilities"}

    async def users(self) -> dict[str, bool]:
        """Return all, as the user set them."""
        return {entry["capability"]: entry["state"] for entry in await self._query()}

    def user(self, name: str) -> bool:
        """Return the user's value of a capability, as far as it is overridden."""
        return self._users.get(name, False)

    @property
    def overridden(self) -> bool:
        """Whether QEMU has other values than the user's."""
        return bool(self._users)

    async def override(self, *names: str) -> None:
        """Set these in QEMU, without the user seeing it. Raises QmpError, with nothing changed."""
        users = await self.users()
        await self._set(dict.fromkeys(names, True))
        self._users |= {name: users[name] for name in names}

    async def restore(self) -> None:
        """Give QEMU the user's values again. Raises QmpError."""
        users, self._users = self._users, {}
        if users:
            await self._set(users)

    # --- commands ----------------------------------------------------------------------------------------------------

    async def _query(self) -> list[dict[str, Any]]:
        answer = await self._facade.execute(QUERY)
        return [{**entry, "state": self._users.get(entry["capability"], entry["state"])} for entry in answer]

    async def _set(self, values: Mapping[str, bool]) -> None:
        listed = [{"capability": name, "state": state} for name, state in values.items()]
        await self._facade.execute(SET, {"capabilities": listed})

    async def _qmp_query(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        return await (facade.execute(QUERY, arguments) if arguments else self._query())

    async def _qmp_set(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        values = _values(arguments)
        if values is None:
            return await facade.execute(SET, arguments)  # QEMU says what is wrong
        refuse({name for name, state in values.items() if state})
        hidden = values.keys() & self._users.keys()
        await self._set({name: state for name, state in values.items() if name not in hidden})
        self._users |= {name: values[name] for name in hidden & self._users.keys()}
        return {}

    async def _hmp_set(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        found = _SETTING.fullmatch(arguments)
        if found is None or not (found[1] in REFUSED or found[1] in self._users):
            return await facade.hmp(f"migrate_set_capability {arguments}".strip())
        entry = {"capability": found[1], "state": found[2] in {"on", "true", "yes", "y"}}
        await self._qmp_set(facade, {"capabilities": [entry]})
        return ""

    async def _hmp_query(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        text = await facade.hmp(f"info migrate_capabilities {arguments}".strip())
        words = {True: "on", False: "off"}
        return _SHOWN.sub(lambda m: f"{m[1]}: {words[self._users[m[1]]]}" if m[1] in self._users else m[0], text)


def refuse(enabled: set[str]) -> None:
    """Raise QmpError, with the reason, when one of these capabilities cannot be had."""
    for name in sorted(enabled & REFUSED.keys()):
        raise QmpError("GenericError", f"Migration capability '{name}' is not supported: {REFUSED[name]}")


def _values(arguments: Mapping[str, Any]) -> dict[str, bool] | None:
    """Return what is to be set; None when that is not what QEMU's schema says."""
    values = {}
    with contextlib.suppress(KeyError, TypeError):
        for entry in arguments["capabilities"]:
            if entry.keys() != {"capability", "state"} or not isinstance(entry["state"], bool):
                return None
            values[entry["capability"]] = entry["state"]
        return values if arguments.keys() == {"capabilities"} else None
    return None
