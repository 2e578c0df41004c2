"""The ports and bridges that nvmove's disks are plugged into: without hot plug of their own.

Where ACPI does not handle a slot, the port itself does, and a guest could eject the disk: QEMU would abort
(`vm/slots.py`). So the port is made one whose slot is not hot-pluggable. Ports that ACPI handles stay as they are: what
the guest sees of them is part of the snapshots that there are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from nvmove.options import syntax
from nvmove.options.devices import parse_device
from nvmove.options.syntax import Option
from nvmove.vm.argv import Item, machine_options
from nvmove.vm.defaults import Compat, read_global

Types = Callable[[str], Mapping[str, str]]
_SWITCHES = ("hotplug", "shpc")
"""Properties that switch native hot plug: of ports of PCI Express, of `pci-bridge`."""
_ACPI = ("ICH9-LPC", "PIIX4_PM")
_BY_ACPI = "acpi-pci-hotplug-with-bridge-support"


def without_hot_plug(items: Sequence[Item], buses: Iterable[str], compat: Compat, types: Types) -> list[Item]:
    """Return the items with native hot plug off in the ports that lead to `buses`, unless the user says otherwise.

    `compat`: what the machine type sets; `types`: the properties of a driver. Raises OptionError.
    """
    wanted = set(buses)
    devices = dict(_devices(items))
    globals_ = _globals(items)
    found = {bus: devices[bus] for bus in wanted if bus in devices}
    if not found:
        return list(items)
    acpi = _is_by_acpi(items, globals_, compat, types)
    kept = list(items)
    for bus, (place, option) in found.items():
        if acpi and _is_below_the_machines_bus(bus, devices):
            continue
        driver = option.get("driver")
        name = next((switch for switch in _SWITCHES if switch in types(driver)), "")
        if not name or name in option.values or name in globals_.get(driver, {}):
            continue
        if place is None:
            kept.append(Item.make("set", f"device.{bus}.{name}=off"))
        elif option.is_json:
            kept[place] = kept[place].instead(syntax.to_json({**option.values, name: False}))
        else:
            kept[place] = kept[place].instead(f"{kept[place].value},{name}=off")
    return kept


def _devices(items: Sequence[Item]) -> Iterator[tuple[str, tuple[int | None, Option]]]:
    """Yield the devices by id: where they stand on the command line, or None for those in a file, and what they say."""
    for place, item in enumerate(items):
        if item.name == "readconfig":
            for option in _in_file(item):
                yield option.get("id"), (None, _with_set(option, items))
        elif item.name == "device":
            option = parse_device(item.value)
            if ident := option.get("id"):
                yield ident, (place, option)


def _in_file(item: Item) -> Iterator[Option]:
    """Yield the sections `[device "ID"]` of a `-readconfig` file; QEMU says what is wrong with one."""
    with contextlib.suppress(OSError):
        for section in re.split(r"^\s*(?=\[)", Path(item.value).read_text(errors="replace"), flags=re.MULTILINE):
            if heading := re.match(r'\[device "([^"]+)"\]', section):
                values = dict(re.findall(r'^\s*([\w.-]+)\s*=\s*"([^"]*)"', section, re.MULTILINE))
                yield Option(f"-readconfig {item.value}", {**values, "id": heading[1]})


def _with_set(option: Option, items: Iterable[Item]) -> Option:
    """Return a device of a file with what the user's `-set` changes in it."""
    start = f"device.{option.get('id')}."
    pairs = (item.value.removeprefix(start).partition("=") for item in items if item.value.startswith(start))
    return Option(option.where, {**option.values, **{name: value for name, _, value in pairs}})


def _globals(items: Iterable[Item]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for driver, name, value in map(read_global, items):
        found.setdefault(driver, {})[name] = value
    return found


def _is_by_acpi(items: Sequence[Item], globals_: Compat, compat: Compat, types: Types) -> bool:
    """Whether the machine plugs and unplugs behind bridges by ACPI."""
    if not any(_BY_ACPI in types(driver) for driver in _ACPI):
        return False  # no PC
    is_on = True
    for option in machine_options(items):
        is_on = option.get("acpi", "on" if is_on else "off") != "off"
    for driver in _ACPI:
        values = {**compat.get(driver, {}), **globals_.get(driver, {})}
        is_on = is_on and syntax.boolean(Option(f"-global {driver}", values), _BY_ACPI, True)
    return is_on


def _is_below_the_machines_bus(ident: str, devices: Mapping[str, tuple[int | None, Option]]) -> bool:
    """Whether all above a device are bridges on the machine's own bus: ACPI does not reach behind pxb-pcie."""
    seen: set[str] = set()
    while ident in devices and ident not in seen:
        seen.add(ident)
        option = devices[ident][1]
        if option.get("driver").startswith("pxb"):
            return False
        ident = option.get("bus")
    return True
