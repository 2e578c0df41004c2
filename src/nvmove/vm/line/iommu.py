"""A virtual IOMMU between the disks and guest memory: QEMU has to tell nvmove all that the guest maps.

The IOMMUs of PCs do that where a property says so; without it QEMU 11.1 aborts at the guest's first mapping, or the
disk finds no memory. Arm's does not do it at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nvmove.options import syntax
from nvmove.options.devices import parse_device
from nvmove.options.syntax import Option, OptionError
from nvmove.vm.line.argv import Item, machine_options
from nvmove.vm.line.defaults import read_global

_TELLS_BY: Mapping[str, str] = {"intel-iommu": "caching-mode", "amd-iommu": "dma-remap"}
_TELLS_NOTHING = "nvmove's disks cannot work behind this IOMMU: QEMU does not tell them what the guest maps"
_BYPASS = ("default-bus-bypass-iommu", "default_bus_bypass_iommu")


def told(
    items: Sequence[Item], types: Callable[[str], Mapping[str, str]], warnings: list[str]
) -> tuple[list[Item], bool]:
    """Return the items with IOMMUs that tell what the guest maps, and whether there is one.

    What had to be added is said in `warnings`. Raises OptionError where QEMU cannot tell.
    """
    if _is_bypassed(items):
        return list(items), False
    kept, found = [], False
    for item in items:
        option = parse_device(item.value) if item.name == "device" else None
        driver = str(option.values.get("driver")) if option is not None else ""
        if option is not None and driver in _TELLS_BY:
            found = True
            kept.append(_telling(item, option, _TELLS_BY[driver], _globals(items, driver), types, warnings))
            continue
        if option is not None and (driver == "arm-smmuv3" or driver.startswith("virtio-iommu")):
            raise option.error(_TELLS_NOTHING if driver == "arm-smmuv3" else "nvmove's disks are not tested behind it")
        kept.append(item)
    return kept, found


def _is_bypassed(items: Sequence[Item]) -> bool:
    """Whether the machine's own PCI bus goes past its IOMMU; refuses a machine whose IOMMU tells nothing."""
    bypassed = False
    machine = machine_options(items)
    for option in machine:
        for name in _BYPASS:
            bypassed = syntax.boolean(option, name, bypassed)
    for option in machine:
        if not bypassed and option.values.get("iommu", "none") != "none":
            raise OptionError(f"{option.where.split()[0]} iommu={option.get('iommu')}: {_TELLS_NOTHING}")
    return bypassed


def _telling(
    item: Item,
    option: Option,
    name: str,
    globals_: Mapping[str, str],
    types: Callable[[str], Mapping[str, str]],
    warnings: list[str],
) -> Item:
    if name in option.values:
        given = option
    elif name in globals_:
        given = Option(option.where, {name: globals_[name]})
    elif name not in types(option.get("driver")):
        raise option.error(f"this QEMU's has no property '{name}': {_TELLS_NOTHING}")
    else:
        warnings.append(f"{option.where}: {name}=on added: nvmove's disks have to be told what the guest maps")
        if option.is_json:
            return item.instead(syntax.to_json({**option.values, name: True}))
        return item.instead(f"{item.value},{name}=on")
    if not syntax.boolean(given, name, False):
        raise option.error(f"nvmove's disks have to be told what the guest maps: use {name}=on")
    return item


def _globals(items: Sequence[Item], driver: str) -> dict[str, str]:
    """Return what `-global` says of a driver."""
    said = (read_global(item) for item in items)
    return {name: value for whose, name, value in said if whose == driver}
