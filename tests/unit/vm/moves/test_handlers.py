"""Run state and snapshots, as QMP and HMP clients have them, with a fake QEMU behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest

from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.handlers import Handlers
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import SnapshotError, Snapshots
from tests.fake_qemu import FakeQemu, facade_on_fake


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
    """A facade with our handlers; a raw disk `d1` of our own, its node `n1`."""

    def __init__(self, facade: Facade, qemu: FakeQemu) -> None:
        self.facade = facade
        self.qemu = qemu
        self.device = Device()
        self.snapshots = FakeSnapshots()
        self.seen: list[dict[str, Any]] = []
        facade.subscribe(self, self.seen.append)
        runstate = RunState(facade, [self.device])
        Handlers(facade, runstate, cast(Snapshots, self.snapshots), ("n1", "d1")).register()
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


def with_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(Bench(facade, qemu))

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
