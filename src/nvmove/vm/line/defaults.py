"""What an nvme device is by default: as its properties say, as the machine type named says, as `-global` says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nvmove.options.properties import PROPERTIES, Values
from nvmove.options.syntax import Option, parse
from nvmove.vm.line.argv import Item, machine_options

Compat = Mapping[str, Mapping[str, str]]
"""Values of properties by devices' types and properties' names."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What one command line says of all devices of a type."""

    machine: str
    """The versioned machine type, `pc-q35-6.1`; else empty."""
    compat: Compat
    """What QEMU has for that type, so that a guest of an older QEMU finds the devices of that QEMU."""
    given: Compat
    """`-global`."""

    def under(self, option: Option) -> Option:
        """Return a device with the defaults of its driver where it says nothing itself; raises OptionError."""
        driver = option.get("driver")
        given = self.given.get(driver, {})
        spoken = {*given, *option.values}
        compat = {name: value for name, value in self.compat.get(driver, {}).items() if name not in spoken}
        if not (compat or given):
            return option
        for name, value in given.items():
            Values(Option(f"{option.where}: can't apply global {driver}.{name}={value}", {name: value}), driver)
        for name, value in compat.items():
            where = f"{option.where}: machine type {self.machine} has {driver}.{name}={value}"
            Values(Option(where, {name: value}), driver)
        Values(option, driver)
        texts = {name: _as_text(value) for name, value in option.values.items()}
        return Option(option.where, {**compat, **given, **texts})


def take(items: Sequence[Item], compat_of: Callable[[str], Compat]) -> tuple[list[Item], Defaults]:
    """Take `-global nvme.KEY=VALUE` (and nvme-ns) out; return the rest, and the defaults.

    `compat_of` is asked only where the machine type has a version: it starts a QEMU.
    """
    kept, given = _take(items)
    machine = _versioned_machine(kept)
    return kept, Defaults(machine, compat_of(machine) if machine else {}, given)


def _versioned_machine(items: Iterable[Item]) -> str:
    """Return the machine type that the user names, if it is a versioned one, `pc-q35-6.1`; else nothing."""
    named = [str(option.values["type"]) for option in machine_options(items) if option.values.get("type")]
    return named[-1] if named and re.search(r"-\d+\.\d+$", named[-1]) else ""


def _take(items: Sequence[Item]) -> tuple[list[Item], dict[str, dict[str, str]]]:
    """Take `-global nvme.KEY=VALUE` (and nvme-ns) out; return the rest, and the values by driver."""
    kept = []
    found: dict[str, dict[str, str]] = {driver: {} for driver in PROPERTIES}
    for item in items:
        driver, name, value = read_global(item)
        if driver in found:
            found[driver][name] = value
        else:
            kept.append(item)
    return kept, found


def read_global(item: Item) -> tuple[str, str, str]:
    """Return driver, property and value of a `-global`, in either of its forms; three times nothing for all else."""
    if item.name != "global":
        return "", "", ""
    path, _, value = item.value.partition("=")
    driver, dot, name = path.partition(".")
    if dot:
        return driver, name, value
    option = parse("-global", item.value)
    return option.get("driver"), option.get("property"), option.get("value")


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
