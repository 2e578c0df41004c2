"""Faults on purpose: what rules do to requests, and that without them nothing is done."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmove.block.backend import Operation, Request
from nvmove.block.delay import Delays
from nvmove.block.fault import FaultRule, FaultRules, FaultyBackend
from tests.block_helpers import Waiter, start
from tests.disk import Disk

KIB = 1024
FOREVER = 3600 * 1_000_000


@dataclass
class Bench:
    """A faulty disk `d0` of 64 KiB, node name `n0`."""

    disk: Disk
    rules: FaultRules
    backend: FaultyBackend

    def do(self, operation: Operation, lba: int = 0, blocks: int = 1) -> int:
        return self.begin(operation, lba, blocks).wait()

    def begin(self, operation: Operation, lba: int = 0, blocks: int = 1) -> Waiter:
        length = 0 if operation is Operation.FLUSH else blocks * 512
        has_data = operation in {Operation.READ, Operation.WRITE}
        buffers = [memoryview(bytearray(length))] if has_data else []
        return start(self.backend, operation, lba * 512 if length else 0, length, buffers)


@pytest.fixture
def bench() -> Iterator[Bench]:
    disk, rules = Disk(64 * KIB), FaultRules()
    backend = FaultyBackend(disk, rules, ["d0", "n0"])
    yield Bench(disk, rules, backend)
    backend.close()


def test_without_rules_the_very_request_is_passed_on_and_no_thread_is_there(bench: Bench) -> None:
    threads = threading.active_count()
    request = Request(Operation.FLUSH, Waiter())
    bench.backend.submit(request)
    assert bench.disk.requests == [request]
    assert threading.active_count() == threads


def test_all_that_is_asked_of_the_image_is_answered_by_it(bench: Bench) -> None:
    backend, disk = bench.backend, bench.disk
    assert (backend.size, backend.read_only, backend.supports_discard) == (64 * KIB, False, True)
    assert (backend.request_alignment, backend.image) == (1, disk)
    disk.actual_size, disk.read_only = 32 * KIB, True
    assert (backend.refresh_size(), backend.size, backend.read_only) == (32 * KIB, 32 * KIB, True)


@given(
    rule=st.builds(
        FaultRule,
        operation=st.sampled_from([None, *Operation]),
        lbas=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda two: (min(two), max(two))),
        drive=st.sampled_from(["", "d0", "n0", "d1"]),
        errno=st.just(errno.EIO),
        count=st.none() | st.integers(1, 3),
    ),
    requests=st.lists(st.tuples(st.sampled_from(Operation), st.integers(0, 22), st.integers(1, 4)), max_size=12),
)
def test_a_request_fails_exactly_when_the_rule_fits_and_is_not_used_up(
    rule: FaultRule, requests: list[tuple[Operation, int, int]]
) -> None:
    disk, rules = Disk(64 * KIB), FaultRules()
    bench = Bench(disk, rules, FaultyBackend(disk, rules, ["d0", "n0"]))
    id = rules.add(rule)
    left = len(requests) if rule.count is None else rule.count
    for operation, lba, blocks in requests:
        touched = set() if operation is Operation.FLUSH else set(range(lba, lba + blocks))
        wanted = set(range(100)) if rule.lbas is None else set(range(rule.lbas[0], rule.lbas[1] + 1))
        fits = (
            rule.operation in {None, operation}
            and rule.drive in {"", "d0", "n0"}
            and (rule.lbas is None or bool(touched & wanted))
            and left > 0
        )
        left -= fits
        before = len(disk.requests)
        assert bench.do(operation, lba, blocks) == (errno.EIO if fits else 0)
        assert len(disk.requests) - before == (not fits), "what fails is not tried"
    assert rules.remove(id)
    assert all(bench.do(*request) == 0 for request in requests), "without the rule all is well"


def test_blocks_are_those_of_the_namespace(bench: Bench) -> None:
    bench.rules.add(FaultRule(lbas=(2, 2), errno=errno.EIO))
    bench.backend.block_size = lambda: 4096
    assert [bench.do(Operation.READ, lba) for lba in (15, 16, 23, 24)] == [0, errno.EIO, errno.EIO, 0]


def test_the_rule_that_was_added_first_is_used_and_then_the_next(bench: Bench) -> None:
    bench.rules.add(FaultRule(errno=errno.ENOSPC, count=1))
    bench.rules.add(FaultRule(errno=errno.EIO))
    assert [bench.do(Operation.WRITE) for _ in range(3)] == [errno.ENOSPC, errno.EIO, errno.EIO]
    assert [(fault.id, fault.hits) for fault in bench.rules.list()] == [(1, 1), (2, 2)]


def test_a_rule_that_is_used_up_is_listed_and_costs_nothing(bench: Bench) -> None:
    bench.rules.add(FaultRule(errno=errno.EIO, count=1))
    assert bench.do(Operation.READ) == errno.EIO
    assert not bench.rules.any
    assert [fault.exhausted for fault in bench.rules.list()] == [True]


def test_only_rules_that_are_there_can_be_removed(bench: Bench) -> None:
    id = bench.rules.add(FaultRule(errno=errno.EIO))
    assert [bench.rules.remove(id), bench.rules.remove(id)] == [True, False]
    assert bench.rules.add(FaultRule(errno=errno.EIO)) != id, "ids are not used again"


def test_counts_are_exact_under_threads(bench: Bench) -> None:
    bench.rules.add(FaultRule(operation=Operation.WRITE, errno=errno.EIO, count=100))
    bench.rules.add(FaultRule(operation=Operation.WRITE, errno=errno.ENOSPC, count=50))
    together = threading.Barrier(4)
    answers: list[list[int]] = [[], [], [], []]

    def write(mine: list[int]) -> None:
        together.wait()
        mine += [bench.do(Operation.WRITE) for _ in range(100)]

    threads = [threading.Thread(target=write, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    every = [answer for mine in answers for answer in mine]
    assert [every.count(number) for number in (errno.EIO, errno.ENOSPC, 0)] == [100, 50, 250]


def test_a_delayed_request_comes_later_and_holds_up_no_other(bench: Bench) -> None:
    bench.rules.add(FaultRule(lbas=(1, 1), delay=FOREVER))
    short = bench.rules.add(FaultRule(lbas=(2, 2), delay=1000))
    late, soon = bench.begin(Operation.WRITE, 1), bench.begin(Operation.WRITE, 2)
    assert bench.do(Operation.WRITE, 3) == 0
    assert soon.wait() == 0
    assert late.calls == []
    assert [request.offset for request in bench.disk.requests] == [3 * 512, 2 * 512], "delayed is not begun yet"
    assert bench.rules.remove(short)


def test_a_delay_without_a_thread_is_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bench.rules.add(FaultRule(delay=FOREVER))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert bench.begin(Operation.WRITE, 1).calls == [0]
    assert bench.begin(Operation.WRITE, 1).calls == [], "there are threads again"


def test_what_is_delayed_goes_on_when_its_rule_is_removed(bench: Bench) -> None:
    one = bench.rules.add(FaultRule(lbas=(1, 1), delay=FOREVER, errno=errno.EIO))
    bench.rules.add(FaultRule(lbas=(2, 2), delay=FOREVER))
    first, second = bench.begin(Operation.READ, 1), bench.begin(Operation.READ, 2)
    bench.rules.remove(one)
    assert first.wait() == errno.EIO
    assert second.calls == []
    bench.backend.close()
    assert second.calls == [0], "closing waits for nothing"
    assert len(bench.disk.requests) == 1


def test_a_rule_that_is_removed_while_a_request_takes_it_holds_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = bench.rules.add(FaultRule(delay=FOREVER))
    add = Delays.add

    def removed_just_before(self: Delays, *arguments: Any) -> None:
        bench.rules.remove(id)
        add(self, *arguments)

    monkeypatch.setattr(Delays, "add", removed_just_before)
    assert bench.do(Operation.READ) == 0


def test_delayed_work_runs_in_the_order_of_its_times_and_a_failure_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    delays, order, end = Delays("test"), list[str](), threading.Event()

    def fail() -> None:
        raise ValueError("fault")

    delays.add(0.02, 1, lambda: order.append("later"))
    delays.add(0.01, 1, lambda: order.append("sooner"))
    delays.add(0.01, 1, fail)
    delays.add(0.03, 1, end.set)
    assert end.wait(20)
    assert order == ["sooner", "later"]
    assert "delayed request" in caplog.text
    delays.close()
    delays.add(3600, 1, lambda: order.append("now"))
    assert order[-1] == "now"
    assert not any(thread.name == "test" for thread in threading.enumerate())
