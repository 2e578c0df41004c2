"""The engines: one thread a queue, no kick lost, no wait in detach."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import pytest

from nvmove.engine import plain
from nvmove.engine.inline import InlineEngine
from nvmove.engine.plain import PlainEngine
from nvmove.nvme.spec import CSTS_CFS, CSTS_RDY, Nvm, Register, Status
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CC, Host

LONG = 20
"""Seconds that a test waits for what must come."""


@pytest.fixture
def engine() -> Iterator[PlainEngine]:
    engine = PlainEngine()
    yield engine
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nvme-sq")]


def test_a_kick_runs_the_queue_off_the_callers_thread(engine: PlainEngine) -> None:
    ran: list[tuple[int, int]] = []
    done = threading.Event()

    def run(sqid: int) -> None:
        ran.append((sqid, threading.get_ident()))
        done.set()

    engine.bind(run)
    engine.attach(3)
    engine.kick(9)
    engine.kick(3)
    assert done.wait(LONG)
    assert [sqid for sqid, _ in ran] == [3]
    assert ran[0][1] != threading.get_ident()


def test_a_kick_during_a_run_is_not_lost(engine: PlainEngine) -> None:
    twice = threading.Semaphore(0)
    first = True

    def run(sqid: int) -> None:
        nonlocal first
        if first:
            first = False
            engine.kick(sqid)
        twice.release()

    engine.bind(run)
    engine.attach(1)
    engine.kick(1)
    assert twice.acquire(timeout=LONG)
    assert twice.acquire(timeout=LONG)


def test_detach_never_waits_and_a_new_queue_of_the_same_id_waits_for_the_old_one(engine: PlainEngine) -> None:
    started, may_end, second = threading.Event(), threading.Event(), threading.Event()
    running: list[int] = []
    most: list[int] = []

    def run(sqid: int) -> None:
        running.append(sqid)
        most.append(len(running))
        if not started.is_set():
            started.set()
            assert may_end.wait(LONG)
        else:
            second.set()
        running.pop()

    engine.bind(run)
    engine.attach(1)
    engine.kick(1)
    assert started.wait(LONG)
    engine.detach(1)
    engine.detach(1)
    engine.attach(1)
    engine.kick(1)
    may_end.set()
    assert second.wait(LONG)
    assert max(most) == 1


def test_a_run_that_fails_does_not_end_the_worker(engine: PlainEngine, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    done = threading.Event()

    def run(sqid: int) -> None:
        calls.append(sqid)
        if len(calls) == 1:
            engine.kick(sqid)
            raise RuntimeError("broken")
        done.set()

    engine.bind(run)
    engine.attach(1)
    engine.kick(1)
    assert done.wait(LONG)
    assert "broken" in caplog.text


def test_attach_needs_bind(engine: PlainEngine) -> None:
    with pytest.raises(RuntimeError, match="bind"):
        engine.attach(1)


def test_the_inline_engine_runs_when_told_to() -> None:
    engine, ran = InlineEngine(), list[int]()
    engine.bind(ran.append)
    engine.attach(1)
    engine.attach(2)
    for sqid in (2, 1, 2, 3):
        engine.kick(sqid)
    engine.detach(1)
    engine.drain()
    assert ran == [2]


def test_a_controller_on_threads_completes_everything(engine: PlainEngine) -> None:
    """Four queues on one completion queue, with a disk that finishes on yet another thread."""
    disk = Disk(hold=True)
    lines = Lines()
    posted = threading.Semaphore(0)
    lines.signal = lambda vector: posted.release()  # type: ignore[method-assign]
    host = Host(engine=engine, disk=disk, lines=lines)
    host.drain = lambda: posted.acquire(timeout=LONG) and None  # type: ignore[method-assign,assignment]
    host.enable()
    host.create(1, sq_size=16, cq_size=8)
    for sqid in (2, 3, 4):
        host.create(sqid, cqid=1, sq_size=16)
    stop = threading.Event()

    def finish() -> None:
        while not stop.is_set():
            disk.finish(1)
            stop.wait(0.001)

    finisher = threading.Thread(target=finish)
    finisher.start()
    try:
        expected = {(sqid, host.submit(sqid, Nvm.READ, nsid=1)) for _ in range(12) for sqid in (1, 2, 3, 4)}
        found = set[tuple[int, int]]()
        while len(found) < len(expected):
            assert posted.acquire(timeout=LONG)
            found.update((c.sqid, c.cid) for c in host.reap(1))
        assert found == expected
        assert host.controller.pause(LONG)
    finally:
        stop.set()
        finisher.join()


def test_a_thread_that_cannot_start_leaves_nothing_and_the_next_one_does(
    engine: PlainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = threading.Event()
    engine.bind(lambda _sqid: ran.set())

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(OSError, match="can't start new thread"):
            engine.attach(1)
    engine.attach(1)
    engine.kick(1)
    assert ran.wait(LONG)


def test_a_worker_at_a_disk_that_hangs_does_not_keep_an_engine_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CLOSE_SECONDS", 0.05)
    engine, hangs, answers = PlainEngine(), threading.Event(), threading.Event()

    def run(_sqid: int) -> None:
        hangs.set()
        answers.wait(LONG)

    engine.bind(run)
    engine.attach(1)
    engine.kick(1)
    assert hangs.wait(LONG)
    engine.close()
    answers.set()


@pytest.mark.parametrize("queue", ["I/O", "admin"])
def test_a_queue_without_a_thread_is_an_error_that_can_be_tried_again(queue: str) -> None:
    host = Host(engine=InlineEngine())
    attach = host.engine.attach

    def refuse(_sqid: int) -> None:
        raise OSError(errno.EAGAIN, "can't start new thread")

    if queue == "I/O":
        host.enable()
    host.engine.attach = refuse  # type: ignore[method-assign, assignment]
    if queue == "admin":
        host.set(Register.CC, CC | 1)
        assert host.csts & CSTS_CFS
        host.set(Register.CC, 0)
    else:
        assert host.create_cq(1).status == 0
        failed = host.create_sq(1, 1)
        assert (failed.status, failed.dnr) == (Status.INTERNAL_ERROR, False)
    host.engine.attach = attach  # type: ignore[method-assign]
    if queue == "admin":
        host.enable()
    else:
        assert host.create_sq(1, 1).status == 0
    assert host.csts & CSTS_RDY
