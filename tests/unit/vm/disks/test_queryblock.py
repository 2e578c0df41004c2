"""`query-block` and `info block`, with a fake QEMU behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from nvmove.block.config import DriveConfig
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.queryblock import QueryBlock
from nvmove.vm.monitor.facade import Facade
from tests.disk import Disk
from tests.fake_qemu import FakeQemu, facade_on_fake


class Bench:
    """A facade with our commands; a raw disk `d1` of our own, and a disk `d0` in QEMU."""

    def __init__(self, facade: Facade, qemu: FakeQemu) -> None:
        self.facade = facade
        self.qemu = qemu
        config = DriveConfig(id="d1", node_name="n1", file="/absent/b.raw", format="raw")
        own = ServedDrive("d1", "n1", "nv1", config, Disk(), in_qemu=False)
        exported = ServedDrive("d0", "", "nv0", DriveConfig(id="d0", file="a.qcow2"), Disk(), in_qemu=True)
        QueryBlock(facade, [own, exported]).register()


def with_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(Bench(facade, qemu))

    asyncio.run(main())


def test_query_block_shows_the_disks_that_nvmove_serves() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["query-block"] = [{"device": "d0", "tray_open": False, "inserted": {}}, {"device": "cd"}]
        answer = await bench.facade.dispatch("query-block")
        assert [(info["device"], info.get("qdev")) for info in answer] == [("d0", "nv0"), ("cd", None), ("d1", "nv1")]

    with_bench(test)


QEMU_TEXT = "d0 (#block1): a.qcow2 (qcow2)\r\n    Removable device: not locked, tray closed\r\n"


def test_info_block_shows_them_too() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.hmp_answers |= {"info block": QEMU_TEXT, "info block d0": QEMU_TEXT, "info block -v": QEMU_TEXT}
        every = await bench.facade.dispatch_hmp("info block")
        assert "Attached to:      nv0" in every and "Attached to:      nv1" in every
        one = await bench.facade.dispatch_hmp("info block d0")
        assert "nv0" in one and "nv1" not in one
        assert "image: /absent/b.raw" in await bench.facade.dispatch_hmp("info block -v")

    with_bench(test)


@pytest.mark.parametrize("name", ["d1", "n1"])
def test_info_block_of_a_disk_of_ours_does_not_ask_qemu(name: str) -> None:
    async def test(bench: Bench) -> None:
        assert "/absent/b.raw" in await bench.facade.dispatch_hmp(f"info block {name}")
        assert [request["execute"] for request in bench.qemu.requests] == ["qmp_capabilities"]

    with_bench(test)


def test_info_block_of_named_nodes_is_qemus() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.hmp_answers["info block -n"] = "nodes\r\n"
        assert await bench.facade.dispatch_hmp("info block -n") == "nodes\r\n"

    with_bench(test)


def test_a_node_of_blockdev_is_shown_where_its_export_is_now() -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            config = DriveConfig(node_name="n0", file="a.qcow2")
            drive = ServedDrive("", "n0", "nv0", config, Disk(), in_qemu=True, export="e0")
            QueryBlock(facade, [drive]).register()
            qemu.answers |= {
                "query-block": [],
                "query-block-exports": [{"id": "e0", "node-name": "overlay"}, {"id": "e1", "node-name": "n0"}],
                "query-named-block-nodes": [{"node-name": "n0"}, {"node-name": "overlay"}],
            }
            for line in ("info block overlay", "info block -v overlay"):
                qemu.hmp_answers[line] = "\r\noverlay: o.qcow2 (qcow2)\r\n"
            qemu.hmp_answers |= {"info block": "", "info block n0": "\r\nn0: a\r\n"}
            qemu.hmp_answers["info block -v"] = "cd: [not inserted]\r\n"
            (info,) = await facade.dispatch("query-block")
            assert (info["qdev"], info["inserted"]) == ("nv0", {"node-name": "overlay"})
            shown = "overlay: o.qcow2 (qcow2)\r\n    Attached to:      nv0\r\n"
            assert await facade.dispatch_hmp("info block") == shown
            assert await facade.dispatch_hmp("info block overlay") == shown
            assert await facade.dispatch_hmp("info block -v") == f"cd: [not inserted]\r\n\r\n{shown}"
            assert "Attached" not in await facade.dispatch_hmp("info block n0")

    asyncio.run(main())


def test_images_that_are_gone_from_their_path_are_still_shown() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["query-block"] = []
        (info,) = await bench.facade.dispatch("query-block")
        assert info["inserted"]["image"]["actual-size"] == 0

    with_bench(test)
