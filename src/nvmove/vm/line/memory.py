"""Guest RAM that nvmove can map: shared, so that QEMU hands its file descriptor over (DMA_MAP with an fd)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

from nvmove.options import syntax
from nvmove.options.syntax import Option, OptionError, parse
from nvmove.vm.line.argv import Item, machine_options

BACKEND_ID = "nvmove-ram"
"""Names the RAM block in QEMU's stream: never to change."""
_DEFAULT_SIZE = 128 << 20
_ALIGNMENT = 8192
"""QEMU rounds -m up to this."""
_KINDS = ("memory-backend-memfd", "memory-backend-file", "memory-backend-shm")
_SHARED_BY_DEFAULT = ("memory-backend-memfd", "memory-backend-shm")


def share(items: Sequence[Item]) -> list[Item]:
    """Return the items with guest RAM shared; raises OptionError when the user's own backend is private."""
    machine = machine_options(items)
    backends = [str(option.values["memory-backend"]) for option in machine if "memory-backend" in option.values]
    nodes = [parse("-numa", item.value, implied="type", json_allowed=True) for item in items if item.name == "numa"]
    own = [str(option.values["memdev"]) for option in nodes if "memdev" in option.values] or backends[-1:]
    if own:
        _check(items, own)
        return list(items)
    size = _size(items, machine)
    kept = []
    path, prealloc = "", False
    for item in items:
        if item.name == "mem-path":
            path = item.value
        elif item.name == "mem-prealloc":
            prealloc = True
        else:
            kept.append(item)
    backend = {
        "qom-type": "memory-backend-file" if path else "memory-backend-memfd",
        "id": BACKEND_ID,
        "size": str(size),
        "share": "on",
    }
    if path:
        backend["mem-path"] = path
    else:
        _check_room(size)
    if prealloc:
        backend["prealloc"] = "on"
    return [
        *kept,
        Item.make("object", syntax.unparse(backend, "qom-type")),
        Item.make("machine", f"memory-backend={BACKEND_ID}"),
    ]


def _check_room(size: int) -> None:
    """Raise OptionError where the kernel has no room for private memory of `size` bytes.

    A stock QEMU asks for that, and is refused at once; a memfd is not accounted (memfd_create(2)).
    """
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError) as error:
        why = os.strerror(errno.ENOMEM if isinstance(error, OverflowError) else error.errno or 0)
        raise OptionError(f"cannot set up guest memory of {size >> 20} MiB: {why}") from None


def _check(items: Sequence[Item], own: Sequence[str]) -> None:
    for item in items:
        if item.name != "object":
            continue
        option = parse("-object", item.value, implied="qom-type", json_allowed=True)
        kind = str(option.values.get("qom-type", ""))
        if option.values.get("id") not in own or not kind.startswith("memory-backend-"):
            continue
        if kind not in _KINDS:
            raise option.error(f"nvmove needs guest RAM that it can map: use {_KINDS[0]} with share=on")
        if not syntax.boolean(option, "share", kind in _SHARED_BY_DEFAULT):
            raise option.error("nvmove needs guest RAM that it can map: add share=on")


def _size(items: Sequence[Item], machine: Sequence[Option]) -> int:
    size = 0
    for option in machine:
        if "memory.size" in option.values:
            size = syntax.size(option, "memory.size", 0)
    for item in items:
        if item.name == "m":
            option = parse("-m", item.value, implied="size")
            if "size" not in option.values:
                continue
            given = syntax.parse_size(option.get("size"), "m")
            if given is None:
                raise option.error("Parameter 'size' expects a non-negative number below 2^64, with k, M, G, T, P or E")
            size = given
    return -(-(size or _DEFAULT_SIZE) // _ALIGNMENT) * _ALIGNMENT
