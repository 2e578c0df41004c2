"""The ports and bridges that lead to nvmove's disks: without hot plug of their own.

Where ACPI does not handle a slot, the port itself does, and a guest could eject the disk, or the switch that it is on:
QEMU would abort (`vm/slots.py`). So the port is made one whose slot is not hot-pluggable. Ports that ACPI handles stay
as they are: what the guest sees of them is part of the snapshots that there are.

That is what drivers go by. A guest that writes "power off" into such a port's Slot Control by hand still ejects: QEMU
(11.1) looks only whether its Slot Status shows a device, and that can be neither hidden nor taken back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from nvmove.options import syntax
from nvmove.options.devices import parse_device
from nvmove.options.syntax import Option
from nvmove.vm.line.argv import Item, machine_options
from nvmove.vm.line.defaults import Compat, read_global

Types = Callable[[str], Mapping[str, str]]
Devices = Mapping[str, tuple[int | None, Option]]
_SWITCHES = ("hotplug", "shpc")
"""Properties that switch native hot plug: of ports of PCI Express, of `pci-bridge`."""
_ACPI = ("ICH9-LPC", "PIIX4_PM")
_BY_ACPI = "acpi-pci-hotplug-with-bridge-support"
_BEYOND_ACPI = frozenset({"pxb", "pxb-pcie", "pxb-cxl"})
"""ACPI handles what is behind bridges on the machine's own bus, not what is on further root buses."""


def without_hot_plug(items: Sequence[Item], buses: Iterable[str], compat: Compat, types: Types) -> list[Item]:
    """Return the items with native hot plug off in the ports that lead to `buses`, unless the user says otherwise.

    `compat`: what the machine type sets; `types`: the properties of a driver. Raises OptionError.
    """
    devices = dict(_devices(items))
    leading = {ident: None for bus in buses for ident in _upwards(bus, devices)}
    if not leading:
        return list(items)
    globals_ = _globals(items)
    acpi = _is_by_acpi(items, globals_, compat, types)
    kept = list(items)
    for ident in leading:
        if acpi and not any(devices[above][1].get("driver") in _BEYOND_ACPI for above in _upwards(ident, devices)):
            continue
        place, option = devices[ident]
        driver = option.get("driver")
        name = next((switch for switch in _SWITCHES if switch in types(driver)), "")
        if not name or name in option.values or name in globals_.get(driver, {}):
            continue
        if place is None:
            kept.append(Item.make("set", f"device.{ident}.{name}=off"))
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


def _upwards(bus: str, devices: Devices) -> list[str]:
    """Return the ids of the ports and bridges that lead to a bus, which is called by the first: nearest first."""
    found: list[str] = []
    while bus in devices and bus not in found:
        found.append(bus)
        bus = devices[bus][1].get("bus")
    return found
