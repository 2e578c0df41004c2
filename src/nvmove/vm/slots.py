"""The PCI slots of nvmove's devices: nobody may unplug them.

QEMU (10.1 to 11.1) aborts in the finalization of every vfio-user-pci device that has MSI-X: it takes a memory region
out of a container that QOM has finalized before (known upstream: "vfio-user: Do not delete the subregion"). No layout
of BARs changes that. So `device_del` is refused here, and the guest's own eject by ACPI finds no hot-pluggable bus:
QEMU ejects nothing on a bus whose link `hotplug-handler` is empty. The guest sees the same ACPI tables as ever.

The link is the bus's, not the slot's. Where the bus has other slots (`pci.0` of the machine `pc`) it is set again while
the user plugs another device, or until a guest has answered that it gives one up. It must be: at a reset QEMU itself
ejects what the guest was asked for, and tries for ever where the bus is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from nvmove.vm.monitor.facade import Facade, QemuGone, QmpError

log = logging.getLogger(__name__)

_HANDLER = "hotplug-handler"
_PORTS = {"PIIX4_PM": 0xAE00, "ICH9-LPC": 0x0CC0}
"""Where the registers of ACPI's PCI hot plug are, by who handles it (QEMU, docs/specs/acpi_pci_hotplug)."""
_DOWN, _SELECT = 4, 16
"""Registers of 32 bits: the slots that the guest is asked for, on the bus selected."""
Slot = tuple[str, int]
"""QOM path of the bus, and the slot's number on it."""


class Slots:
    """The slots of one VM's own devices."""

    def __init__(self, facade: Facade, devices: Iterable[str]) -> None:
        self._facade = facade
        self._devices = tuple(devices)
        self._slots: dict[Slot, str] = {}
        self._handlers: dict[str, str] = {}
        """Hot-pluggable buses with our devices: their path → what handled their hot plug."""
        self._leaving: set[str] = set()
        """Paths of devices that the guest has been asked to give up."""
        self._loaded = 0
        """How many more it was asked for in a state that was loaded."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Let nothing be unplugged from here on; call it before the guest runs. Raises QmpError, QemuGone."""
        for ident in self._devices:
            for slot in await self._upwards(_path(ident)):
                self._slots.setdefault(slot, ident)
                handler = await self._get(slot[0], _HANDLER)
                if handler and handler == slot[0].rpartition("/")[0]:
                    await self._look_at_port(handler, ident)  # a link that QEMU follows without a look
                elif handler:
                    self._handlers[slot[0]] = handler
        await self._link(open_=False)

    def register(self) -> None:
        """Put `device_add` and `device_del` into the facade."""
        facade = self._facade
        facade.handlers["device_add"] = self._add
        facade.handlers["device_del"] = self._delete
        facade.hmp_handlers["device_add"] = self._hmp_add
        facade.hmp_handlers["device_del"] = self._hmp_delete
        facade.on_event("DEVICE_DELETED", self._left)
        facade.on_event("DEVICE_UNPLUG_GUEST_ERROR", self._left)

    async def after_load(self) -> None:
        """A state came with what its guest had been asked for; the VM is stopped. Raises QmpError, QemuGone."""
        self._leaving.clear()
        self._loaded = sum([await self._asked_for(bus, handler) for bus, handler in self._handlers.items()])
        await self._link(open_=bool(self._loaded))

    # --- commands ----------------------------------------------------------------------------------------------------

    async def _add(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        async with self._opened():
            return await facade.execute("device_add", arguments)

    async def _hmp_add(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        async with self._opened():
            return await facade.hmp(f"device_add {arguments}".strip())

    async def _delete(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        async with self._unplugging(str(arguments.get("id", ""))):
            return await facade.execute("device_del", arguments)

    async def _hmp_delete(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        if not arguments:
            return await facade.hmp("device_del")  # which says what is missing
        await self._delete(facade, {"id": arguments})
        return ""

    @contextlib.asynccontextmanager
    async def _unplugging(self, name: str) -> AsyncIterator[None]:
        """Refuse what would take one of our devices out; else the buses stay open until the guest has answered."""
        path = _path(name)
        try:
            slot = await self._slot(path)
        except QmpError:
            yield  # not there, or no PCI device: QEMU says so, or does it
            return
        if slot in self._slots:
            ours = self._slots[slot]
            shared = "" if path == _path(ours) else f" shares its slot with '{ours}', or leads to it, and"
            raise QmpError("GenericError", f"Device '{name}'{shared} cannot be unplugged: QEMU would abort")
        async with self._opened():
            if slot[0] in self._handlers:
                self._leaving.add(path)  # now: the guest's answer may come before QEMU's
            try:
                yield
            except QmpError:
                self._leaving.discard(path)
                raise

    def _left(self, event: dict[str, Any]) -> None:
        path = str(event["data"]["path"])
        if path in self._leaving:
            self._leaving.remove(path)
        elif self._loaded and path.count("/") == _path("").count("/"):  # a device, and no part of one
            self._loaded -= 1
        else:
            return
        self._later(self._close_again())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_again(self) -> None:
        try:
            async with self._facade.exclusive(), self._opened():
                pass
        except QmpError as error:
            log.warning("the slots of NVMe devices are open to unplugging: %s", error)
        except QemuGone:
            log.debug("QEMU ended before the slots were closed again")

    # --- QEMU's objects ----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        """Open the buses, and close them again unless a guest has yet to answer."""
        await self._link(open_=True)
        try:
            yield
        finally:
            if not (self._leaving or self._loaded):
                await self._link(open_=False)

    async def _look_at_port(self, port: str, ident: str) -> None:
        """Warn where a port plugs and unplugs by itself, and was not made one that does not (`vm/line/ports.py`)."""
        try:
            is_on = await self._get(port, "hotplug") == "True"
        except QmpError:
            is_on = True  # a bridge with SHPC
        if is_on:
            log.warning("the guest can eject '%s' from '%s', which ends its VM", ident, port.rpartition("/")[2])

    async def _link(self, *, open_: bool) -> None:
        for bus, handler in self._handlers.items():
            value = handler if open_ else ""
            await self._facade.execute("qom-set", {"path": bus, "property": _HANDLER, "value": value})

    async def _asked_for(self, bus: str, handler: str) -> int:
        """Return how many slots of a bus the guest is asked for; 0 where that is not said in ports."""
        ports = _PORTS.get(await self._get(handler, "type"))
        if ports is None:
            return 0
        try:
            number = await self._get(bus, "acpi-pcihp-bsel")
        except QmpError:
            return 0  # the bus was given no number: ACPI ejects nothing on it
        selected = await self._read(ports + _SELECT)
        await self._facade.hmp(f"o /w {ports + _SELECT:#x} {number}")
        down = await self._read(ports + _DOWN)
        await self._facade.hmp(f"o /w {ports + _SELECT:#x} {selected:#x}")
        return down.bit_count()

    async def _read(self, port: int) -> int:
        shown = await self._facade.hmp(f"i /w {port:#x}")
        found = re.search(r"= (0x[0-9a-f]+)", shown)
        if found is None:
            raise QmpError("GenericError", f"QEMU's answer to an HMP port read is not understood: {shown.strip()}")
        return int(found[1], 16)

    async def _upwards(self, path: str) -> list[Slot]:
        """Return the slot of a device, and those of the ports and bridges that lead to it."""
        slots = [await self._slot(path)]
        with contextlib.suppress(QmpError):  # the machine's own bus is no PCI device's
            while True:
                slots.append(await self._slot(slots[-1][0].rpartition("/")[0]))
        return slots

    async def _slot(self, path: str) -> Slot:
        devfn = int(await self._get(path, "addr"))  # PCI Local Bus 3.0, 3.2.2.3.4: five bits slot, three function
        return await self._get(path, "parent_bus"), devfn >> 3

    async def _get(self, path: str, name: str) -> str:
        return str(await self._facade.execute("qom-get", {"path": path, "property": name}))


def _path(name: str) -> str:
    """Return the QOM path of a device by what `device_del` takes: its id, or a path."""
    return name if name.startswith("/") else f"/machine/peripheral/{name}"
