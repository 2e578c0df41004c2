"""The slots of our devices against a monitor that has QEMU's objects: what is refused, which bus is open, and when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.slots import Slots
from tests.fake_qemu import FakeQemu, facade_on_fake

BUS = "/machine/i440fx/pci.0"
PLACES = {"nv": (BUS, 5 << 3), "beside": (BUS, 5 << 3 | 1), "rng": (BUS, 6 << 3), "fixed": ("/machine/q35/pcie.0", 8)}
PORT = "/machine/peripheral/rp"
PLACES |= {"native": (f"{PORT}/rp", 0), "rp": ("/machine/q35/pcie.0", 9 << 3)}
PLACES |= {"far": ("/machine/peripheral/bridge/bridge", 1 << 3), "bridge": (BUS, 7 << 3)}


class Objects:
    """QEMU's objects as far as they are asked for."""

    def __init__(self, qemu: FakeQemu) -> None:
        self.handler = "/machine/pm"
        self.open_at: list[str] = []
        """Plugs and unplugs that came while the bus was open."""
        self.refuses = False
        self.port_plugs = True
        qemu.answers |= {
            "qom-get": self._get,
            "qom-set": self._set,
            "device_add": self._plug,
            "device_del": self._plug,
        }

    async def _get(self, arguments: dict[str, Any]) -> Any:
        if arguments["path"] == BUS:
            return self.handler
        if arguments["path"] == "/machine/q35/pcie.0":
            return ""
        if arguments["path"] == f"{PORT}/rp":
            return PORT
        if arguments["path"] == "/machine/peripheral/bridge/bridge":
            return ""
        if arguments["property"] == "hotplug":
            return self.port_plugs
        if arguments["path"] in ("/machine/i440fx", "/machine/q35"):
            return QmpError("GenericError", "Property 'addr' not found")
        name = arguments["path"].removeprefix("/machine/peripheral/")
        if name not in PLACES:
            raise AssertionError(name)
        bus, devfn = PLACES[name]
        return {"parent_bus": bus, "addr": devfn}[arguments["property"]]

    async def _set(self, arguments: dict[str, Any]) -> Any:
        assert (arguments["path"], arguments["property"]) == (BUS, "hotplug-handler")
        self.handler = arguments["value"]
        return {}

    async def _plug(self, arguments: dict[str, Any]) -> Any:
        if self.handler:
            self.open_at.append(arguments["id"])
        return {}


@contextlib.asynccontextmanager
async def slots(*devices: str, port_plugs: bool = True) -> AsyncIterator[tuple[Facade, FakeQemu, Objects]]:
    async with facade_on_fake() as (facade, qemu):
        objects = Objects(qemu)
        objects.port_plugs = port_plugs
        ours = Slots(facade, devices or ("nv",))
        await ours.close()
        ours.register()
        yield facade, qemu, objects


async def until_closed(objects: Objects) -> None:
    async with asyncio.timeout(20):
        while objects.handler:
            await asyncio.sleep(0.005)


def test_a_guest_finds_no_hot_pluggable_bus() -> None:
    async def story() -> None:
        async with slots() as (_, _, objects):
            assert objects.handler == ""

    asyncio.run(story())


@pytest.mark.parametrize("name", ["nv", "/machine/peripheral/nv"])
def test_device_del_of_an_nvme_is_refused_in_every_monitor(name: str) -> None:
    async def story() -> None:
        async with slots() as (facade, qemu, _):
            desc = f"Device '{name}' cannot be unplugged: QEMU would abort"
            with pytest.raises(QmpError, match=desc):
                await facade.dispatch("device_del", {"id": name})
            assert await facade.dispatch_hmp(f"device_del {name}") == f"Error: {desc}\n"
            line = {"command-line": f"device_del {name}"}
            assert await facade.dispatch("human-monitor-command", line) == f"Error: {desc}\n"
            assert "device_del" not in [request["execute"] for request in qemu.requests]

    asyncio.run(story())


def test_another_function_of_the_slot_is_refused_too() -> None:
    async def story() -> None:
        async with slots() as (facade, _, _):
            with pytest.raises(
                QmpError, match="'beside' shares its slot with 'nv', or leads to it, and cannot be unplugged"
            ):
                await facade.dispatch("device_del", {"id": "beside"})

    asyncio.run(story())


def test_the_bus_is_open_until_another_device_has_left() -> None:
    async def story() -> None:
        async with slots() as (facade, qemu, objects):
            await facade.dispatch("device_del", {"id": "rng"})
            assert objects.open_at == ["rng"]
            assert objects.handler == "/machine/pm"
            qemu.event("DEVICE_DELETED", device="rng", path="/machine/peripheral/rng")
            await until_closed(objects)

    asyncio.run(story())


def test_the_bus_is_closed_when_qemu_or_the_guest_refuses() -> None:
    async def story() -> None:
        async with slots() as (facade, qemu, objects):
            await facade.dispatch("device_del", {"id": "rng"})
            qemu.event("DEVICE_UNPLUG_GUEST_ERROR", device="rng", path="/machine/peripheral/rng")
            await until_closed(objects)
            qemu.answers["device_del"] = RuntimeError("no")
            with pytest.raises(QmpError, match="no"):
                await facade.dispatch("device_del", {"id": "rng"})
            assert objects.handler == ""

    asyncio.run(story())


def test_the_bus_is_open_while_a_device_is_plugged() -> None:
    async def story() -> None:
        async with slots() as (facade, _, objects):
            await facade.dispatch("device_add", {"driver": "virtio-rng-pci", "id": "new"})
            assert objects.open_at == ["new"]
            assert objects.handler == ""

    asyncio.run(story())


def test_what_is_no_pci_device_is_qemus() -> None:
    async def story() -> None:
        async with slots() as (facade, qemu, objects):
            qemu.answers["qom-get"] = RuntimeError("Property 'usb-kbd.addr' not found")
            assert await facade.dispatch("device_del", {"id": "kbd"}) == {}
            assert objects.open_at == []

    asyncio.run(story())


def test_a_bus_without_hot_plug_stays_as_it_is() -> None:
    async def story() -> None:
        async with slots("fixed") as (facade, qemu, objects):
            await facade.dispatch("device_add", {"driver": "virtio-rng-pci", "id": "new"})
            assert "qom-set" not in [request["execute"] for request in qemu.requests]
            assert objects.open_at == ["new"]

    asyncio.run(story())


def test_a_state_that_asked_for_a_device_keeps_the_bus_open_until_it_has_left() -> None:
    """And the guest finds the bus selected that it had selected."""

    async def story() -> None:
        async with facade_on_fake() as (facade, qemu):
            objects = Objects(qemu)
            properties = {"type": "PIIX4_PM", "acpi-pcihp-bsel": 3}

            async def get(arguments: dict[str, Any]) -> Any:
                return properties.get(arguments["property"]) or await objects._get(arguments)

            qemu.answers["qom-get"] = get
            selects = [f"o /w 0xae10 {value}" for value in ("3", "0x1")]
            qemu.hmp_answers |= {"i /w 0xae10": "portl[0xae10] = 0x00000001", **dict.fromkeys(selects, "")}
            qemu.hmp_answers["i /w 0xae04"] = "portl[0xae04] = 0x00000042"
            ours = Slots(facade, ["nv"])
            await ours.close()
            ours.register()
            await ours.after_load()
            assert objects.handler == "/machine/pm"
            lines = [request.get("arguments", {}).get("command-line", "") for request in qemu.requests]
            assert [line for line in lines if line.startswith("o ")] == selects
            for path in ("rng/virtio-backend", "rng"):
                qemu.event("DEVICE_DELETED", path=f"/machine/peripheral/{path}")
            await facade.execute("device_add", {"id": "after"})
            assert objects.open_at == ["after"], "one of two has yet to leave"
            qemu.event("DEVICE_DELETED", path="/machine/peripheral-anon/device[0]")
            await until_closed(objects)

    asyncio.run(story())


@pytest.mark.parametrize("plugs", [False, True])
def test_a_port_that_plugs_by_itself_keeps_its_handler_and_is_warned_of(
    plugs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """QEMU follows the link of such a bus without a look whether there is one."""

    async def story() -> None:
        async with slots("native", port_plugs=plugs) as (facade, qemu, _):
            assert "qom-set" not in [request["execute"] for request in qemu.requests]
            with pytest.raises(QmpError, match="Device 'native' cannot be unplugged"):
                await facade.dispatch("device_del", {"id": "native"})

    asyncio.run(story())
    said = ["the guest can eject 'native' from 'rp', which ends its VM"] if plugs else []
    assert [record.getMessage() for record in caplog.records] == said


def test_a_bridge_that_leads_to_a_disk_cannot_be_unplugged_either() -> None:
    async def story() -> None:
        async with slots("far") as (facade, _, objects):
            assert objects.handler == ""
            with pytest.raises(QmpError, match="'bridge' shares its slot with 'far', or leads to it, and cannot be"):
                await facade.dispatch("device_del", {"id": "bridge"})

    asyncio.run(story())
