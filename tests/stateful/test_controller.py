"""The controller against a model of what a host may expect, with save → new controller → load between any two steps.

The model: every command completes exactly once, in its own queue's completion queue, with the status that was foreseen;
data that was written is what is read; the pin, or a message, tells of every completion that was not consumed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.spec import CSTS_RDY, DOORBELLS, Admin, EventType, Log, Nvm, Register, Status
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CC, CONFIG, Completion, Host, Ring

QUEUES = st.integers(1, 4)
CQS = st.integers(1, 3)
BLOCKS = st.integers(0, 7)
ANY = -1
"""A status that is not foreseen: a command that an abort may have hit."""


@dataclass
class Expected:
    """A command that has not completed."""

    statuses: set[int]
    ring: Ring
    """Its queue, which may be deleted and created again meanwhile."""
    may_vanish: bool = False
    """Its queue was deleted."""
    reads: tuple[int, int] | None = None
    """Block and address of a read."""


@dataclass
class Model:
    """What the host knows."""

    commands: dict[tuple[int, int], Expected] = field(default_factory=dict)
    free: dict[int, int] = field(default_factory=dict)
    """Entries that each submission queue still has."""
    events: int = 0
    aers: list[int] = field(default_factory=list)
    cq_of: dict[int, int] = field(default_factory=dict)


class Machine(RuleBasedStateMachine):
    """One host and its controller; `move` puts a new controller in place at any time."""

    host_class = Host

    @initialize(
        msix=st.booleans(),
        entries=st.integers(8, 12),
        mqes=st.sampled_from([7, 2047]),
        sizes=st.lists(st.integers(2, 6), min_size=5, max_size=5),
    )
    def start(self, msix: bool, entries: int, mqes: int, sizes: list[int]) -> None:
        config = ControllerConfig(serial="S1", namespaces=CONFIG.namespaces, mqes=mqes)
        self.disk = Disk(8 * 512)
        self.host = self.host_class(lines=Lines(msix), disk=self.disk, config=config)
        self.entries = entries
        self.enabled = False
        self.model = Model()
        self.written = 0
        self.contents: list[set[int]] = [{0} for _ in range(8)]
        """What was ever written to each block: queues are not ordered among each other."""
        self.enable()
        for cqid, size in enumerate(sizes[:2], 1):
            self.create_cq(cqid, size)
        for sqid, size in enumerate(sizes[2:], 1):
            self.create_sq(sqid, 1 + sqid % 2, size)

    # Registers.

    @precondition(lambda self: not self.enabled)
    @rule()
    def enable(self) -> None:
        self.host.enable(self.entries)
        assert self.host.csts == CSTS_RDY
        self.model = Model(free={0: self.entries - 1}, cq_of={0: 0})
        self.enabled = True

    @precondition(lambda self: self.enabled)
    @rule()
    def disable(self) -> None:
        self.disk.hold = False
        self.host.disable()
        if self.disk.held:
            assert self.host.csts == CSTS_RDY
        self.disk.finish()
        assert self.host.csts == 0
        self.enabled = False

    @rule()
    def function_reset(self) -> None:
        done: list[bool] = []
        self.host.controller.reset(lambda: done.append(True))
        assert bool(done) != bool(self.disk.held)
        self.disk.hold = False
        self.disk.finish()
        assert done == [True]
        assert (self.host.csts, self.host.get(Register.CC)) == (0, 0)
        self.enabled = False

    @rule(mask=st.integers(0, 1), register=st.sampled_from([Register.INTMS, Register.INTMC]))
    def mask(self, mask: int, register: Register) -> None:
        self.host.set(register, mask)

    # The admin queue: only commands that leave room for the next.

    def admin(self, opcode: int, **fields: int) -> Completion | None:
        """Run an admin command to its end; None when the ring is full or the command waits."""
        if not self.model.free[0]:
            return None
        cid = self.submit(0, {0x7FF}, opcode, **fields)
        found: Completion | None = None
        for _ in range(3):  # a full completion queue wants reaping first
            self.host.drain()
            found = self.take(0, cid) or found
        if found is None:
            self.model.commands[0, cid].statuses = {ANY}
        return found

    @precondition(lambda self: self.enabled)
    @rule(cqid=CQS, size=st.integers(2, 6))
    def create_cq(self, cqid: int, size: int) -> None:
        exists = cqid in self.host.cqs
        address = 0x2_0000 + 0x1_0000 * cqid
        if not exists:
            self.host.ram.data[address : address + 16 * size] = bytes(16 * size)
        vector = cqid if self.host.lines.msix_enabled else 0
        done = self.admin(Admin.CREATE_CQ, prp1=address, cdw10=size - 1 << 16 | cqid, cdw11=vector << 16 | 3)
        if done is not None:
            assert done.status == (Status.INVALID_QID if exists else 0)
            if not exists:
                self.host.new_cq(cqid, address, size)

    @precondition(lambda self: self.enabled)
    @rule(sqid=QUEUES, cqid=CQS, size=st.integers(2, 6))
    def create_sq(self, sqid: int, cqid: int, size: int) -> None:
        address = 0x8_0000 + 0x1_0000 * sqid
        done = self.admin(Admin.CREATE_SQ, prp1=address, cdw10=size - 1 << 16 | sqid, cdw11=cqid << 16 | 1)
        if done is None:
            return
        if cqid == 0:
            assert done.status == Status.INVALID_QID
        elif cqid not in self.host.cqs:
            assert done.status == Status.INVALID_CQ
        elif sqid in self.host.rings:
            assert done.status == Status.INVALID_QID
        else:
            assert done.status == 0
            self.host.new_sq(sqid, address, size, cqid)
            self.model.free[sqid] = size - 1
            self.model.cq_of[sqid] = cqid

    @precondition(lambda self: self.enabled)
    @rule(sqid=QUEUES)
    def delete_sq(self, sqid: int) -> None:
        self.disk.hold = False
        self.disk.finish()
        done = self.admin(Admin.DELETE_SQ, cdw10=sqid)
        if done is None:
            return
        assert done.status == (0 if sqid in self.host.rings else Status.INVALID_QID)
        if done.status == 0:
            del self.host.rings[sqid]
            for (owner, _), expected in self.model.commands.items():
                if owner == sqid:
                    expected.may_vanish = True

    @precondition(lambda self: self.enabled)
    @rule(cqid=CQS)
    def delete_cq(self, cqid: int) -> None:
        done = self.admin(Admin.DELETE_CQ, cdw10=cqid)
        if done is None:
            return
        used = any(self.model.cq_of[sqid] == cqid for sqid in self.host.rings)
        if cqid not in self.host.cqs:
            assert done.status == Status.INVALID_QID
        elif used:
            assert done.status == Status.INVALID_QUEUE_DELETION
        else:
            assert done.status == 0
            del self.host.cqs[cqid]

    @precondition(lambda self: self.enabled)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        waiting = [key for key in self.model.commands if key[0] in self.host.rings]
        if not waiting:
            return
        sqid, cid = data.draw(st.sampled_from(waiting))
        expected = self.model.commands[sqid, cid]
        before = set(expected.statuses)
        expected.statuses.add(Status.ABORT_REQUESTED)
        done = self.admin(Admin.ABORT, cdw10=cid << 16 | sqid)
        if done is not None:
            assert done.status == 0
            expected.statuses = before if done.result else {Status.ABORT_REQUESTED}

    @precondition(lambda self: self.enabled and self.model.free[0] > 2)
    @rule()
    def request_event(self) -> None:
        self.model.aers.append(self.submit(0, {0, Status.AER_LIMIT_EXCEEDED}, Admin.ASYNC_EVENT_REQUEST))

    @precondition(lambda self: self.enabled)
    @rule(info=st.integers(0, 1))
    def event(self, info: int) -> None:
        self.host.controller.raise_event(EventType.ERROR, info, Log.ERROR_INFORMATION)

    @precondition(lambda self: self.enabled)
    @rule()
    def read_error_log(self) -> None:
        done = self.admin(Admin.GET_LOG_PAGE, cdw10=15 << 16 | Log.ERROR_INFORMATION)
        assert done is None or done.status == 0

    # I/O queues.

    def submit(self, qid: int, statuses: set[int], opcode: int, **fields: int) -> int:
        self.model.free[qid] -= 1
        cid = self.host.submit(qid, opcode, **fields)
        self.model.commands[qid, cid] = Expected(statuses, self.host.rings[qid])
        return cid

    def queue(self, sqid: int) -> bool:
        return sqid in self.host.rings and self.model.free[sqid] > 0

    @precondition(lambda self: self.enabled)
    @rule(
        commands=st.lists(st.tuples(QUEUES, st.booleans(), BLOCKS), min_size=1, max_size=12),
        paused=st.booleans(),
        drained=st.booleans(),
    )
    def traffic(self, commands: list[tuple[int, bool, int]], paused: bool, drained: bool) -> None:
        """Submit as much as there is room for; with `paused`, between a pause and a move."""
        if paused:
            self.host.controller.pause(0)
        for sqid, is_write, block in commands:
            (self.write if is_write else self.read)(sqid, block)
        if paused:
            self.move()
        if drained:
            self.host.drain()

    def write(self, sqid: int, block: int) -> None:
        if self.queue(sqid):
            self.written += 1
            at = 0x20_0000 + 512 * self.written
            self.host.ram.data[at : at + 8] = struct.pack("<Q", self.written)
            self.contents[block].add(self.written)
            self.submit(sqid, {0}, Nvm.WRITE, nsid=1, cdw10=block, prp1=at)

    def read(self, sqid: int, block: int) -> None:
        if self.queue(sqid):
            at = 0x10_0000 + 512 * (self.host.cid % 512)
            cid = self.submit(sqid, {0}, Nvm.READ, nsid=1, cdw10=block, prp1=at)
            self.model.commands[sqid, cid].reads = block, at

    @precondition(lambda self: self.enabled)
    @rule(
        sqid=QUEUES,
        wrong=st.sampled_from(
            [
                (Status.INVALID_OPCODE, 0x7F, {"nsid": 1}),
                (Status.INVALID_NAMESPACE, Nvm.READ, {"nsid": 0}),
                (Status.LBA_OUT_OF_RANGE, Nvm.READ, {"nsid": 1, "cdw10": 8}),
                (Status.DATA_TRANSFER_ERROR, Nvm.READ, {"nsid": 1, "prp1": 1 << 40}),
                (Status.INVALID_PRP_OFFSET, Nvm.READ, {"nsid": 1, "prp1": 0x10_0001}),
            ]
        ),
    )
    def wrong(self, sqid: int, wrong: tuple[Status, int, dict[str, int]]) -> None:
        status, opcode, fields = wrong
        if self.queue(sqid):
            self.submit(sqid, {status}, opcode, **fields)

    @precondition(lambda self: self.enabled)
    @rule(offset=st.integers(0, 0x40), value=st.integers(6, 1 << 16))
    def doorbell_that_is_wrong(self, offset: int, value: int) -> None:
        qid = (offset // 4) // 2
        if qid > 0:
            self.host.set(DOORBELLS + offset, value + 16)

    @rule()
    def drain(self) -> None:
        self.host.drain()

    @rule()
    def hold(self) -> None:
        self.disk.hold = True

    @rule(count=st.integers(1, 3))
    def finish(self, count: int) -> None:
        self.disk.finish(count)

    @precondition(lambda self: self.enabled)
    @rule(cqids=st.sets(st.integers(0, 3), min_size=1), limit=st.integers(1, 4))
    def reap(self, cqids: set[int], limit: int) -> None:
        for cqid in cqids & set(self.host.cqs):
            self.take(cqid, limit=limit)

    def take(self, cqid: int, wanted: int | None = None, limit: int = 1 << 30) -> Completion | None:
        """Consume completions, each checked; return the one of admin command `wanted`."""
        found: Completion | None = None
        for completion in self.host.reap(cqid, limit):
            key = completion.sqid, completion.cid
            assert key in self.model.commands, "completed without a command, or twice"
            expected = self.model.commands.pop(key)
            assert expected.ring.cq.cqid == cqid
            if completion.cid == wanted and cqid == 0:
                found = completion
            elif ANY not in expected.statuses:
                assert completion.status in expected.statuses
            if expected.reads is not None and completion.status == 0:
                block, at = expected.reads
                assert struct.unpack_from("<Q", self.host.ram.data, at)[0] in self.contents[block]
            if self.host.rings.get(completion.sqid) is expected.ring:
                self.model.free[completion.sqid] += 1
        return found

    # Pause, save and load.

    @rule()
    def pause_and_resume(self) -> None:
        if not self.disk.held:
            assert self.host.controller.pause(0)
            self.host.drain()
            self.host.controller.resume()

    @rule()
    def move(self) -> None:
        self.disk.hold = False
        self.host.controller.pause(0)
        self.disk.finish()
        self.host.move()

    # What always holds.

    @invariant()
    def the_pin_says_whether_there_are_completions(self) -> None:
        controller, lines = self.host.controller, self.host.lines
        if not lines.msix_enabled:
            waiting = any(not cq.is_empty for cq in controller.cqs.values())
            assert lines.up() == (waiting and not self.host.get(Register.INTMS) & 1)

    @invariant()
    def permits_and_counts_agree(self) -> None:
        controller = self.host.controller
        queued = sum(sq.in_flight for sq in controller.sqs.values())
        assert controller.activity.count >= queued
        for cq in controller.cqs.values():
            assert 0 <= cq.used + cq.reserved < cq.size
            assert cq.reserved == sum(controller.sqs[sqid].in_flight for sqid in cq.sqs)

    def teardown(self) -> None:
        """Whatever happened: in the end every command completes, but event requests and those of deleted queues."""
        if not hasattr(self, "host") or not self.enabled:
            return
        self.disk.hold = False
        self.disk.finish()
        for _ in range(40):
            self.host.drain()
            for cqid in list(self.host.cqs):
                self.take(cqid)
        left = {key for key, expected in self.model.commands.items() if not expected.may_vanish}
        assert left <= {(0, cid) for cid in self.model.aers}
        assert self.host.get(Register.CC) == CC | 1


Machine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestController = Machine.TestCase
