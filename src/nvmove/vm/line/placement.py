"""Puts vfio-user-pci devices where the nvme devices were, so that every PCI device keeps its address.

QEMU gives PCI slots to devices in the order in which it creates them: the `-device`s in key=value form, then the disks
of `-drive if=virtio`, then the `-device`s in JSON form. vfio-user-pci exists in JSON form only (its `socket` is a
structure), so what QEMU would create after an nvme device has to follow in JSON form too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvmove.options import syntax
from nvmove.options.devices import parse_device
from nvmove.options.syntax import Option, parse
from nvmove.vm.line.argv import Item

PropertyTypes = Callable[[str], Mapping[str, str]]
"""The types of a device's properties, by name, as `-device DRIVER,help` shows them."""


def creation_order(items: Sequence[Item]) -> list[tuple[int, Option]]:
    """Return the `-device`s and their places among the items, in the order in which QEMU creates them."""
    devices = [(place, parse_device(item.value)) for place, item in enumerate(items) if item.name == "device"]
    return sorted(devices, key=lambda device: device[1].is_json)


def place(items: Sequence[Item], substitutes: Mapping[int, Item | None], types: PropertyTypes) -> list[Item]:
    """Return the items with the `-device`s at the places of `substitutes` replaced (None: taken out).

    Raises OptionError for what creates a device after an nvme device in a way that has no JSON form.
    """
    replaced: dict[int, list[Item]] = {at: [] for at in substitutes}
    ordered = creation_order(items)
    plain = [(at, option) for at, option in ordered if not option.is_json]
    in_json = [(at, option) for at, option in ordered if option.is_json]
    disks = _virtio_disks(items)
    created = [*plain, *disks, *in_json]
    first = next(index for index, (at, _) in enumerate(created) if substitutes.get(at))
    _refuse_later(items, created[first])
    sequence: list[Item] = []
    slots: list[int] = []
    for at, option in created[first:]:
        substitute = substitutes[at] if at in substitutes else _device(items[at], option, types)
        if at not in substitutes:
            replaced[at] = []
        if substitute is not None:
            sequence.append(substitute)
            slots.append(at)
    for at, _ in disks:
        replaced[at] = [_drive_of_disk(items, at)]
    for at, item in zip(sorted(slots), sequence, strict=True):
        replaced[at] = [*replaced[at], item]
    return [item for at, kept in enumerate(items) for item in replaced.get(at, [kept])]


def _virtio_disks(items: Sequence[Item]) -> list[tuple[int, Option]]:
    disks = []
    for at, item in enumerate(items):
        if item.name == "drive":
            option = parse("-drive", item.value, implied="file")
            if option.get("if") == "virtio":
                values = {"driver": "virtio-blk", "drive": _drive_id(items, at)}
                disks.append((at, Option(option.where, values)))
    return disks


def _drive_id(items: Sequence[Item], wanted: int) -> str:
    """Return the id that QEMU gives to a virtio disk: the user's, or virtio0, virtio1, …"""
    taken: set[int] = set()
    for at, item in enumerate(items):
        option = parse("-drive", item.value, implied="file") if item.name == "drive" else None
        if option is None or option.get("if") != "virtio":
            continue
        named = "index" if "index" in option.values else "unit"
        unit = syntax.integer(option, named, 0, 31) if named in option.values else _free(taken)
        taken.add(unit)
        if at == wanted:
            return option.get("id") or f"virtio{unit}"
    raise ValueError(wanted)


def _free(taken: set[int]) -> int:
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _drive_of_disk(items: Sequence[Item], at: int) -> Item:
    option = parse("-drive", items[at].value, implied="file").without("index", "unit", "bus")
    values = {**option.values, "if": "none", "id": _drive_id(items, at)}
    return items[at].instead(syntax.unparse(values))


def _device(item: Item, option: Option, types: PropertyTypes) -> Item:
    """Return a `-device` in JSON form, with the types that QEMU wants there."""
    if option.is_json:
        return item.instead(syntax.to_json(option.values), "device")
    known = types(option.get("driver"))
    values = {name: _typed(option, name, known.get(name, "str")) for name in option.values}
    return item.instead(syntax.to_json(values), "device")


def _typed(option: Option, name: str, kind: str) -> Any:
    if kind == "bool":
        return syntax.boolean(option, name, False)
    if kind == "size":
        return syntax.size(option, name, 0)
    if kind.startswith("uint"):
        return syntax.integer(option, name, 0, int(kind.removeprefix("uint")))
    if kind.startswith("int"):
        return syntax.signed(option, name, 0, int(kind.removeprefix("int")))
    return option.get(name)


def _refuse_later(items: Sequence[Item], first: tuple[int, Option]) -> None:
    at, nvme = first
    if nvme.is_json:
        return
    for item in items[at:]:
        if item.name in ("virtfs", "readconfig"):
            raise nvme.error(f"-{item.name} must stand before it, so that the PCI devices keep their addresses")
