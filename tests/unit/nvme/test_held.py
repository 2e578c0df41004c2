"""Commands that failed under werror=stop or rerror=stop: held, tried again, aborted, deleted, reset, saved."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from nvmove.block.backend import Operation
from nvmove.block.policy import Action, DriveErrors, ErrorPolicy, ErrorReport
from nvmove.engine.plain import PlainEngine
from nvmove.nvme.errors import StateError
from nvmove.nvme.seams import Segment
from nvmove.nvme.spec import CSTS_SHST_COMPLETE, Admin, Feature, Nvm, Register, Status
from nvmove.nvme.state.saved import HeldState
from tests.failing import FailingDisk, PolicyHost
from tests.nvme_host import DATA, Completion, Host
from tests.ram import Mapped

STOPPED_WRITE = ErrorReport("d0", is_read=False, action=Action.STOP, errno=errno.ENOSPC)
ABORT_FOUND, ABORT_NOT_FOUND = 0, 1


def write(host: Host, lba: int, qid: int = 1, fill: bytes = b"x") -> int:
    """Submit a write of one block from a page of its own; return the command id."""
    address = DATA + 0x1000 * lba
    host.ram.data[address : address + 512] = fill * 512
    return host.submit(qid, Nvm.WRITE, nsid=1, prp1=address, cdw10=lba)


def full(**arguments: object) -> PolicyHost:
    """A host whose disk is full."""
    host = PolicyHost(**arguments)  # type: ignore[arg-type]
    host.failing.fail_all()
    return host


def all_cids(host: PolicyHost, cqid: int = 1) -> list[int]:
    return [completion.cid for completion in host.done(cqid)]


# --- held, and tried again -------------------------------------------------------------------------------------------


def test_a_failed_write_is_held_and_the_guest_is_told_nothing() -> None:
    host = full()
    write(host, 3)
    assert host.done() == []
    assert (host.reports, host.controller.held) == ([STOPPED_WRITE], 1)


def test_a_held_command_completes_when_the_disk_has_room_and_the_vm_runs() -> None:
    host = full()
    cid = write(host, 3)
    host.drain()
    host.failing.heal()
    assert host.done() == []  # nothing is tried before the VM runs again
    host.try_again()
    (completion,) = host.done()
    assert (completion.cid, completion.status, host.controller.held) == (cid, Status.SUCCESS, 0)
    assert host.failing.data[3 * 512 : 4 * 512] == b"x" * 512


def test_a_retry_that_fails_is_held_again_and_reported_again() -> None:
    host = full()
    write(host, 3)
    host.drain()
    for tries in range(2, 5):
        host.try_again()
        assert (len(host.reports), host.controller.held, host.done()) == (tries, 1, [])
    host.failing.heal()
    host.try_again()
    assert len(host.done()) == 1


def test_held_commands_are_tried_again_in_the_order_of_submission_before_new_ones() -> None:
    host = full(entries=64)
    host.failing.hold = True
    cids = [write(host, lba) for lba in range(32)]
    host.drain()
    host.failing.held.reverse()  # they fail in another order than they came
    host.failing.finish()
    assert (host.controller.held, len(host.reports)) == (32, 32)
    assert host.controller.pause(0)
    cids.append(write(host, 40))
    host.failing.heal()
    host.failing.hold = False
    host.failing.order.clear()
    host.controller.resume()
    assert all_cids(host) == cids
    assert host.failing.order == [("write", lba) for lba in (*range(32), 40)]


def test_one_that_fails_again_keeps_its_place() -> None:
    host = full()
    for lba in range(4):
        write(host, lba)
    host.drain()
    host.failing.fails = lambda request: request.offset == 512
    host.try_again()
    assert len(host.done()) == 3
    host.failing.fail_all()
    write(host, 7)
    host.drain()
    host.failing.heal()
    host.failing.order.clear()
    host.try_again()
    assert host.failing.order == [("write", 1), ("write", 7)]


def test_others_go_on_while_the_stop_is_under_way_and_those_that_fail_are_held_too() -> None:
    host = full()
    host.failing.fails = lambda request: request.operation is Operation.WRITE
    write(host, 1)
    read = host.submit(1, Nvm.READ, nsid=1, cdw10=5)
    write(host, 2)
    assert all_cids(host) == [read]
    assert (host.controller.held, host.reports) == (2, [STOPPED_WRITE] * 2)


def test_the_data_of_a_retry_is_read_from_guest_memory_again() -> None:
    host = full()
    write(host, 2, fill=b"a")
    host.drain()
    address = DATA + 0x1000 * 2
    host.ram.data[address : address + 512] = b"b" * 512
    host.failing.heal()
    host.try_again()
    assert host.failing.data[2 * 512 : 3 * 512] == b"b" * 512


def test_a_full_completion_queue_makes_retries_wait_and_loses_none() -> None:
    host = full(entries=4)  # three completions
    cids = []
    for lba in range(6):  # what is held frees its entries in both queues
        cids.append(write(host, lba))
        host.drain()
    assert host.controller.held == 6
    host.failing.heal()
    host.try_again()
    assert host.controller.held == 3
    cids.append(write(host, 9))
    host.drain()
    assert all_cids(host) + all_cids(host) + all_cids(host) == cids


def test_a_held_command_gives_its_completion_slot_to_who_waits_for_it() -> None:
    host = full(entries=2)  # one slot
    host.create(2, cqid=1, sq_size=8)
    host.failing.hold = True
    write(host, 1)
    host.drain()
    flush = host.submit(2, Nvm.FLUSH, nsid=1)
    host.drain()
    assert len(host.failing.held) == 1
    host.failing.fails = lambda request: request.operation is Operation.WRITE
    host.failing.hold = False
    host.failing.finish()
    assert all_cids(host) == [flush]


def test_a_held_command_keeps_no_pause_from_ending_and_nothing_is_submitted_while_paused() -> None:
    host = full()
    write(host, 1)
    host.drain()
    assert host.controller.pause(0)
    tried = len(host.failing.operations)
    host.failing.heal()
    host.engine.kick(1)
    host.drain()
    assert len(host.failing.operations) == tried
    assert host.controller.inspect()["held"] != []


def test_a_held_command_has_given_the_guests_memory_back() -> None:
    host = full()
    acquire, taken = host.ram.acquire, list[Mapped]()

    def recorded(segments: Sequence[Segment], to_guest: bool) -> Mapped:
        taken.append(acquire(segments, to_guest))
        return taken[-1]

    host.ram.acquire = recorded  # type: ignore[method-assign]
    write(host, 1)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    assert host.controller.held == 2
    assert [transfer.buffers for transfer in taken] == [(), ()]
    for sq in host.controller.sqs.values():
        assert (sq.in_flight, sq.cq.reserved) == (0, 0)


def test_a_command_is_held_only_when_none_of_its_requests_is_under_way_any_more() -> None:
    host = full()
    host.failing.hold = True
    host.ram.data[DATA : DATA + 32] = (bytes(4) + bytes([1, 0, 0, 0]) + bytes(8)) * 2
    host.submit(1, Nvm.DATASET_MANAGEMENT, nsid=1, cdw10=1, cdw11=4)
    host.drain()
    host.failing.finish(1)
    assert (len(host.failing.held), host.controller.held, host.controller.pause(0)) == (1, 0, False)
    host.failing.finish()
    assert (host.controller.held, host.controller.pause(0)) == (1, True)


def test_the_error_is_announced_before_a_pause_ends() -> None:
    host = full()
    counts: list[int] = []
    host.controller.on_error = lambda _report: counts.append(host.controller.activity.count)
    write(host, 1)
    host.drain()
    assert counts == [1]
    assert host.controller.activity.count == 0


def test_resume_without_a_pause_tries_again() -> None:
    host = full()
    cid = write(host, 1)
    host.drain()
    host.failing.heal()
    host.controller.resume()  # a `cont` that overtook the stop
    assert all_cids(host) == [cid]


@pytest.mark.parametrize(
    ("opcode", "fields"),
    [
        (Nvm.READ, {}),
        (Nvm.WRITE, {}),
        (Nvm.FLUSH, {}),
        (Nvm.COMPARE, {}),
        (Nvm.VERIFY, {}),
        (Nvm.WRITE_ZEROES, {}),
        (Nvm.DATASET_MANAGEMENT, {"cdw11": 4}),
        (Nvm.COPY, {"cdw10": 1000}),
    ],
)
def test_every_command_is_held_and_succeeds_as_a_whole_later(opcode: Nvm, fields: dict[str, int]) -> None:
    host = full()
    host.ram.data[DATA + 8 : DATA + 16] = (1 if opcode == Nvm.DATASET_MANAGEMENT else 0).to_bytes(8, "little")
    if opcode == Nvm.DATASET_MANAGEMENT:
        host.ram.data[DATA : DATA + 8] = bytes([0, 0, 0, 0, 1, 0, 0, 0])
    if opcode == Nvm.COMPARE:
        host.ram.data[DATA : DATA + 512] = bytes(512)
    cid = host.submit(1, opcode, nsid=1, **fields)
    assert host.done() == []
    assert host.controller.held == 1
    host.failing.heal()
    host.try_again()
    (completion,) = host.done()
    assert (completion.cid, completion.status) == (cid, Status.SUCCESS)


def test_a_copy_whose_write_failed_reads_its_sources_again() -> None:
    host = full()
    host.failing.data[0:512] = b"s" * 512
    host.ram.data[DATA : DATA + 32] = bytes(32)
    host.failing.fails = lambda request: request.operation is Operation.WRITE
    host.submit(1, Nvm.COPY, nsid=1, cdw10=10)
    host.drain()
    host.failing.heal()
    host.try_again()
    assert host.done()[0].status == Status.SUCCESS
    assert host.failing.order == [("read", 0), ("write", 10)] * 2
    assert host.failing.data[10 * 512 : 11 * 512] == b"s" * 512


def test_the_write_of_an_overlapping_copy_is_reported_since_a_second_try_could_read_the_first() -> None:
    host = full()
    host.ram.data[DATA : DATA + 32] = bytes(16) + (3).to_bytes(2, "little") + bytes(14)  # blocks 0 to 3
    host.failing.fails = lambda request: request.operation is Operation.WRITE
    host.submit(1, Nvm.COPY, nsid=1, cdw10=3)
    (completion,) = host.done()
    assert completion.status == Status.CAPACITY_EXCEEDED
    assert (host.controller.held, host.reports[0].action) == (0, Action.REPORT)


def test_admin_commands_that_need_the_disk_are_held_as_well() -> None:
    host = full()
    for opcode, fields in (
        (Admin.SET_FEATURES, {"cdw10": Feature.VOLATILE_WRITE_CACHE, "cdw11": 0}),
        (Admin.FORMAT_NVM, {"nsid": 1}),
    ):
        host.failing.fail_all()
        cid = host.submit(0, opcode, **fields)
        assert host.done(0) == []
        host.failing.heal()
        host.failing.order.clear()
        host.try_again()
        (completion,) = host.done(0)
        assert (completion.cid, completion.status) == (cid, Status.SUCCESS)
        assert host.failing.order != []
    assert host.controller.features.volatile_write_cache == 0


# --- report, ignore, change ------------------------------------------------------------------------------------------


def test_report_tells_the_guest_and_the_world() -> None:
    host = full(werror=ErrorPolicy.REPORT)
    write(host, 3)
    (completion,) = host.done()
    assert (completion.status, completion.dnr) == (Status.CAPACITY_EXCEEDED, False)
    assert host.reports == [replace(STOPPED_WRITE, action=Action.REPORT)]
    entry = host.controller.logs.errors.entries[0]
    assert (entry.sqid, entry.cid, entry.lba, entry.opcode) == (1, completion.cid, 3, Nvm.WRITE)


def test_ignore_is_success() -> None:
    host = full(werror=ErrorPolicy.IGNORE, rerror=ErrorPolicy.IGNORE)
    for opcode in (Nvm.WRITE, Nvm.READ, Nvm.FLUSH, Nvm.COMPARE, Nvm.VERIFY, Nvm.WRITE_ZEROES):
        assert host.command(1, opcode, nsid=1).status == Status.SUCCESS
    assert {report.action for report in host.reports} == {Action.IGNORE}
    assert [report.is_read for report in host.reports] == [False, True, False, True, True, False]


def test_a_copy_whose_read_failed_and_was_ignored_writes_nothing() -> None:
    host = full(rerror=ErrorPolicy.IGNORE)
    host.ram.data[DATA : DATA + 32] = bytes(32)
    assert host.command(1, Nvm.COPY, nsid=1, cdw10=10).status == Status.SUCCESS
    assert host.failing.order == [("read", 0)]


def test_an_ignored_error_does_not_end_a_command_of_many_parts() -> None:
    host = full(werror=ErrorPolicy.IGNORE)
    ranges = [(lba, 1) for lba in range(40)]
    host.ram.data[DATA : DATA + 16 * 40] = b"".join(
        bytes(4) + blocks.to_bytes(4, "little") + lba.to_bytes(8, "little") for lba, blocks in ranges
    )
    status = host.command(1, Nvm.DATASET_MANAGEMENT, nsid=1, cdw10=39, cdw11=4).status
    assert (status, len(host.failing.order), len(host.reports)) == (Status.SUCCESS, 40, 40)


def test_enospc_holds_a_full_disk_and_reports_a_broken_one() -> None:
    host = full(werror=ErrorPolicy.ENOSPC)
    write(host, 1)
    assert host.done() == []
    host.failing.fail_all(errno.EIO)
    assert host.command(1, Nvm.WRITE_ZEROES, nsid=1).status == Status.WRITE_FAULT
    assert [report.action for report in host.reports] == [Action.STOP, Action.REPORT]


def test_a_policy_changed_while_a_command_is_held_decides_about_its_retry() -> None:
    host = full()
    write(host, 1)
    host.drain()
    host.errors.werror = ErrorPolicy.REPORT
    host.try_again()
    assert host.done()[0].status == Status.CAPACITY_EXCEEDED


def test_a_policy_changed_to_ignore_in_the_middle_of_a_failure_ignores_it() -> None:
    class Changing(DriveErrors):
        def decide(self, is_read: bool, errno: int) -> Action:
            return answers.pop(0)

    answers = [Action.STOP, Action.IGNORE]
    host = full()
    host.controller.errors = {"d0": Changing()}
    assert host.command(1, Nvm.WRITE, nsid=1).status == Status.SUCCESS
    assert [report.action for report in host.reports] == [Action.IGNORE]


def test_a_drive_without_a_policy_reports() -> None:
    host = full()
    host.controller.errors = {}
    assert host.command(1, Nvm.WRITE, nsid=1).status == Status.CAPACITY_EXCEEDED
    assert [report.action for report in host.reports] == [Action.REPORT]


def test_what_the_guest_got_wrong_is_reported_whatever_the_policy_and_raises_no_event() -> None:
    host = full()
    host.failing.read_only = True
    assert host.command(1, Nvm.WRITE, nsid=1).status == Status.WRITE_PROTECTED
    assert host.command(1, Nvm.READ, nsid=1, cdw11=9).status == Status.LBA_OUT_OF_RANGE
    assert host.command(1, Nvm.READ, nsid=9).status == Status.INVALID_FIELD
    host.ram.holes.append(range(DATA, DATA + 512))
    assert host.command(1, Nvm.READ, nsid=1).status == Status.DATA_TRANSFER_ERROR
    assert (host.reports, host.controller.held) == ([], 0)


@pytest.mark.parametrize("policy", [ErrorPolicy.REPORT, ErrorPolicy.IGNORE, ErrorPolicy.STOP])
def test_an_image_handed_over_under_a_paused_device_is_no_error(policy: ErrorPolicy) -> None:
    host = full(werror=policy)
    host.failing.hold = True
    cid = write(host, 1)
    host.drain()
    assert not host.controller.pause(0)
    host.failing.fail_all(errno.EPERM)
    host.failing.finish()
    assert (host.controller.held, host.reports) == (1, [])
    host.failing.heal()
    host.failing.hold = False
    host.try_again()
    assert all_cids(host) == [cid]


# --- ways out --------------------------------------------------------------------------------------------------------


def abort(host: PolicyHost, cid: int, sqid: int = 1) -> int:
    completion = host.admin(Admin.ABORT, cdw10=cid << 16 | sqid)
    assert completion.status == Status.SUCCESS
    return completion.result


def test_abort_finds_a_held_command_and_leaves_the_others() -> None:
    host = full()
    cids = [write(host, lba) for lba in range(3)]
    host.drain()
    assert abort(host, cids[1]) == ABORT_FOUND
    (completion,) = host.done()
    assert (completion.cid, completion.status) == (cids[1], Status.ABORT_REQUESTED)
    assert abort(host, cids[1]) == ABORT_NOT_FOUND
    host.failing.heal()
    host.try_again()
    assert all_cids(host) == [cids[0], cids[2]]


def test_an_aborted_held_command_waits_for_room_and_travels() -> None:
    host = full(entries=2)
    cid = write(host, 1)
    host.drain()
    host.failing.fails = lambda request: request.operation is Operation.WRITE
    flush = host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert abort(host, cid) == ABORT_FOUND
    host.move()
    host.drain()
    assert all_cids(host) == [flush]
    (completion,) = host.done()
    assert (completion.cid, completion.status) == (cid, Status.ABORT_REQUESTED)


def test_queue_deletion_completes_held_commands_before_its_own_completion() -> None:
    host = full()
    host.create(2, vector=1)
    cids = [write(host, lba, qid=2) for lba in range(3)]
    host.drain()
    host.lines.signals.clear()
    host.submit(0, Admin.DELETE_SQ, cdw10=2)
    assert host.done(0)[0].status == Status.SUCCESS
    assert host.lines.signals == [1, 1, 1, 0]
    assert [(completion.cid, completion.status) for completion in host.done(2)] == [
        (cid, Status.ABORTED_SQ_DELETION) for cid in cids
    ]
    assert host.controller.held == 0


def test_queue_deletion_does_not_wait_for_room_for_held_commands() -> None:
    host = full(entries=3)
    for lba in range(4):
        write(host, lba)
        host.drain()
    assert host.delete_sq(1).status == Status.SUCCESS
    assert {completion.status for completion in host.done()} == {Status.ABORTED_SQ_DELETION}
    assert host.controller.cqs[1].reserved == 0


def test_a_command_that_fails_while_its_queue_is_deleted_is_not_held() -> None:
    host = full()
    host.failing.hold = True
    cid = write(host, 1)
    host.drain()
    host.submit(0, Admin.DELETE_SQ, cdw10=1)
    assert host.done(0) == []
    host.failing.finish()
    (completion,) = host.done()
    assert (completion.cid, completion.status) == (cid, Status.ABORTED_SQ_DELETION)
    assert host.done(0)[0].status == Status.SUCCESS


def test_a_second_command_of_a_held_id_is_a_conflict() -> None:
    host = full()
    cid = write(host, 1)
    host.drain()
    host.cid -= 1
    assert write(host, 2) == cid
    assert host.done()[0].status == Status.COMMAND_ID_CONFLICT
    assert host.controller.held == 1


@pytest.mark.parametrize("way", ["disable", "function reset"])
def test_a_reset_drops_held_commands_and_the_controller_works_again(way: str) -> None:
    host = full()
    write(host, 1)
    host.drain()
    if way == "disable":
        host.disable()
    else:
        host.controller.reset(lambda: None)
    assert (host.controller.held, host.csts) == (0, 0)
    host.failing.heal()
    host.enable()
    host.create()
    host.try_again()
    assert host.failing.order == [("write", 1)]
    assert host.command(1, Nvm.READ, nsid=1).status == Status.SUCCESS


def test_a_command_that_fails_during_a_reset_is_neither_held_nor_reported() -> None:
    host = full()
    host.failing.hold = True
    write(host, 1)
    host.drain()
    host.disable()
    host.failing.finish()
    assert (host.controller.held, host.reports, host.csts) == (0, [], 0)


def test_a_shutdown_drops_what_is_held_and_what_fails_meanwhile() -> None:
    host = full()
    write(host, 1)
    host.drain()
    host.failing.hold = True
    write(host, 2)
    host.drain()
    host.set(Register.CC, host.get(Register.CC) | 1 << 14)
    host.failing.heal()
    host.failing.fails = lambda request: request.operation is Operation.WRITE
    host.failing.hold = False
    host.failing.finish()
    host.drain()
    assert host.csts & CSTS_SHST_COMPLETE == CSTS_SHST_COMPLETE
    assert (host.controller.held, host.done()) == (0, [])


# --- saved -----------------------------------------------------------------------------------------------------------


def test_held_commands_travel_in_order_and_are_tried_again_there() -> None:
    host = full()
    host.create(2)
    cids = [write(host, lba) for lba in range(3)]
    other = write(host, 5, qid=2)
    host.drain()
    state = host.save()
    assert [(held.sqid, held.aborted) for held in state.held] == [(1, False)] * 3 + [(2, False)]
    host.replace()
    host.failing.heal()
    host.failing.order.clear()
    host.controller.load(state)
    assert (host.controller.held, host.failing.order) == (4, [])  # nothing is submitted before the VM runs
    host.controller.resume()
    assert (all_cids(host), all_cids(host, 2)) == (cids, [other])
    assert sorted(host.failing.order) == [("write", lba) for lba in (0, 1, 2, 5)]


def test_a_save_that_was_in_vain_leaves_the_source_with_its_held_commands() -> None:
    host = full()
    cid = write(host, 1)
    host.drain()
    host.save()
    host.failing.heal()
    host.controller.resume()
    assert all_cids(host) == [cid]


def test_held_commands_are_saved_with_a_full_completion_queue() -> None:
    host = full(entries=4)
    cids = []
    for lba in range(5):
        cids.append(write(host, lba))
        host.drain()
    host.failing.heal()
    host.try_again()
    state = host.move()
    assert len(state.held) == 2
    assert all_cids(host) + all_cids(host) == cids


def test_contradictory_held_commands_are_refused_by_name() -> None:
    host = full()
    write(host, 1)
    host.drain()
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    state = host.save()
    (held,) = state.held
    aer = (state.events.outstanding[0]).to_bytes(2, "little")
    for wrong, message in (
        ([held, held], "held: command id .* of submission queue 1 is there twice"),
        ([replace(held, sqid=7)], "held: there is no submission queue 7"),
        ([held, replace(held, sqid=0)], "held: the commands are not in the order of their queues"),
        ([replace(held, sqe=held.sqe[:63])], "held: an entry of 63 bytes"),
        ([replace(held, sqid=0, sqe=held.sqe[:2] + aer + held.sqe[4:])], "held: command id .* of submission queue 0"),
    ):
        state.held = wrong
        with pytest.raises(StateError, match=message):
            host.controller.load(state)
    assert host.controller.held == 1
    state.held = [HeldState(1, False, held.sqe)]
    host.controller.load(state)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_no_command_is_lost_when_the_vm_is_paused_and_resumed_while_its_commands_fail() -> None:
    host = PolicyHost(entries=64)
    completions: list[Completion] = []
    host.engine.close()
    host.engine = engine = PlainEngine()
    try:
        state = host.save()
        host.controller = host._new()
        assert host.controller.pause(0)
        host.controller.load(state)
        host.failing.fails = lambda _request: len(host.failing.order) % 3 != 0
        for lba in range(50):
            write(host, lba, fill=bytes([lba + 1]))
        deadline = time.monotonic() + 30
        while len(completions) < 50 and time.monotonic() < deadline:
            host.controller.resume()
            assert host.controller.pause(10)
            completions += host.reap(1)
    finally:
        engine.close()
    assert sorted(completion.cid for completion in completions) == list(range(host.cid - 49, host.cid + 1))
    assert {completion.status for completion in completions} == {Status.SUCCESS}
    assert host.failing.data[: 50 * 512 : 512] == bytes(range(1, 51))
    assert len(host.reports) == len(host.failing.order) - 50


def test_the_guest_waits_for_a_disk_in_a_disable_a_deletion_a_shutdown_and_after_an_abort_in_vain() -> None:
    """Each is told of once, when it begins; `waits` says whether it still is so."""

    def waiting(begin: Callable[[PolicyHost], object]) -> None:
        host = PolicyHost(FailingDisk(hold=True))
        told: list[bool] = []

        def waits() -> bool:
            return host.controller.waits

        host.controller.on_wait = lambda: told.append(waits())
        write(host, 0)
        host.drain()
        assert not waits()
        begin(host)
        host.drain()
        assert told == [True]
        assert waits()
        host.failing.finish()
        host.drain()
        host.failing.finish()  # a shutdown flushes
        host.drain()
        assert not waits()

    waiting(lambda host: host.controller.write(Register.CC, 4, 0))
    waiting(lambda host: host.controller.write(Register.CC, 4, host.controller.registers.cc | 1 << 14))
    waiting(lambda host: host.submit(0, Admin.DELETE_SQ, cdw10=1))
    waiting(lambda host: host.submit(0, Admin.ABORT, cdw10=1 | 7 << 16))
