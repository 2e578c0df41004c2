"""When the compiled loop interrupts a host that uses shadow doorbells: seldom, and never too seldom."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator

import pytest

from tests.nvme_host import Completion
from tests.nvme_shadow import ShadowHost
from tests.waiting import wait

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.engine.compiled import CompiledEngine
from nvmove.nvme.spec import Nvm
from tests.rings import LentDisk, LentLines, LentRam, Rig

DEEP = 64


class ShadowRig(ShadowHost, Rig):
    """Queue 2 has 64 entries, shadow doorbells, and is lent."""

    def __init__(self) -> None:
        Rig.__init__(self, LentDisk())
        self.create(2, sq_size=DEEP, cq_size=DEEP, vector=2)
        assert self.configure() == 0
        assert self.command(2, Nvm.READ, nsid=1).status == 0
        self.lines.look()

    def interrupts(self) -> int:
        """How many there were for queue 2 since this was asked last."""
        [fd] = [line.fd for line in self.lines.lent if line.vector == 2]
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def put_reads(self, count: int) -> None:
        for _ in range(count):
            self.submit(2, Nvm.READ, nsid=1)


def test_a_host_that_has_yet_to_look_is_interrupted_once_more_at_most() -> None:
    """48 commands are three batches: the first is told, the others when the loop is about to sleep."""
    rig = ShadowRig()
    found = set()
    for _ in range(50):  # where the machine takes its time, 100 µs are over: then it is told between
        rig.put_reads(48)
        rig.drain()
        found.add(rig.interrupts())
        assert len(rig.reap(2)) == 48
    assert min(found) == 2
    assert not rig.in_python


def test_a_host_that_has_looked_is_told_at_once() -> None:
    rig = ShadowRig()
    for _ in range(5):
        rig.put_reads(1)
        rig.drain()
        assert rig.interrupts() == 1
        assert len(rig.reap(2)) == 1


def test_what_was_put_off_is_told_when_the_queue_is_taken_back() -> None:
    rig = ShadowRig()
    rig.put_reads(20)
    rig.drain()
    assert rig.interrupts() >= 1
    rig.put_reads(20)  # the host has not looked
    rig.drain()
    assert rig.interrupts() >= 1
    rig.controller.pause(0)
    assert len(rig.reap(2, doorbell=False)) == 40


class Threaded(ShadowHost):
    """A host of a device with its threads, that looks at its completion queue only when it is interrupted."""

    lines: LentLines

    def __init__(self, spin_us: int) -> None:
        self.threads = CompiledEngine(spin_us=spin_us)
        super().__init__(ram=LentRam(), lines=LentLines(), disk=LentDisk(), engine=self.threads)
        self.enable()
        self.create(1, sq_size=DEEP, cq_size=DEEP, vector=1)
        assert self.configure() == 0

    def store(self, index: int, value: int) -> None:
        """As a processor does: `struct.pack_into` writes zeroes first, which the loop would see."""
        memoryview(self.ram.data).cast("I")[self.buffers[0] // 4 + index] = value

    def command(self, qid: int, opcode: int, **fields: int) -> Completion:
        self.submit(qid, opcode, **fields)
        wait(lambda: self.peek(self.rings[qid].cq.cqid) is not None)
        [completion] = self.reap(self.rings[qid].cq.cqid)
        return completion


@pytest.fixture(params=[0, 100, 20_000], ids=lambda spin: f"{spin} µs")
def host(request: pytest.FixtureRequest) -> Iterator[Threaded]:
    host = Threaded(request.param)
    yield host
    host.threads.close()


def test_no_completion_is_left_untold(host: Threaded) -> None:
    """Whenever the host has looked: just before, while or after something is posted."""
    chance = random.Random(5)
    while not host.lines.lent:
        assert host.command(1, Nvm.READ, nsid=1).status == 0
    [line] = host.lines.lent
    out = done = 0
    while done < 3000:
        for _ in range(chance.randrange(DEEP - out)):
            host.submit(1, Nvm.READ, nsid=1)
            out += 1
        for _ in range(chance.choice([0, 0, 1, 3])):
            if out == 0:
                break
            ready, _, _ = select.select([line.fd], [], [], 30)
            assert ready, f"{out} commands were not told of"
            os.eventfd_read(line.fd)
            found = len(host.reap(1, limit=chance.choice([1, 5, 1 << 30])))
            out -= found
            done += found
            while found and (more := len(host.reap(1))):  # a driver looks until there is nothing
                out -= more
                done += more
    assert host.controller.inspect()["live"]["lent"] == [1]
