"""`query-blockstats` and `info blockstats`: rows for the disks of nvmove devices, in QEMU's form."""

from __future__ import annotations

import asyncio
from typing import Any

from nvmove.block.backend import Operation
from nvmove.block.config import DriveConfig
from nvmove.nvme.counters import Counters
from nvmove.vm.disks import blockstats
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.blockstats import BlockStats
from tests.disk import Disk
from tests.fake_qemu import facade_on_fake

OF_QEMU = {"rd_bytes": 0, "rd_operations": 0, "wr_highest_offset": 77, "rd_total_time_ns": 0}
OTHER = {"device": "cd", "stats": OF_QEMU, "qdev": "ide0"}


def counters() -> Counters:
    found = Counters()
    found.add(Operation.READ, 3, 12288)
    found.add(Operation.WRITE, 2, 8192)
    found.add(Operation.WRITE_ZEROES, 1, 4096)
    found.add(Operation.FLUSH, 4, 0)
    found.add(Operation.DISCARD, 1, 1 << 20)
    found.fail(Operation.WRITE)
    return found


def drive(name: str, node: str, *, in_qemu: bool, export: str = "") -> ServedDrive:
    config = DriveConfig(id=name, file="a")
    return ServedDrive(name, node, f"nv-{node}", config, Disk(), in_qemu, counters=counters, export=export)


RAW = drive("d1", "n1", in_qemu=False)
QCOW2 = drive("d0", "n0", in_qemu=True, export="e0")
BLOCKDEV = drive("", "n2", in_qemu=True, export="e2")


def test_all_kinds_are_counted_and_zeroes_are_written() -> None:
    found = blockstats.stats(counters())
    assert (found["rd_operations"], found["rd_bytes"]) == (3, 12288)
    assert (found["wr_operations"], found["wr_bytes"], found["failed_wr_operations"]) == (3, 12288, 1)
    assert (found["flush_operations"], found["failed_flush_operations"]) == (4, 0)
    assert (found["unmap_operations"], found["unmap_bytes"]) == (1, 1 << 20)
    assert not {"flush_bytes", "flush_merged"} & found.keys()


def test_each_disk_has_one_row_and_others_are_left_alone() -> None:
    answer: list[dict[str, Any]] = [{"device": "d0", "node-name": "n0", "parent": {}, "stats": OF_QEMU}, OTHER]
    rows = blockstats.complete(answer, [RAW, QCOW2, BLOCKDEV], {"e0": "n0", "e2": "overlay"})
    assert [(row["device"], row.get("node-name"), row["qdev"]) for row in rows] == [
        ("d0", "n0", "nv-n0"),
        ("cd", None, "ide0"),
        ("d1", "n1", "nv-n1"),
        ("", "overlay", "nv-n2"),
    ]
    assert rows[1] is OTHER
    assert [row["stats"]["rd_bytes"] for row in rows] == [12288, 0, 12288, 12288]
    assert (rows[0]["parent"], rows[0]["stats"]["wr_highest_offset"]) == ({}, 77)


def test_the_monitors_print_them() -> None:
    async def test() -> None:
        async with facade_on_fake() as (facade, qemu):
            qemu.answers["query-blockstats"] = []
            qemu.answers["query-block-exports"] = [{"id": "e2", "node-name": "overlay"}]
            BlockStats(facade, [RAW, BLOCKDEV]).register()
            rows = await facade.dispatch("query-blockstats")
            assert [row.get("node-name") for row in rows] == ["n1", "overlay"]
            assert await facade.dispatch("query-blockstats", {"query-nodes": True}) == []
            text = await facade.dispatch_hmp("info blockstats")
            assert text.splitlines()[:5] == [
                "d1: idle_time_ns=0",
                "                          bytes       operations            total_time_ns     merged",
                "Read:                     12288                3                        0          0",
                "Write:                    12288                3                        0          0",
                "Flush:                                         4                        0",
            ]

    asyncio.run(test())
