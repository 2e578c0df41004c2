"""Queues that are lent while what they write must be known: noted, or marked dirty before a read completes."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.nvme_host import DATA, Completion, Host
from tests.precopy import CopiedRam

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.block.backend import Operation
from nvmove.engine.compiled import CompiledEngine
from nvmove.engine.inline import InlineEngine
from nvmove.nvme.seams import Engine
from nvmove.nvme.spec import Admin, Nvm, Register
from nvmove.vfio.dirty import PAGE, DirtyLog
from tests.rings import InlineRings, LentDisk, LentLines
from tests.waiting import wait

PAGES, SHADOWS = 0x200, 0x1E_0000
LONG = 20


class Rig(Host):
    """A host whose queues are lent while QEMU migrates."""

    ram: CopiedRam
    disk: LentDisk
    engine: InlineRings

    def __init__(self, alignment: int = 1, engine: Engine | None = None) -> None:
        disk = LentDisk(1 << 20, alignment)
        os.pwrite(disk.fd, b"".join(bytes([number]) * PAGE for number in range(256)), 0)
        super().__init__(ram=CopiedRam(PAGES), lines=LentLines(), disk=disk, engine=engine or InlineRings())
        self.client = self.ram.client
        self.enable()
        self.create(1, None, 64, 64)
        self.drain()
        with self.controller.leases.suspended():
            self.ram.memory.dirty.start_marking()
        self.drain()
        if engine is None:
            self.engine.runs.clear()

    def drain(self) -> None:
        if isinstance(self.engine, InlineEngine):
            super().drain()

    def admin(self, opcode: int, **fields: int) -> Completion:
        self.submit(0, opcode, **fields)
        self.drain()
        wait(lambda: self.peek(0) is not None)
        return self.reap(0)[0]

    def read_page(self, number: int) -> int:
        """Ring for a read of one page of the disk into one of memory; return the command's id."""
        return self.submit(1, Nvm.READ, nsid=1, prp1=DATA + PAGE * number, cdw10=8 * number, cdw12=7)


@pytest.mark.parametrize("alignment", [1, 512])
def test_reads_go_on_while_others_are_being_marked(alignment: int) -> None:
    rig = Rig(alignment)
    rig.client.holds = True
    cids = [rig.read_page(number) for number in range(40)]
    rig.drain()
    assert rig.reap(1) == []
    found = []
    while rig.client.waiting:
        rig.client.answer()
        rig.drain()
        for completion in rig.reap(1):
            number = cids.index(completion.cid)
            at = DATA + PAGE * number
            assert rig.ram.data[at : at + PAGE] == bytes([number]) * PAGE
            assert at // PAGE in rig.client.dirty
            found.append(completion.cid)
    assert sorted(found) == sorted(cids)
    assert rig.engine.runs == []


def test_a_write_completes_while_reads_wait_for_their_marks() -> None:
    rig = Rig()
    rig.client.holds = True
    read = rig.read_page(1)
    write = rig.submit(1, Nvm.WRITE, nsid=1, prp1=DATA + 8 * PAGE, cdw10=100)
    rig.drain()
    assert [completion.cid for completion in rig.reap(1)] == [write]
    rig.client.answer()
    rig.drain()
    assert [completion.cid for completion in rig.reap(1)] == [read]
    assert rig.engine.runs == []


def test_what_was_read_is_marked_page_by_page_and_nothing_beside_it() -> None:
    rig = Rig()
    rig.client.copy_all()
    rig.client.holds = True
    rig.submit(1, Nvm.READ, nsid=1, prp1=DATA + 512, prp2=DATA + 5 * PAGE, cdw12=7)
    rig.drain()
    ((runs, _),) = rig.client.waiting
    assert [(address, len(data)) for address, data in runs] == [(DATA + 512, 1), (DATA + 5 * PAGE, 1)]
    rig.client.answer()
    rig.drain()
    assert {DATA // PAGE, DATA // PAGE + 5} <= rig.client.dirty
    assert len(rig.reap(1)) == 1


def test_what_is_refused_and_what_has_no_completion_wait_for_the_switch_over() -> None:
    rig = Rig()
    rig.client.refuses = True
    rig.read_page(3)
    rig.drain()
    assert len(rig.reap(1)) == 1
    rig.drain()
    assert rig.controller.pause(0)
    rig.client.refuses = False
    rig.client.copy_all()
    assert rig.ram.memory.mark_dirty().pages == 2
    assert rig.client.dirty == {DATA // PAGE + 3, rig.cqs[1].address // PAGE}


def test_completions_are_noted_on_every_page_of_their_queue() -> None:
    rig = Rig()
    rig.create(2, None, 512, 512)
    rig.drain()
    for _ in range(300):
        assert rig.command(2, Nvm.WRITE, nsid=1, prp1=DATA).status == 0
    rig.client.copy_all()
    assert rig.controller.pause(0)
    rig.ram.memory.mark_dirty()
    first = rig.cqs[2].address // PAGE
    assert {first, first + 1} <= rig.client.dirty


def test_reads_that_are_very_scattered_are_pythons() -> None:
    rig = Rig()
    entries = [DATA + 2 * PAGE * number for number in range(1, 50)]
    rig.ram.data[DATA - PAGE : DATA - PAGE + 8 * 49] = struct.pack("<49Q", *entries)
    rig.submit(1, Nvm.READ, nsid=1, prp1=DATA, prp2=DATA - PAGE, cdw12=8 * 50 - 1)
    rig.drain()
    assert [completion.status for completion in rig.reap(1)] == [0]
    assert rig.disk.operations == [Operation.READ]
    assert {entry // PAGE for entry in entries} <= rig.client.dirty


def test_a_log_has_data_and_completions_once() -> None:
    rig = Rig()
    log = DirtyLog()
    with rig.controller.leases.suspended():
        rig.ram.memory.dirty.stop_marking()
        rig.ram.memory.dirty.start_log(log)
    rig.drain()
    rig.submit(1, Nvm.READ, nsid=1, prp1=DATA + 512, prp2=DATA + 5 * PAGE, cdw12=7)
    rig.drain()
    assert rig.engine.lent == {1}
    assert len(rig.reap(1)) == 1
    bitmap = int.from_bytes(log.report(0, PAGES * PAGE, PAGE), "little")
    pages = {page for page in range(PAGES) if bitmap >> page & 1}
    assert pages == {DATA // PAGE, DATA // PAGE + 5, rig.cqs[1].address // PAGE}
    assert not any(log.report(0, PAGES * PAGE, PAGE))
    assert rig.client.waiting == []


def test_while_both_are_wanted_nothing_is_lent() -> None:
    rig = Rig()
    with rig.controller.leases.suspended():
        rig.ram.memory.dirty.start_log(DirtyLog())
    rig.read_page(0)
    rig.drain()
    assert 1 in rig.engine.runs
    assert DATA // PAGE in rig.client.dirty


@contextlib.contextmanager
def holding() -> Iterator[Rig]:
    """A host of an engine with its thread, and of a client that holds what it need not answer at once."""
    engine = CompiledEngine(spin_us=0)
    rig = Rig(engine=engine)
    try:
        rig.client.holds = True
        yield rig
    finally:
        rig.client.answer()
        engine.close()


def unmap(rig: Rig) -> None:
    """Unmap memory that nothing uses; that ends."""
    unmapped = threading.Event()
    rig.ram.memory.unmap(0x1F_0000, 0x1000, lambda _errno: unmapped.set())
    assert unmapped.wait(LONG)


def test_an_unmap_does_not_wait_for_marks_and_the_guest_is_told_after_them() -> None:
    """A client in an unmap answers when that is done: a lease that waited for the answer would be for ever."""
    with holding() as rig:
        rig.read_page(2)
        wait(lambda: bool(rig.client.waiting))
        unmap(rig)
        assert rig.peek(1) is None
        assert not rig.controller.pause(0), "a command that is being marked is in flight"
        rig.client.answer()
        wait(lambda: rig.peek(1) is not None)
        assert rig.controller.pause(LONG)
        assert [completion.status for completion in rig.reap(1)] == [0]


def test_a_disable_waits_for_marks_that_are_under_way() -> None:
    """The guest has its memory again after it, and a message that came then would undo what it stores."""
    with holding() as rig:
        rig.read_page(2)
        wait(lambda: bool(rig.client.waiting))
        rig.set(Register.CC, rig.get(Register.CC) & ~1)
        wait(lambda: rig.controller.leases.bar(timeout=0))
        assert rig.csts & 1
        rig.client.answer()
        wait(lambda: not rig.csts & 1)
        rig.controller.leases.unbar()


def test_reads_nobody_has_begun_to_mark_are_noted_when_the_queue_is_wanted_back() -> None:
    with holding() as rig:
        cids = [rig.read_page(number) for number in range(40)]
        wait(lambda: bool(rig.client.waiting) and rig.controller.inspect()["live"]["in_flight"][1] == 40)
        unmap(rig)
        ((runs, _),) = rig.client.waiting
        marking = {address // PAGE - DATA // PAGE for address, _ in runs}
        early = rig.reap(1)
        assert sorted(cids.index(completion.cid) for completion in early) == sorted(set(range(40)) - marking)
        rig.client.copy_all()
        rig.client.answer()
        assert rig.controller.pause(LONG)
        rig.ram.memory.mark_dirty()
        assert {DATA // PAGE + number for number in range(40)} <= rig.client.dirty
        assert len(early) + len(rig.reap(1)) == 40


def test_the_event_indexes_are_noted() -> None:
    rig = Rig()
    assert rig.admin(Admin.DOORBELL_BUFFER_CONFIG, prp1=SHADOWS, prp2=SHADOWS + PAGE).status == 0
    rig.drain()
    rig.ram.memory.dirty.collect()
    rig.ram.memory.dirty.recorded.take()
    rig.engine.runs.clear()
    rig.read_page(0)
    rig.drain()
    assert rig.engine.runs == []
    rig.ram.memory.dirty.collect()
    assert rig.ram.memory.dirty.recorded.take() == [rig.cqs[1].address // PAGE, SHADOWS // PAGE + 1]
