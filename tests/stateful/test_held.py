"""Disks that fail, against a model of what a host may expect.

Whatever the sequence of failures, policies, resume, save → new controller → load, load of an older snapshot, abort,
queue deletion and reset: every command completes exactly once with a status it may have, or is dropped by a reset or
its queue's deletion; data that was acknowledged is on the disk; and a command is on its way, held, or over, never lost
between.
"""

from __future__ import annotations

import copy
import errno
import struct
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nvmove.block.backend import Operation
from nvmove.block.policy import Action, ErrorPolicy
from nvmove.nvme.spec import Admin, Nvm, Status
from nvmove.nvme.state.saved import ControllerState
from tests.failing import FailingDisk, PolicyHost
from tests.nvme_host import Completion, Entries, Ring

QUEUES = st.integers(1, 2)
FAILED = {Status.CAPACITY_EXCEEDED, Status.WRITE_FAULT, Status.UNRECOVERED_READ_ERROR}
PAGES = 0x12_0000
BLOCKS = 2048


@dataclass
class Expected:
    """A command that has not completed."""

    block: int
    """What it writes; 0: nothing that is looked at."""
    is_write: bool
    """Or anything else that werror decides about."""
    value: int = 0
    """What it writes there."""
    reported: bool = False
    """An error of it may have been reported."""
    ignored: bool = False
    """An error of it may have been ignored."""
    aborted: bool = False


@dataclass
class Snapshot:
    """Everything there was at one moment: controller, guest, disk, and what was expected."""

    state: ControllerState
    ram: bytes
    disk: bytes
    host: tuple[dict[int, Ring], dict[int, Entries]]
    commands: dict[tuple[int, int], Expected]
    acknowledged: dict[int, int]


class Machine(RuleBasedStateMachine):
    """One host, its disk, and controllers one after the other."""

    @initialize(entries=st.integers(3, 9))
    def start(self, entries: int) -> None:
        self.disk = FailingDisk(BLOCKS * 512)
        self.entries = entries
        self.host = PolicyHost(self.disk, entries=entries)
        self.host.create(2, sq_size=entries, cq_size=entries)
        self.commands: dict[tuple[int, int], Expected] = {}
        self.acknowledged: dict[int, int] = {}
        """What is on the disk for certain: block and value."""
        self.written = 0
        self.snapshot: Snapshot | None = None
        self.policies()

    # Commands. Every write has a block and a page of its own, so what a block must hold is known.

    def has_room(self, qid: int) -> bool:
        sq = self.host.controller.sqs[qid]
        return sq.waiting < sq.size - 1

    @rule(qids=st.lists(QUEUES, min_size=1, max_size=8))
    def write(self, qids: list[int]) -> None:
        for qid in qids:
            self.write_to(qid, self.written + 1)
        self.policies()

    @rule(qid=QUEUES, data=st.data())
    def overwrite(self, qid: int, data: st.DataObject) -> None:
        """A block that was written gets other data: whatever writes the old ones again is seen."""
        if self.acknowledged:
            self.write_to(qid, data.draw(st.sampled_from(sorted(self.acknowledged))))
        self.policies()

    def write_to(self, qid: int, block: int) -> None:
        if self.has_room(qid) and self.written < 1500:
            self.acknowledged.pop(block, None)  # it is one or the other until the write has completed
            self.written += 1
            at = PAGES + 0x1000 * self.written
            self.host.ram.data[at : at + 512] = struct.pack("<Q", self.written) * 64
            cid = self.host.submit(qid, Nvm.WRITE, nsid=1, cdw10=block, prp1=at)
            self.commands[qid, cid] = Expected(block, is_write=True, value=self.written)

    @rule(qid=QUEUES, ranges=st.integers(0, 5))
    def change_nothing(self, qid: int, ranges: int) -> None:
        """A flush, or a deallocate of many requests, of blocks that nobody looks at."""
        if self.has_room(qid) and self.written < 1500:
            self.written += 1
            at = PAGES + 0x1000 * self.written
            self.host.ram.data[at : at + 16 * ranges] = b"".join(
                struct.pack("<IIQ", 0, 1, 1600 + 2 * number) for number in range(ranges)
            )
            if ranges:
                cid = self.host.submit(qid, Nvm.DATASET_MANAGEMENT, nsid=1, cdw10=ranges - 1, cdw11=4, prp1=at)
            else:
                cid = self.host.submit(qid, Nvm.FLUSH, nsid=1)
            self.commands[qid, cid] = Expected(0, is_write=True)
        self.policies()

    @rule(qid=QUEUES)
    def read(self, qid: int) -> None:
        if self.has_room(qid):
            cid = self.host.submit(qid, Nvm.READ, nsid=1, cdw10=0)
            self.commands[qid, cid] = Expected(0, is_write=False)
        self.policies()

    @rule()
    def drain(self) -> None:
        self.host.drain()

    @rule()
    def hold(self) -> None:
        self.disk.hold = True

    @rule(count=st.integers(1, 3), newest=st.booleans())
    def finish(self, count: int, newest: bool) -> None:
        if newest:
            self.disk.held.reverse()
        self.disk.finish(count)

    # What fails, and what is done about it.

    @rule(number=st.sampled_from([errno.ENOSPC, errno.EIO]), every=st.integers(1, 4), writes=st.booleans())
    def fail(self, number: int, every: int, writes: bool) -> None:
        self.disk.errno = number
        self.disk.fails = lambda request: (
            (request.operation is Operation.WRITE or not writes) and len(self.disk.order) % every == 0
        )

    @rule()
    def heal(self) -> None:
        self.disk.heal()

    @rule(werror=st.sampled_from(ErrorPolicy), rerror=st.sampled_from(ErrorPolicy))
    def change(self, werror: ErrorPolicy, rerror: ErrorPolicy) -> None:
        self.host.errors.werror, self.host.errors.rerror = werror, rerror
        self.policies()

    @rule()
    def stop_again(self) -> None:
        self.change(ErrorPolicy.STOP, ErrorPolicy.STOP)

    def policies(self) -> None:
        """From now on errors of what is under way may be reported or ignored, as the policies say."""
        for expected in self.commands.values():
            for number in (errno.ENOSPC, errno.EIO):
                action = self.host.errors.decide(not expected.is_write, number)
                expected.reported |= action is Action.REPORT
                expected.ignored |= action is Action.IGNORE

    # The VM stops, runs, moves.

    @rule(drained=st.booleans())
    def cont(self, drained: bool) -> None:
        if not self.disk.held:
            assert self.host.controller.pause(0)
        self.host.controller.resume()
        if drained:
            self.host.drain()

    @rule(handed_over=st.booleans())
    def move(self, handed_over: bool) -> None:
        """What is in flight ends when the device is paused; with `handed_over`, refused as the other side's."""
        self.host.controller.pause(0)
        self.disk.hold = False
        fails, number = self.disk.fails, self.disk.errno
        if handed_over:
            self.disk.fail_all(errno.EPERM)
        self.disk.finish()
        self.disk.fails, self.disk.errno = fails, number
        tried = len(self.disk.operations)
        state = self.host.save()
        self.host.replace()
        self.host.controller.load(state)
        assert self.host.controller.save() == state
        self.host.drain()
        assert len(self.disk.operations) == tried
        self.host.controller.resume()

    @rule()
    def save(self) -> None:
        self.come_to_rest()
        host = self.host
        self.snapshot = Snapshot(
            host.save(),
            bytes(host.ram.data),
            bytes(self.disk.data),
            copy.deepcopy((host.rings, host.cqs)),
            copy.deepcopy(self.commands),
            dict(self.acknowledged),
        )
        host.controller.resume()

    @precondition(lambda self: self.snapshot is not None)
    @rule(in_place=st.booleans())
    def revert(self, in_place: bool) -> None:
        """What was done since has not happened; what was held then is held again."""
        assert self.snapshot is not None
        self.come_to_rest()
        snapshot, host = self.snapshot, self.host
        host.ram.data[:] = snapshot.ram
        self.disk.data[:] = snapshot.disk
        host.rings, host.cqs = copy.deepcopy(snapshot.host)
        self.commands = copy.deepcopy(snapshot.commands)
        self.acknowledged = dict(snapshot.acknowledged)
        if not in_place:
            host.replace()
        host.controller.load(snapshot.state)
        assert host.save() == snapshot.state
        self.policies()
        host.controller.resume()

    def come_to_rest(self) -> None:
        self.host.controller.pause(0)
        self.disk.hold = False
        self.disk.finish()

    # The guest's ways out.

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if not self.commands:
            return
        qid, cid = data.draw(st.sampled_from(sorted(self.commands)))
        # One whose turn to be tried again has come may complete before the Abort is fetched.
        is_held = any(held.cid == cid and not held.ready for held in self.host.controller.sqs[qid].held)
        done = self.host.admin(Admin.ABORT, cdw10=cid << 16 | qid)
        assert done.status == 0
        assert not (is_held and done.result)
        self.commands[qid, cid].aborted |= not done.result

    @rule(qid=QUEUES)
    def delete_and_create(self, qid: int) -> None:
        self.disk.hold = False
        self.disk.finish()
        assert self.host.delete_sq(qid).status == 0
        self.take(qid, also={Status.ABORTED_SQ_DELETION})
        self.commands = {key: expected for key, expected in self.commands.items() if key[0] != qid}
        self.host.create(qid, sq_size=self.entries)

    @precondition(lambda self: self.written < 1000)
    @rule(function=st.booleans())
    def reset(self, function: bool) -> None:
        self.take(1)
        self.take(2)
        if function:
            self.host.controller.reset(lambda: None)
        else:
            self.host.disable()
        self.disk.hold = False
        self.disk.finish()
        assert (self.host.csts, self.host.controller.held) == (0, 0)
        self.commands.clear()
        self.host.enable()
        for qid in (1, 2):
            self.host.create(qid, sq_size=self.entries, cq_size=self.entries)

    @rule(cqid=QUEUES, limit=st.integers(1, 4))
    def reap(self, cqid: int, limit: int) -> None:
        self.take(cqid, limit)

    def take(self, cqid: int, limit: int = 1 << 30, also: set[Status] | None = None) -> int:
        found = self.host.reap(cqid, limit)
        for completion in found:
            assert (completion.sqid, completion.cid) in self.commands, "completed without a command, or twice"
            self.check(self.commands.pop((completion.sqid, completion.cid)), completion, also or set())
        return len(found)

    def check(self, expected: Expected, completion: Completion, also: set[Status]) -> None:
        allowed: set[int] = {Status.SUCCESS, *also}
        if expected.reported:
            allowed |= FAILED if expected.is_write else {*FAILED, Status.INTERNAL_ERROR}  # a read that lacks room
        if expected.aborted:
            allowed.add(Status.ABORT_REQUESTED)
        assert completion.status in allowed
        if completion.status == 0 and expected.block and not expected.ignored:
            self.acknowledged[expected.block] = expected.value

    # What always holds.

    @invariant()
    def acknowledged_data_is_there(self) -> None:
        for block, value in self.acknowledged.items():
            assert struct.unpack_from("<Q", self.disk.data, 512 * block)[0] == value

    @invariant()
    def what_is_held_is_in_order_and_holds_nothing(self) -> None:
        controller = self.host.controller
        for sq in controller.sqs.values():
            orders = [held.order for held in sq.held]
            assert orders == sorted(set(orders))
            assert all(order < sq.fetched for order in orders)
            assert {(sq.sqid, held.cid) for held in sq.held} <= self.commands.keys()
        for cq in controller.cqs.values():
            assert cq.reserved == sum(controller.sqs[sqid].in_flight for sqid in cq.sqs)

    def teardown(self) -> None:
        """With a disk that works, the VM running and the host reaping, nothing is left."""
        if not hasattr(self, "commands"):
            return
        self.disk.hold = False
        self.disk.heal()
        self.disk.finish()
        assert self.host.controller.pause(0)
        self.host.controller.resume()
        for _ in range(1 + len(self.commands)):
            self.host.drain()
            for cqid in (1, 2):
                self.take(cqid)
        assert self.commands == {}
        assert self.host.controller.held == 0
        self.acknowledged_data_is_there()


Machine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHeld = Machine.TestCase
