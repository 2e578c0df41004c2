"""nvmove's own commands, as QMP and HMP clients have them, with a fake QEMU behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
from tests.fake_qemu import FakeQemu, facade_on_fake
from tests.nvme_guest import Disk

from nvmove.block.config import DriveConfig
from nvmove.vm.blockinfo import ServedDrive
from nvmove.vm.handlers import Handlers
from nvmove.vm.monitor import Facade, QmpError
from nvmove.vm.qtest import ReplayError
from nvmove.vm.runstate import RunState
from nvmove.vm.snapshot import SnapshotError, Snapshots


class Device:
    def __init__(self) -> None:
        self.log: list[str] = []

    def pause(self, timeout: float | None = None) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")


class FakeSnapshots:
    """Says what it was asked; `error` is what it raises."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[object] = []
        self.jobs: set[str] = set()
        self.is_over = asyncio.Event()

    def _answer(self, *question: object) -> str:
        self.asked.append(question if len(question) > 1 else question[0])
        if self.error is not None:
            raise self.error
        return "printed\r\n"

    def check(self) -> None:
        self._answer("check")

    async def save(self, line: str) -> str:
        return self._answer(line)

    async def load(self, line: str) -> str:
        return self._answer(line)

    async def job(self, name: str, arguments: dict[str, Any], nodes: Sequence[str]) -> Any:
        self._answer(name, arguments, nodes)
        return {}

    def owns(self, job_id: str) -> bool:
        return job_id in self.jobs

    async def concluded(self, job_id: str) -> None:
        await self.is_over.wait()


class Bench:
    """A facade with our handlers; a raw disk `d1` of our own, and with `exported` a disk `d0` in QEMU."""

    def __init__(self, facade: Facade, qemu: FakeQemu, exported: bool) -> None:
        self.facade = facade
        self.qemu = qemu
        self.device = Device()
        self.snapshots = FakeSnapshots()
        self.seen: list[dict[str, Any]] = []
        facade.subscribe(self, self.seen.append)
        config = DriveConfig(id="d1", node_name="n1", file="/absent/b.raw", format="raw")
        drives = [ServedDrive("d1", "n1", "nv1", config, Disk(), in_qemu=False)]
        if exported:
            drives.append(ServedDrive("d0", "", "nv0", DriveConfig(id="d0", file="a.qcow2"), Disk(), in_qemu=True))
        runstate = RunState(facade, [self.device])
        Handlers(facade, runstate, cast(Snapshots, self.snapshots), drives).register()
        qemu.answers |= {"stop": self._stop, "cont": self._cont}

    async def _stop(self, _arguments: Any) -> Any:
        self.qemu.event("STOP")
        return {}

    async def _cont(self, _arguments: Any) -> Any:
        self.qemu.event("RESUME")
        return {}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)

    async def refused(self, name: str, arguments: dict[str, Any] | None = None) -> str:
        with pytest.raises(QmpError) as raised:
            await self.facade.dispatch(name, arguments)
        assert raised.value.class_ == "GenericError"
        return raised.value.desc


def with_bench(test: Callable[[Bench], Awaitable[None]], exported: bool = True) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(Bench(facade, qemu, exported))

    asyncio.run(main())


# --- run state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hmp", [False, True])
def test_after_stop_the_devices_are_at_rest_and_cont_lets_them_go_on(by_hmp: bool) -> None:
    async def test(bench: Bench) -> None:
        async def say(word: str) -> None:
            answer = await (bench.facade.dispatch_hmp(word) if by_hmp else bench.facade.dispatch(word))
            assert answer == ("" if by_hmp else {})

        await say("stop")
        assert set(bench.device.log) == {"pause"}
        await say("cont")
        await bench.until(lambda: bench.device.log[-1] == "resume")
        assert [event["event"] for event in bench.seen] == ["STOP", "RESUME"]

    with_bench(test)


def test_the_devices_follow_whoever_stops_the_vm() -> None:
    async def test(bench: Bench) -> None:
        for event, does in (("STOP", "pause"), ("RESUME", "resume"), ("STOP", "pause")):
            bench.device.log.clear()
            bench.qemu.event(event)
            await bench.until(lambda: bool(bench.device.log))
            assert bench.device.log == [does]

    with_bench(test)


# --- snapshots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["savevm", "savevm t1", "loadvm t1"])
def test_snapshots_by_hmp_print_what_qemu_prints(line: str) -> None:
    async def test(bench: Bench) -> None:
        assert await bench.facade.dispatch_hmp(f" {line} ") == "printed\r\n"
        assert bench.snapshots.asked == [line]

    with_bench(test)


ERRORS = [SnapshotError("no room"), ReplayError("no function")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_snapshot_that_fails_is_one_line(error: Exception) -> None:
    async def test(bench: Bench) -> None:
        bench.snapshots.error = error
        for name in ("savevm t1", "loadvm t1"):
            assert await bench.facade.dispatch_hmp(name) == f"Error: {error}\n"
        for name in ("snapshot-save", "snapshot-load"):
            assert await bench.refused(name, {"job-id": "j"}) == str(error)

    with_bench(test)


def test_delvm_is_qemus_unless_a_disk_cannot_hold_snapshots() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.hmp_answers["delvm t1"] = "done\r\n"
        assert await bench.facade.dispatch_hmp("delvm t1") == "done\r\n"
        bench.snapshots.error = SnapshotError("cannot hold snapshots")
        assert await bench.facade.dispatch_hmp("delvm t1") == "Error: cannot hold snapshots\n"

    with_bench(test)


def test_a_job_is_told_which_nodes_qemu_does_not_have() -> None:
    async def test(bench: Bench) -> None:
        arguments = {"job-id": "j", "tag": "t", "vmstate": "n0", "devices": ["n0"]}
        assert await bench.facade.dispatch("snapshot-save", arguments) == {}
        assert bench.snapshots.asked == [("snapshot-save", arguments, ("n1", "d1"))]

    with_bench(test)


def test_clients_learn_of_a_jobs_end_when_the_vm_runs_as_it_promises() -> None:
    async def test(bench: Bench) -> None:
        def ended() -> list[str]:
            return [event["data"]["id"] for event in bench.seen if event["data"]["status"] == "concluded"]

        bench.snapshots.jobs.add("ours")
        for status in ("running", "concluded"):
            bench.qemu.event("JOB_STATUS_CHANGE", id="ours", status=status)
        bench.qemu.event("JOB_STATUS_CHANGE", id="other", status="concluded")
        await bench.until(lambda: bool(ended()))
        assert [(event["data"]["id"], event["data"]["status"]) for event in bench.seen] == [
            ("ours", "running"),
            ("other", "concluded"),
        ]
        bench.snapshots.is_over.set()
        await bench.until(lambda: ended() == ["other", "ours"])
        assert bench.seen[-1]["timestamp"] == {"seconds": 12, "microseconds": 34}, "QEMU's own"

    with_bench(test)


# --- block devices --------------------------------------------------------------------------------------------------


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
            Handlers(facade, RunState(facade, []), cast(Snapshots, FakeSnapshots()), [drive]).register()
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
