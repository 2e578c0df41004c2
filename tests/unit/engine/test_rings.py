"""The compiled loop: what it does is what the plain engine does, and everything that waits gets its queue back."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from tests.nvme_host import CONFIG, DATA, Host

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.block.backend import Operation
from nvmove.engine import loop
from nvmove.engine.compiled import CompiledEngine
from nvmove.nvme.commands import admin
from nvmove.nvme.leases import Leases
from nvmove.nvme.seams import Counts, FailedCommand, LeaseTerms, Lending
from nvmove.nvme.spec import (
    ALL_NAMESPACES,
    CSTS_RDY,
    DOORBELLS,
    DSM_DEALLOCATE,
    DSM_RANGE,
    FUA,
    SGL_DESCRIPTOR,
    Admin,
    Log,
    Nvm,
    Register,
    Status,
)
from tests.rings import LentDisk, LentLines, LentRam, Rig

LONG = 20


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_read_and_a_write_never_come_to_python(rig: Rig) -> None:
    os.pwrite(rig.disk.fd, b"hello", 512)
    assert rig.read(1) == 0
    assert rig.ram.data[DATA : DATA + 5] == b"hello"
    rig.ram.data[DATA : DATA + 5] = b"world"
    assert rig.command(1, Nvm.WRITE, nsid=1, cdw10=2).status == 0
    assert rig.disk.contents[1024:1029] == b"world"
    assert rig.disk.operations == []
    assert not rig.in_python
    assert rig.lines.look() == [0]


def test_completions_carry_the_heads_of_their_own_commands(rig: Rig) -> None:
    for _ in range(3):
        rig.submit(1, Nvm.READ, nsid=1)
    rig.drain()
    assert [completion.sq_head for completion in rig.reap(1)] == [1, 2, 3]


def test_rings_wrap(rig: Rig) -> None:
    for number in range(70):
        rig.ram.data[DATA] = number
        assert rig.command(1, Nvm.WRITE, nsid=1, cdw10=number).status == 0
    assert rig.disk.contents[: 70 * 512 : 512] == bytes(range(70))
    assert not rig.in_python


def test_a_full_completion_queue_stops_the_loop_and_room_lets_it_go_on() -> None:
    rig = Rig()
    rig.create(2, sq_size=16, cq_size=4)
    rig.drain()
    cids = [rig.submit(2, Nvm.READ, nsid=1) for _ in range(10)]
    found = []
    for expected in (3, 3, 3, 1, 0):
        rig.drain()
        some = rig.reap(2)
        assert len(some) == expected
        found += [completion.cid for completion in some]
    assert found == cids


@pytest.mark.parametrize("length", [512, 4096, 4608, 8192, 12288, 65536, 512 << 10])
@pytest.mark.parametrize("offset", [0, 4, 2048])
def test_prps_of_all_shapes_arrive_where_they_point(rig: Rig, length: int, offset: int) -> None:
    blocks = length // 512
    os.pwrite(rig.disk.fd, os.urandom(length), 0)
    pages = [0x10_0000 + 0x2000 * n for n in range(-(-(offset + length) // 4096))]
    pages[1:] = reversed(pages[1:])
    rest = pages[1:]
    prp2 = rest[0] if len(rest) == 1 else 0x3_0FF0 if rest else 0
    if len(rest) > 1:  # a list that begins two entries before its page's end, so that it is chained
        room = [*rest[:1], 0x60_0000] if len(rest) > 2 else rest
        rig.ram.data[0x3_0FF0:0x3_1000] = struct.pack("<2Q", *room)
        rig.ram.data[0x60_0000 : 0x60_0000 + 8 * len(rest[1:])] = struct.pack(f"<{len(rest[1:])}Q", *rest[1:])
    assert rig.read(0, blocks, prp1=pages[0] + offset, prp2=prp2) == 0
    found = b"".join(
        bytes(rig.ram.data[page + (offset if n == 0 else 0) : page + 4096]) for n, page in enumerate(pages)
    )
    assert found[:length] == rig.disk.contents[:length]
    assert not rig.in_python


def sgl(address: int, length: int, identifier: int = 0, psdt: int = 1) -> dict[str, int]:
    return {"flags": psdt << 6, "prp1": address, "prp2": length | identifier << 56}


def test_an_sgl_of_data_blocks_never_comes_to_python(rig: Rig) -> None:
    os.pwrite(rig.disk.fd, os.urandom(128 << 10), 0)
    for psdt in (1, 2):
        assert rig.read(0, 256, **sgl(0x50_0003, 128 << 10, psdt=psdt)) == 0
        assert rig.ram.data[0x50_0003:][: 128 << 10] == rig.disk.contents[: 128 << 10]
    blocks = [(0x50_0001, 1000), (0, 0), (0x60_0000, 24), (0x60_0018, 512)]
    rig.ram.data[0x7000:0x7040] = b"".join(SGL_DESCRIPTOR.pack(*block, 0) for block in blocks)
    assert rig.read(8, 3, **sgl(0x7000, 64, 0x30)) == 0
    found = bytes(rig.ram.data[0x50_0001:][:1000]) + bytes(rig.ram.data[0x60_0000:][:536])
    assert found == rig.disk.contents[8 * 512 : 11 * 512]
    assert rig.command(1, Nvm.WRITE, nsid=1, cdw10=100, cdw12=2, **sgl(0x7000, 64, 0x30)).status == 0
    assert rig.disk.contents[100 * 512 : 103 * 512] == found
    assert not rig.in_python


@pytest.mark.parametrize(
    ("status", "pointer"),
    [
        (Status.DATA_SGL_LENGTH_INVALID, sgl(DATA, 511)),
        (Status.DATA_SGL_LENGTH_INVALID, sgl(DATA, 513)),
        (Status.SGL_TYPE_INVALID, sgl(DATA, 512, 0x01)),
        (Status.SGL_TYPE_INVALID, sgl(DATA, 512, 0x10)),
        (Status.INVALID_FIELD, sgl(DATA, 512, psdt=3)),
        (Status.DATA_TRANSFER_ERROR, sgl(1 << 40, 512)),
        (Status.DATA_TRANSFER_ERROR, sgl(1 << 40, 16, 0x30)),
        (Status.INVALID_SGL_SEGMENT, sgl(0x7000, 0, 0x30)),
        (Status.INVALID_SGL_SEGMENT, sgl(0x7000, 24, 0x30)),
        (Status.DATA_SGL_LENGTH_INVALID, sgl(0x7000, 16, 0x30)),
        (Status.DATA_SGL_LENGTH_INVALID, sgl(0x7000, 32, 0x30)),
        (Status.SUCCESS, sgl(0x7010, 48, 0x20)),  # a segment that leads to another
    ],
)
def test_other_sgls_are_pythons(rig: Rig, status: Status, pointer: dict[str, int]) -> None:
    lists = [(DATA, 511, 0), (DATA, 511, 0), (DATA, 2, 0), (0x7000, 16, 0x30)]
    rig.ram.data[0x7000:0x7040] = b"".join(SGL_DESCRIPTOR.pack(*one) for one in lists)
    if status is Status.SUCCESS:
        rig.ram.data[0x7000:0x7030] = b"".join(
            SGL_DESCRIPTOR.pack(*one) for one in [(DATA, 500, 0), (DATA, 6, 0), (DATA, 6, 0)]
        )
    assert rig.read(**pointer) == status
    assert status or rig.in_python


def test_data_may_cross_regions_and_lists_may_not_be_there(rig: Rig) -> None:
    rig.ram.punch(range(0x50_0000, 0x50_1000))
    assert rig.read(0, 8, prp1=0x50_0000) == Status.DATA_TRANSFER_ERROR
    assert rig.read(0, 64, prp1=0x40_0000, prp2=0x50_0000) == Status.DATA_TRANSFER_ERROR
    assert rig.read(0, 8) == 0


ODD = [
    (Status.SUCCESS, Nvm.FLUSH, {"nsid": ALL_NAMESPACES}),
    (Status.SUCCESS, Nvm.VERIFY, {}),
    (Status.INVALID_FIELD, Nvm.FLUSH, {"flags": 1}),
    (Status.LBA_OUT_OF_RANGE, Nvm.WRITE, {"cdw10": 2048, "cdw12": FUA}),
    (Status.LBA_OUT_OF_RANGE, Nvm.WRITE_ZEROES, {"cdw10": 2048}),
    (Status.DATA_TRANSFER_ERROR, Nvm.DATASET_MANAGEMENT, {"cdw11": DSM_DEALLOCATE, "prp1": 1 << 40}),
    (Status.INVALID_OPCODE, 0x7F, {}),
    (Status.INVALID_FIELD, Nvm.READ, {"flags": 1}),
    (Status.INVALID_NAMESPACE, Nvm.READ, {"nsid": 0}),
    (Status.INVALID_FIELD, Nvm.READ, {"nsid": 2}),
    (Status.LBA_OUT_OF_RANGE, Nvm.READ, {"cdw10": 2048}),
    (Status.LBA_OUT_OF_RANGE, Nvm.READ, {"cdw10": 2047, "cdw12": 1}),
    (Status.LBA_OUT_OF_RANGE, Nvm.READ, {"cdw10": 0xFFFF_FFFF, "cdw11": 0xFFFF_FFFF}),
    (Status.INVALID_FIELD, Nvm.READ, {"cdw12": 1024}),
    (Status.INVALID_PRP_OFFSET, Nvm.READ, {"prp1": DATA + 1}),
    (Status.INVALID_PRP_OFFSET, Nvm.READ, {"cdw12": 15, "prp2": DATA + 512}),
    (Status.DATA_TRANSFER_ERROR, Nvm.READ, {"prp1": 1 << 40}),
]


@pytest.mark.parametrize(("status", "opcode", "fields"), ODD)
def test_an_odd_command_is_pythons_and_its_neighbours_are_not(
    rig: Rig, status: Status, opcode: int, fields: dict[str, int]
) -> None:
    cids = [rig.submit(1, Nvm.READ, nsid=1), rig.submit(1, opcode, **{"nsid": 1, **fields})]
    cids.append(rig.submit(1, Nvm.READ, nsid=1))
    rig.drain()
    found = rig.reap(1)
    assert [(c.cid, c.status) for c in found] == [(cids[0], 0), (cids[1], status), (cids[2], 0)]
    assert [c.sq_head for c in found] == [1, 2, 3]
    assert rig.engine.lent == {1}


def test_doorbells_that_cannot_be_are_refused_as_ever(rig: Rig) -> None:
    event = rig.submit(0, Admin.ASYNC_EVENT_REQUEST)
    assert rig.read() == 0
    assert rig.engine.lent == {1}
    rig.set(DOORBELLS + 8, 99)
    rig.set(DOORBELLS + 12, 5)
    rig.drain()
    (completion,) = rig.reap(0)
    assert completion.cid == event
    assert rig.read() == 0


def test_pause_takes_a_sleeping_queue_back_and_saves_its_positions(rig: Rig) -> None:
    for _ in range(3):
        assert rig.read() == 0
    rig.submit(1, Nvm.READ, nsid=1)
    assert rig.controller.pause(0)
    (sq,) = [sq for sq in rig.controller.save().sqs if sq.sqid == 1]
    assert (sq.head, sq.tail) == (3, 4)
    assert (rig.disk.loans, rig.ram.loans) == (0, [])
    rig.controller.resume()
    rig.drain()
    assert len(rig.reap(1)) == 1


def test_smart_and_inspect_see_what_is_lent(rig: Rig) -> None:
    assert rig.read(0, 4) == 0
    assert rig.command(1, Nvm.WRITE, nsid=1).status == 0
    assert rig.admin(Admin.GET_LOG_PAGE, nsid=0xFFFF_FFFF, cdw10=127 << 16 | Log.SMART).status == 0
    page = rig.ram.data[DATA : DATA + 512]
    assert (page[32 + 32], page[32 + 48]) == (1, 1)
    assert rig.engine.lent == {1}
    tree = rig.controller.inspect()
    assert tree["sqs"][1]["head"] == 2
    assert tree["live"]["in_flight"][1] == 0
    assert tree["live"]["lent"] == [1]
    assert rig.controller.pause(0)
    assert rig.controller.logs.smart.bytes_read == 2048


def test_what_is_lent_is_counted_for_its_namespace(rig: Rig) -> None:
    def counts() -> list[tuple[int, int]]:
        with rig.controller.lock:
            rig.controller.leases.refresh()
            counters = rig.controller.namespaces.require_active(1).counters
            kinds = Operation.READ, Operation.WRITE, Operation.FLUSH, Operation.DISCARD
            return [(one.operations, one.bytes) for one in map(counters.__getitem__, kinds)]

    assert rig.read(0, 4) == 0
    assert rig.command(1, Nvm.WRITE, nsid=1).status == 0
    assert counts() == [(1, 2048), (1, 512), (0, 0), (0, 0)]
    assert rig.read() == 0
    assert rig.command(1, Nvm.WRITE, nsid=1, cdw12=FUA).status == 0
    assert rig.command(1, Nvm.FLUSH, nsid=1).status == 0
    assert counts() == [(2, 2560), (2, 1024), (1, 0), (0, 0)]
    assert rig.command(1, Nvm.WRITE_ZEROES, nsid=1, cdw12=3).status == 0  # zeroes are written, as QEMU has it
    rig.ram.data[DATA : DATA + 48] = DSM_RANGE.pack(0, 2, 0) + DSM_RANGE.pack(0, 0, 0) + DSM_RANGE.pack(0, 1, 8)
    assert rig.command(1, Nvm.DATASET_MANAGEMENT, nsid=1, cdw10=2, cdw11=DSM_DEALLOCATE).status == 0
    assert counts() == [(2, 2560), (3, 3072), (1, 0), (2, 1536)]
    assert not rig.in_python
    assert rig.controller.pause(0)
    smart = rig.controller.logs.smart
    assert (smart.read_commands, smart.write_commands, smart.bytes_written) == (2, 2, 1024)


def test_a_second_queue_on_the_completion_queue_ends_the_loan(rig: Rig) -> None:
    rig.submit(1, Nvm.READ, nsid=1)
    rig.create(2, cqid=1)
    cids = {rig.submit(sqid, Nvm.READ, nsid=1) for sqid in (1, 2, 2)}
    rig.controller.leases.bar()
    rig.controller.leases.unbar()
    rig.drain()
    assert cids <= {completion.cid for completion in rig.reap(1)}
    assert rig.engine.lent == set()


def test_deleting_disabling_and_resetting_end_loans(rig: Rig) -> None:
    assert rig.read() == 0
    assert rig.disk.loans == 1
    assert rig.delete_sq(1).status == 0
    assert rig.disk.loans == 0
    rig.create_sq(1, 1)
    rig.disable()
    assert rig.csts == 0
    assert rig.disk.loans == 0
    rig.enable()
    rig.create(1)
    assert rig.read() == 0
    assert rig.disk.loans == 1
    done: list[bool] = []
    rig.controller.reset(lambda: done.append(True))
    assert (done, rig.disk.loans, rig.csts) == ([True], 0, 0)


def test_an_abort_finds_what_waits_in_a_queue_that_is_lent(rig: Rig) -> None:
    assert rig.read() == 0
    cids = [rig.submit(1, Nvm.READ, nsid=1) for _ in range(3)]
    assert rig.admin(Admin.ABORT, cdw10=cids[1] << 16 | 1).result & 1 == 0
    rig.drain()
    found = {completion.cid: completion.status for completion in rig.reap(1)}
    assert found == {cids[0]: 0, cids[1]: Status.ABORT_REQUESTED, cids[2]: 0}


class Hung:
    """A borrower whose disk does not answer."""

    owed = False
    executing = 1
    doorbells = 0
    late = False, False

    def __init__(self) -> None:
        self.is_revoked = False

    def prepare(self) -> None:
        pass

    def lend(self, terms: LeaseTerms) -> bool:
        self.now = terms.sq_head, terms.sq_tail, terms.cq_head, terms.cq_tail, terms.cq_phase, 0
        return True

    def take(self) -> bool:
        return False

    def end(self) -> None:
        pass

    def set_tail(self, tail: int) -> bool:
        return True

    set_head = set_tail

    def positions(self) -> tuple[int, int, int, int, int, int]:
        return self.now

    def counts(self) -> Counts:
        return {}

    def failed(self) -> list[FailedCommand]:
        return []

    def marking(self) -> list[tuple[int, bytes]]:
        return []

    def take_marks(self) -> list[tuple[int, int]]:
        return []

    def marked(self) -> None:
        pass

    def revoke(self) -> None:
        self.is_revoked = True

    halt = revoke

    def wait_halted(self, timeout: float) -> None:
        pass

    def mute(self) -> None:
        pass


def test_an_abort_does_not_wait_for_a_disk_that_hangs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "ABORT_WAIT", 0.01)
    hung = Hung()
    assert rig.controller.leases.lend(1, hung) is Lending.LENT
    assert rig.admin(Admin.ABORT, cdw10=99 << 16 | 1).result & 1
    assert hung.is_revoked
    assert not rig.controller.pause(0)
    rig.controller.leases.give_back(hung)
    assert rig.controller.pause(0)


def test_a_masked_interrupt_is_owed_until_it_has_a_way(rig: Rig) -> None:
    rig.submit(1, Nvm.READ, nsid=1)
    for line in list(rig.lines.lent):
        line.revoke()
    rig.drain()
    assert len(rig.reap(1)) == 1
    assert rig.lines.look() == [0]


def test_a_short_file_reads_as_the_back_end_says(rig: Rig) -> None:
    os.ftruncate(rig.disk.fd, 4096)
    assert rig.read(16) == 0
    assert rig.disk.operations


def test_shutdown_ends_loans(rig: Rig) -> None:
    assert rig.read() == 0
    assert rig.disk.loans == 1
    rig.set(Register.CC, rig.get(Register.CC) | 1 << 14)
    rig.drain()
    assert rig.csts == CSTS_RDY | 2 << 2
    assert rig.disk.loans == 0


def test_a_queue_outside_of_memory_is_fatal_as_ever(rig: Rig) -> None:
    ring = rig.rings[1]
    rig.ram.punch(range(ring.address, ring.address + 4096))
    rig.ram.data[ring.address] = 0
    rig.set(DOORBELLS + 8, 1)
    rig.drain()
    assert rig.csts & 2
    assert rig.disk.loans == 0


def threaded(spin_us: int = 20) -> tuple[CompiledEngine, Host]:
    """A controller with threads, and two queue pairs."""
    engine = CompiledEngine(spin_us=spin_us)
    host = Host(ram=LentRam(), lines=LentLines(), disk=LentDisk(), engine=engine, config=CONFIG)

    def wait() -> None:
        for _ in range(200_000):
            if host.peek(0) is not None:
                return
            threading.Event().wait(0.0001)
        raise AssertionError("no admin completion")

    host.drain = wait  # type: ignore[method-assign]
    host.enable()
    for qid in (1, 2):
        host.create(qid, sq_size=16, cq_size=16)
    return engine, host


class Wakeful:
    """Two queue pairs whose loops look for more commands for very long: they are at work whenever it counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.host = threaded(spin_us=LONG * 1_000_000)
        self.given_back = threading.Event()
        """By a loop's own thread."""
        give_back = Leases.give_back

        def note(leases: Leases, borrower: loop.Ring) -> None:
            give_back(leases, borrower)
            self.given_back.set()

        monkeypatch.setattr(Leases, "give_back", note)
        monkeypatch.setattr("nvmove.nvme.leases._SOON", LONG)

    def work(self) -> list[loop.Ring]:
        """Run a command on each queue pair; return who runs them."""
        for qid in (1, 2):
            self.host.submit(qid, Nvm.READ, nsid=1)
            while not self.host.reap(qid):
                threading.Event().wait(0.0001)
        return [cast(loop.Ring, borrower) for borrower in self.host.controller.leases._live]


@pytest.fixture
def wakeful(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wakeful]:
    wakeful = Wakeful(monkeypatch)
    yield wakeful
    assert wakeful.host.controller.pause(LONG)
    wakeful.engine.close()


def test_a_pause_takes_queues_back_from_loops_at_work_without_their_threads(wakeful: Wakeful) -> None:
    controller = wakeful.host.controller
    for _ in range(100):  # a thread that is kept from running for long may miss its turn
        assert len(wakeful.work()) == 2
        wakeful.given_back.clear()
        assert controller.pause(LONG)
        assert [sq.head for _, sq in sorted(controller.sqs.items())][1:] == [sq.tail for sq in controller.sqs.values()][
            1:
        ]
        was_quick = not wakeful.given_back.is_set()
        controller.resume()
        if was_quick:
            return
    raise AssertionError("each time a loop's thread had to give back")


def test_a_loop_that_was_halted_and_that_nobody_takes_gives_back(wakeful: Wakeful) -> None:
    rings = wakeful.work()
    wakeful.given_back.clear()
    rings[0].halt()
    rings[0].wait_halted(LONG)
    assert wakeful.given_back.wait(LONG)
    assert len(wakeful.work()) == 2


def test_threads_run_queues_and_pause_and_resume_lose_nothing() -> None:
    engine, host = threaded()
    done = dict.fromkeys((1, 2), 0)
    sent = dict.fromkeys((1, 2), 0)
    turns = 0
    try:
        while min(done.values()) < 2000:
            for qid in (1, 2):
                while sent[qid] - done[qid] < 15:
                    host.submit(qid, Nvm.WRITE, nsid=1, cdw10=qid)
                    sent[qid] += 1
                done[qid] += len(host.reap(qid))
            turns += 1
            if turns % 7 == 0:
                assert host.controller.pause(LONG)
                state = host.controller.save()
                assert len(state.sqs) == 3
                host.controller.resume()
            assert turns < 1_000_000
    finally:
        assert host.controller.pause(LONG)
        engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nvme-sq")]


@pytest.fixture
def direct() -> Rig:
    """With a disk of O_DIRECT."""
    return Rig(LentDisk(alignment=512))


def test_an_o_direct_disk_gets_depth(direct: Rig) -> None:
    for number in range(12):
        direct.ram.data[DATA + 4096 * number] = number
        direct.submit(1, Nvm.WRITE, nsid=1, cdw10=number, prp1=DATA + 4096 * number)
    direct.drain()
    assert sorted(c.cid for c in direct.reap(1)) == list(range(direct.cid - 11, direct.cid + 1))
    assert direct.disk.contents[: 12 * 512 : 512] == bytes(range(12))
    assert not direct.in_python
    assert direct.controller.pause(0)
    assert direct.controller.logs.smart.write_commands == 12


def test_what_an_o_direct_disk_cannot_take_is_pythons(direct: Rig) -> None:
    assert direct.read(0, 1, prp1=DATA + 4) == 0
    assert len(direct.disk.operations) == 1
    assert direct.read(0, 1) == 0
    assert len(direct.disk.operations) == 1


@pytest.mark.parametrize("alignment", [1, 512])
def test_what_the_file_fails_is_done_again_by_the_back_end(alignment: int) -> None:
    """In the order of submission, and each command completes once."""
    rig = Rig(LentDisk(alignment=alignment))
    rig.disk.lent_fd = os.open("/dev/null", os.O_RDONLY)
    try:
        cids = [rig.submit(1, Nvm.WRITE, nsid=1, cdw10=number) for number in range(9)]
        rig.drain()
        found = rig.reap(1)
        assert sorted((c.cid, c.status) for c in found) == [(cid, 0) for cid in cids]
        assert len(rig.disk.operations) == 9
        assert rig.controller.held == 0
    finally:
        rig.controller.pause(0)
        os.close(rig.disk.lent_fd)


def test_a_kick_before_the_wait_is_not_lost() -> None:
    ring = loop.Ring()
    ring.kick()
    ring.wait()


def test_a_full_eventfd_that_the_client_lets_wait_holds_no_loop_up(rig: Rig) -> None:
    assert rig.read() == 0
    (line,) = rig.lines.lent
    rig.lines.look()
    os.eventfd_write(line.fd, (1 << 64) - 2)
    os.set_blocking(line.fd, True)
    freed = threading.Timer(20, os.eventfd_read, [line.fd])  # a loop that waits is let go, and the test fails
    freed.start()
    assert rig.read() == 0
    assert freed.is_alive()
    freed.cancel()
    os.set_blocking(line.fd, False)
    assert os.eventfd_read(line.fd) == (1 << 64) - 2
    assert not rig.in_python


@pytest.mark.parametrize("what", ["disk", "memory", "interrupt"])
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_runs_out_in_a_loan_is_given_back_and_python_runs_the_queue(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    assert rig.controller.pause(0)
    lender = {"disk": rig.disk, "memory": rig.ram, "interrupt": rig.lines}[what]
    with monkeypatch.context() as patch:
        patch.setattr(lender, "lend", refuse)
        rig.controller.resume()
        assert rig.read() == 0
        assert rig.in_python
        assert (rig.disk.loans, rig.ram.loans, rig.lines.lent) == (0, [], [])
    rig.disk.requests.clear()
    assert rig.read() == 0
    assert rig.disk.loans == 1, "lent again when there is enough"
