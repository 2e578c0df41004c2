"""Queue creation and deletion, Abort, Asynchronous Event Request: every status exact."""

from __future__ import annotations

import pytest

from nvmove.block.backend import Operation
from nvmove.nvme.commands import admin
from nvmove.nvme.spec import CSTS_RDY, DOORBELLS, Admin, EventType, Log, Nvm, Register, Status
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CC, Host


def enabled(**arguments: object) -> Host:
    host = Host(**arguments)  # type: ignore[arg-type]
    host.enable()
    return host


def raise_event(host: Host, kind: EventType = EventType.ERROR, info: int = 0) -> None:
    host.controller.raise_event(kind, info, Log.ERROR_INFORMATION)


# --- creation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"cqid": 0}, Status.INVALID_QID),
        ({"cqid": 65}, Status.INVALID_QID),
        ({"cqid": 1, "size": 1}, Status.INVALID_QUEUE_SIZE),
        ({"cqid": 1, "size": 2049}, Status.INVALID_QUEUE_SIZE),
        ({"cqid": 1, "vector": 65}, Status.INVALID_INTERRUPT_VECTOR),
        ({"cqid": 1, "flags": 2}, Status.INVALID_FIELD),
        ({"cqid": 1, "prp1": 0x2_0008}, Status.INVALID_PRP_OFFSET),
    ],
)
def test_a_cq_that_cannot_be_created(arguments: dict[str, int], status: Status) -> None:
    host = enabled()
    completion = host.create_cq(**arguments)
    assert (completion.status, completion.dnr) == (status, True)
    assert list(host.controller.cqs) == [0]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"sqid": 0, "cqid": 1}, Status.INVALID_QID),
        ({"sqid": 65, "cqid": 1}, Status.INVALID_QID),
        ({"sqid": 1, "cqid": 0}, Status.INVALID_QID),
        ({"sqid": 1, "cqid": 65}, Status.INVALID_QID),
        ({"sqid": 1, "cqid": 2}, Status.INVALID_CQ),
        ({"sqid": 1, "cqid": 1, "size": 1}, Status.INVALID_QUEUE_SIZE),
        ({"sqid": 1, "cqid": 1, "size": 2049}, Status.INVALID_QUEUE_SIZE),
        ({"sqid": 1, "cqid": 1, "flags": 0}, Status.INVALID_FIELD),
        ({"sqid": 1, "cqid": 1, "prp1": 0x8_0800}, Status.INVALID_PRP_OFFSET),
    ],
)
def test_an_sq_that_cannot_be_created(arguments: dict[str, int], status: Status) -> None:
    host = enabled()
    host.create_cq(1)
    assert host.create_sq(**arguments).status == status
    assert list(host.controller.sqs) == [0]


def test_ids_in_use_are_refused() -> None:
    host = enabled()
    host.create()
    assert host.create_cq(1).status == Status.INVALID_QID
    assert host.create_sq(1, 1).status == Status.INVALID_QID


def test_only_vector_0_exists_without_msix() -> None:
    host = enabled(lines=Lines(msix=False))
    assert host.create_cq(1, vector=1).status == Status.INVALID_INTERRUPT_VECTOR
    assert host.create_cq(1, vector=0).status == Status.SUCCESS


def test_queues_before_cc_has_the_entry_sizes_are_of_an_invalid_size() -> None:
    host = Host()
    host.enable(cc=6 << 4)
    assert host.create_cq(1).status == Status.INVALID_QUEUE_SIZE


def test_an_unknown_admin_opcode_and_a_fused_command_are_refused() -> None:
    host = enabled()
    assert host.admin(0xC5).status == Status.INVALID_OPCODE
    assert host.admin(Admin.IDENTIFY, cdw10=1, flags=1).status == Status.INVALID_FIELD


def test_an_error_names_its_place_in_the_error_information_log() -> None:
    host = enabled()
    host.create_cq(77)
    (entry,) = host.controller.logs.errors.entries
    assert (entry.count, entry.sqid, entry.status & 0x7FF, entry.location) == (1, 0, Status.INVALID_QID, 40)


# --- deletion --------------------------------------------------------------------------------------------------------


def test_queues_are_deleted_and_their_ids_are_free_again() -> None:
    host = enabled()
    host.create()
    assert host.delete_sq(1).status == Status.SUCCESS
    assert host.delete_cq(1).status == Status.SUCCESS
    host.create()
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


@pytest.mark.parametrize("opcode", [Admin.DELETE_SQ, Admin.DELETE_CQ])
@pytest.mark.parametrize("qid", [0, 1, 0xFFFF])
def test_a_queue_that_is_not_there_cannot_be_deleted(opcode: Admin, qid: int) -> None:
    assert enabled().admin(opcode, cdw10=qid).status == Status.INVALID_QID


def test_a_cq_in_use_cannot_be_deleted() -> None:
    host = enabled()
    host.create(1)
    host.create(2, cqid=1)
    assert host.delete_cq(1).status == Status.INVALID_QUEUE_DELETION
    host.delete_sq(1)
    assert host.delete_cq(1).status == Status.INVALID_QUEUE_DELETION
    host.delete_sq(2)
    assert host.delete_cq(1).status == Status.SUCCESS


def test_deleting_an_sq_waits_for_what_is_in_flight_and_drops_the_rest() -> None:
    disk = Disk(hold=True)
    host = enabled(disk=disk)
    host.create(cq_size=3)
    for _ in range(4):
        host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    deletion = host.submit(0, Admin.DELETE_SQ, cdw10=1)
    host.drain()
    assert host.peek(0) is None
    assert host.admin(Admin.DELETE_CQ, cdw10=1).status == Status.INVALID_QUEUE_DELETION
    disk.finish()
    assert [c.cid for c in host.reap(0)] == [deletion]
    assert len(host.reap(1)) == 2
    host.drain()
    assert disk.operations == [Operation.READ] * 2
    assert host.delete_cq(1).status == Status.SUCCESS


def test_a_deleted_cq_leaves_no_interrupt_behind() -> None:
    lines = Lines(msix=False)
    host = enabled(lines=lines)
    host.create()
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    host.delete_sq(1)
    host.delete_cq(1)
    assert not lines.up()


def test_a_queue_command_that_a_disable_overtakes_creates_nothing() -> None:
    host = enabled()
    read = host.ram.read

    def disable_after_reading(address: int, length: int) -> bytes:
        data = read(address, length)
        host.disable()
        host.set(Register.CC, CC | 1)
        return data

    host.ram.read = disable_after_reading  # type: ignore[method-assign]
    host.submit(0, Admin.CREATE_CQ, cdw10=0xF_0001, cdw11=3)
    host.drain()
    host.ram.read = read  # type: ignore[method-assign]
    assert host.csts == CSTS_RDY
    assert list(host.controller.cqs) == [0]
    assert host.peek(0) is None


# --- abort -----------------------------------------------------------------------------------------------------------


def stalled() -> tuple[Host, list[int]]:
    """A host with two completions in a CQ that is full, and three commands that wait."""
    host = enabled()
    host.create(cq_size=3)
    cids = [host.submit(1, Nvm.FLUSH, nsid=1) for _ in range(5)]
    host.drain()
    return host, cids


def test_abort_finds_a_command_that_was_not_fetched() -> None:
    host, cids = stalled()
    assert host.admin(Admin.ABORT, cdw10=cids[3] << 16 | 1).result == 0
    assert len(host.reap(1)) == 2
    host.drain()
    found = host.reap(1)
    assert [(c.cid, c.status) for c in found] == [(cids[2], 0), (cids[3], Status.ABORT_REQUESTED)]
    host.drain()
    assert [(c.cid, c.status) for c in host.reap(1)] == [(cids[4], 0)]


def test_abort_finds_a_command_beyond_the_end_of_the_ring() -> None:
    host = enabled()
    host.create(sq_size=4, cq_size=2)
    host.command(1, Nvm.FLUSH, nsid=1)
    host.command(1, Nvm.FLUSH, nsid=1)
    cids = [host.submit(1, Nvm.FLUSH, nsid=1) for _ in range(2)]
    host.drain()
    cids.append(host.submit(1, Nvm.FLUSH, nsid=1))
    assert host.admin(Admin.ABORT, cdw10=cids[2] << 16 | 1).result == 0
    assert host.controller.sqs[1].aborted == {0}


@pytest.mark.parametrize("index", [0, 1])
def test_abort_does_not_find_what_was_completed(index: int) -> None:
    host, cids = stalled()
    completion = host.admin(Admin.ABORT, cdw10=cids[index] << 16 | 1)
    assert (completion.status, completion.result) == (0, 1)


def test_abort_of_a_command_at_the_disk_leaves_it_there() -> None:
    disk = Disk(hold=True)
    host = enabled(disk=disk)
    host.create()
    cid = host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    assert host.admin(Admin.ABORT, cdw10=cid << 16 | 1).result == 1
    disk.finish()
    assert [c.status for c in host.reap(1)] == [0]


def test_abort_in_a_queue_that_is_not_there_or_not_mapped() -> None:
    host, cids = stalled()
    assert host.admin(Admin.ABORT, cdw10=9).status == Status.INVALID_FIELD
    host.ram.holes = [range(0x9_0000, 0xA_0000)]
    assert host.admin(Admin.ABORT, cdw10=cids[3] << 16 | 1).result == 1


def test_a_command_fetched_while_abort_reads_the_ring_is_not_marked() -> None:
    host, cids = stalled()
    read = host.ram.read

    def fetch_while_reading(address: int, length: int) -> bytes:
        data = read(address, length)
        if 0x9_0000 <= address < 0xA_0000 and length == 3 * 64:
            host.ram.read = read  # type: ignore[method-assign]
            host.reap(1)
            host.controller.run(1)
        return data

    host.ram.read = fetch_while_reading  # type: ignore[method-assign]
    assert host.admin(Admin.ABORT, cdw10=cids[2] << 16 | 1).result == 1
    assert host.controller.sqs[1].aborted == set()


def test_abort_finds_an_event_request() -> None:
    host = enabled()
    cid = host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    abort = host.submit(0, Admin.ABORT, cdw10=cid << 16)
    host.drain()
    first, second = host.reap(0)
    assert (first.cid, first.status) == (cid, Status.ABORT_REQUESTED)
    assert (second.cid, second.result) == (abort, 0)


def test_abort_of_an_event_request_without_room_for_its_completion_leaves_it() -> None:
    host = Host()
    host.enable(entries=2)
    cid = host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    assert host.admin(Admin.ABORT, cdw10=cid << 16).result == 1
    assert list(host.controller.events.outstanding) == [cid]


# --- asynchronous events ---------------------------------------------------------------------------------------------


def test_an_event_completes_the_oldest_request() -> None:
    host = enabled()
    cids = [host.submit(0, Admin.ASYNC_EVENT_REQUEST) for _ in range(2)]
    host.drain()
    assert host.peek(0) is None
    raise_event(host)
    host.drain()
    assert [(c.cid, c.result) for c in host.reap(0)] == [(cids[0], 0x1_0000)]


def test_an_event_without_a_request_waits_for_one() -> None:
    host = enabled()
    raise_event(host)
    host.drain()
    assert host.peek(0) is None
    assert host.admin(Admin.ASYNC_EVENT_REQUEST).result == 0x1_0000


def test_one_request_too_many_is_refused() -> None:
    host = enabled()
    for _ in range(4):
        host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    assert host.admin(Admin.ASYNC_EVENT_REQUEST).status == Status.AER_LIMIT_EXCEEDED


def test_outstanding_requests_hold_no_slot_and_are_not_in_flight() -> None:
    host = Host()
    host.enable(entries=3)
    for _ in range(4):
        host.submit(0, Admin.ASYNC_EVENT_REQUEST)
        host.drain()
    assert host.controller.cqs[0].free == 2
    assert host.controller.pause(0)
    host.controller.resume()
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS


def test_an_event_waits_for_room_in_the_admin_cq() -> None:
    host = Host()
    host.enable(entries=3)
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    for _ in range(2):
        host.submit(0, Admin.IDENTIFY, cdw10=1)
    host.drain()
    raise_event(host)
    host.drain()
    assert len(host.reap(0)) == 2
    host.drain()
    assert [c.result for c in host.reap(0)] == [0x1_0000]


def test_events_of_a_disabled_controller_are_not_kept() -> None:
    host = Host()
    raise_event(host)
    host.enable()
    assert not host.controller.events.queued


def test_doorbells_of_a_deleted_queue_are_an_event() -> None:
    host = enabled()
    host.create()
    host.delete_sq(1)
    host.set(DOORBELLS + 8, 1)
    assert host.admin(Admin.ASYNC_EVENT_REQUEST).result == 0x1_0000


def test_no_more_commands_than_some_wait_to_complete_as_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are state, which a guest could make too large to be saved."""
    monkeypatch.setattr(admin, "MAX_ABORTED", 2)
    host, cids = stalled()
    assert [host.admin(Admin.ABORT, cdw10=cid << 16 | 1).result for cid in cids[2:]] == [0, 0, 1]
    assert len(host.reap(1)) == 2
    host.drain()
    assert [c.status for c in host.reap(1)] == [Status.ABORT_REQUESTED] * 2
    host.drain()
    assert [c.status for c in host.reap(1)] == [0]
