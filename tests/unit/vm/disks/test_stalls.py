"""The VM stands still while its guest waits for a disk that does not answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nvmove.vm.disks import stalls
from nvmove.vm.disks.stalls import Stalls
from nvmove.vm.moves.runstate import RunState
from tests.fake_qemu import facade_on_fake

LIMIT = 20


class Device:
    """A device with I/O at a disk that answers when it is told to."""

    id = "nv0"

    def __init__(self) -> None:
        self.waits = True
        self.answered = threading.Event()
        self.paused = False

    def pause(self, timeout: float | None = None) -> None:
        if not self.answered.wait(timeout):
            raise TimeoutError
        self.waits = False
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Bench:
    def __init__(self, facade: Any, qemu: Any) -> None:
        self.qemu = qemu
        self.running = True
        self.status = "running"
        self.told: list[dict[str, Any]] = []
        self.device = Device()
        self.runstate = RunState(facade, [self.device])
        facade.emit = self.told.append
        qemu.answers |= {"query-status": self._query, "stop": self._stop, "cont": self._cont}
        self.stalls = Stalls()
        self.stalls.connect(facade, self.runstate, [self.device])

    async def _query(self, _arguments: Any) -> dict[str, Any]:
        return {"running": self.status == "running", "status": self.status}

    async def _stop(self, _arguments: Any) -> dict[str, Any]:
        self.status = "paused"
        return {}

    async def _cont(self, _arguments: Any) -> dict[str, Any]:
        self.status = "running"
        await self.runstate.follow("RESUME")
        return {}

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not is_so():
                await asyncio.sleep(0.001)

    async def watch(self) -> None:
        self.stalls._begin("nv0")
        await self.stalls._watched["nv0"]

    @property
    def events(self) -> list[bool]:
        assert all(event["event"] == "NVMOVE_DISK_STALLED" for event in self.told)
        assert all(event["data"]["qom-path"] == "/machine/peripheral/nv0" for event in self.told)
        return [event["data"]["stalled"] for event in self.told]


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "GRACE", 0.0)


def story(tell: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        async with facade_on_fake() as (facade, qemu):
            await tell(Bench(facade, qemu))

    asyncio.run(run())


def test_the_vm_stands_still_until_the_disk_answers_and_runs_on() -> None:
    async def tell(bench: Bench) -> None:
        threading.Thread(target=bench.stalls.report, args=("nv0",)).start()  # from any thread
        await bench.until(lambda: bench.status == "paused")
        assert bench.events == [True]
        bench.device.answered.set()
        await bench.until(lambda: bench.events == [True, False])
        assert bench.status == "running"
        assert not bench.device.paused

    story(tell)


def test_who_waits_no_more_when_the_moment_is_over_is_left_alone() -> None:
    async def tell(bench: Bench) -> None:
        bench.device.waits = False
        await bench.watch()
        assert (bench.status, bench.events) == ("running", [])

    story(tell)


def test_a_stopped_vm_stays_stopped() -> None:
    async def tell(bench: Bench) -> None:
        bench.status = "paused"
        await bench.watch()
        assert (bench.status, bench.events) == ("paused", [])

    story(tell)


def test_a_migration_that_has_taken_the_vm_meanwhile_keeps_it() -> None:
    async def tell(bench: Bench) -> None:
        bench.stalls.report("nv0")
        await bench.until(lambda: bench.status == "paused")
        bench.status = "finish-migrate"
        bench.device.answered.set()
        await bench.until(lambda: bench.events == [True, False])
        await bench.until(lambda: not bench.stalls._watched)
        assert bench.status == "finish-migrate"

    story(tell)


def test_a_report_after_the_end_is_for_nobody() -> None:
    kept: list[Bench] = []

    async def tell(bench: Bench) -> None:
        kept.append(bench)

    story(tell)
    kept[0].stalls.report("nv0")
