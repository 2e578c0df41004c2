"""Block commands that name an image of nvmove's own: one line with the way out, and QEMU is not asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nvmove.block.config import DriveConfig
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.ownimages import COMMANDS, HMP_COMMANDS, OwnImages
from nvmove.vm.monitor.facade import Facade, QmpError
from tests.disk import Disk
from tests.fake_qemu import FakeQemu, facade_on_fake

RAW = ServedDrive("d1", "n1", "nv1", DriveConfig(id="d1", file="b.raw"), Disk(), in_qemu=False)
EXPORTED = ServedDrive("d0", "n0", "nv0", DriveConfig(id="d0", file="a.qcow2"), Disk(), in_qemu=True)


def with_facade(test: Callable[[Facade, FakeQemu], Awaitable[None]], *drives: ServedDrive) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            OwnImages(facade, drives or (EXPORTED, RAW)).register()
            qemu.answers |= {name: {} for name in (*COMMANDS, "block_set_io_throttle")}
            await test(facade, qemu)

    asyncio.run(main())


def arguments(node: str) -> dict[str, Any]:
    """What one of the commands may be given; each has the node somewhere else."""
    return {"job-id": "n1", "options": [{"node-name": "x", "file": {"driver": "file", "backing": node}}]}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("node", ["n1", "d1"])
def test_a_command_that_names_such_an_image_is_refused(name: str, node: str) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        with pytest.raises(QmpError) as raised:
            await facade.dispatch(name, arguments(node))
        assert raised.value.desc == (
            f"'{node}' is an image that nvmove has opened, and QEMU does not know: "
            "start with -device nvme,…,image-owner=qemu, and QEMU has it"
        )
        assert [request["execute"] for request in qemu.requests] == ["qmp_capabilities"]

    with_facade(test)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_about_other_nodes_is_qemus(name: str) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        assert await facade.dispatch(name, arguments("n0")) == {}
        assert qemu.requests[-1]["arguments"] == arguments("n0")

    with_facade(test)


@pytest.mark.parametrize("name", HMP_COMMANDS)
def test_the_same_by_hmp(name: str) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        said = await facade.dispatch_hmp(f"{name} -f d1 /target")
        assert said.startswith("Error: 'd1' is an image that nvmove has opened") and said.count("\n") == 1
        qemu.hmp_answers |= {f"{name} -f d0 d1": "done\r\n", name: "usage\r\n"}
        assert await facade.dispatch_hmp(f"{name} -f d0 d1") == "done\r\n"
        assert await facade.dispatch_hmp(name) == "usage\r\n"

    with_facade(test)


def test_an_nbd_server_that_is_to_export_everything_cannot() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        assert "is an image that nvmove has opened" in await facade.dispatch_hmp("nbd_server_start -a :1")
        qemu.hmp_answers["nbd_server_start :1"] = ""
        assert await facade.dispatch_hmp("nbd_server_start :1") == ""

    with_facade(test)


def test_what_handled_a_command_before_still_does() -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, _qemu):

            async def qmp(_facade: Facade, arguments: dict[str, Any]) -> Any:
                return arguments

            async def hmp(_facade: Facade, arguments: str, _out: Any) -> str:
                return f"<{arguments}>"

            facade.handlers["block-export-add"] = qmp
            facade.hmp_handlers |= {"nbd_server_add": hmp, "nbd_server_start": hmp}
            OwnImages(facade, [RAW]).register()
            assert await facade.dispatch("block-export-add", {"node-name": "n0"}) == {"node-name": "n0"}
            assert await facade.dispatch_hmp("nbd_server_add d0") == "<d0>"
            assert await facade.dispatch_hmp("nbd_server_start :1") == "<:1>"

    asyncio.run(main())


def test_without_such_images_nothing_of_qemus_is_touched() -> None:
    async def test(facade: Facade, _qemu: FakeQemu) -> None:
        assert not set(COMMANDS) & set(facade.handlers)
        assert not set(HMP_COMMANDS) & set(facade.hmp_handlers)

    with_facade(test, EXPORTED)


@pytest.mark.parametrize("name", [{"device": "d0"}, {"id": "nv0"}, {"device": "d1"}])
def test_limits_that_would_have_no_effect_are_refused(name: dict[str, str]) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        with pytest.raises(QmpError, match="does not meet the limits of a device"):
            await facade.dispatch("block_set_io_throttle", {**name, "bps": 1})
        assert "Error: " in await facade.dispatch_hmp(f"block_set_io_throttle {next(iter(name.values()))} 1 0 0 0 0 0")
        assert await facade.dispatch("block_set_io_throttle", {"device": "other"}) == {}
        qemu.hmp_answers["block_set_io_throttle other 1"] = ""
        assert await facade.dispatch_hmp("block_set_io_throttle other 1") == ""

    with_facade(test)
