"""The compiled loop and what disks take their time for: flushes, durable writes, zeroes, deallocations."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.nvme_host import DATA, Host

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.block.backend import Operation
from nvmove.block.lend import ASK, NOTHING, LentSpace
from nvmove.block.policy import DriveErrors, ErrorPolicy, ErrorReport
from nvmove.engine.compiled import CompiledEngine
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.spec import DEAC, DSM_DEALLOCATE, DSM_RANGE, FUA, Admin, Nvm, Status
from tests.rings import PUNCH, LentDisk, LentLines, LentRam, Rig

LONG = 20
BLOCK = 512


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    fill(rig)
    return rig


def fill(rig: Rig) -> None:
    os.pwrite(rig.disk.fd, b"\xaa" * rig.disk.size, 0)


def order(rig: Rig, *commands: tuple[int, dict[str, int]]) -> list[int]:
    """Submit commands at once; return which completed first, second, …; all must succeed."""
    cids = [rig.submit(1, opcode, **{"nsid": 1, **fields}) for opcode, fields in commands]
    rig.drain()
    found = rig.reap(1)
    assert {c.status for c in found} == {0}
    return [cids.index(c.cid) for c in found]


READ: tuple[int, dict[str, int]] = (Nvm.READ, {})


@pytest.mark.parametrize("alignment", [1, 512])
def test_reads_behind_a_flush_do_not_wait_for_it(alignment: int) -> None:
    rig = Rig(LentDisk(alignment=alignment))
    found = order(rig, READ, (Nvm.FLUSH, {}), READ, READ)
    assert sorted(found) == [0, 1, 2, 3]
    if alignment == 1:
        assert found == [0, 2, 3, 1]
    assert not rig.in_python


@pytest.mark.parametrize(
    ("opcode", "fields"),
    [
        (Nvm.WRITE, {"cdw12": FUA}),
        (Nvm.WRITE_ZEROES, {}),
        (Nvm.WRITE_ZEROES, {"cdw12": FUA}),
        (Nvm.DATASET_MANAGEMENT, {"cdw11": DSM_DEALLOCATE}),
    ],
)
def test_reads_behind_what_changes_the_disk_slowly_do_not_wait_for_it(
    rig: Rig, opcode: int, fields: dict[str, int]
) -> None:
    rig.ram.data[DATA : DATA + 16] = DSM_RANGE.pack(0, 1, 0)
    assert order(rig, (opcode, fields), (Nvm.READ, {"prp1": DATA + 4096}), READ) == [1, 2, 0]
    assert not rig.in_python


def test_a_write_with_fua_stores_its_data_and_counts_as_a_write(rig: Rig) -> None:
    rig.ram.data[DATA : DATA + 1024] = bytes(range(256)) * 4
    assert rig.command(1, Nvm.WRITE, nsid=1, cdw10=3, cdw12=FUA | 1).status == 0
    assert rig.command(1, Nvm.FLUSH, nsid=1).status == 0
    assert rig.command(1, Nvm.WRITE_ZEROES, nsid=1, cdw10=9).status == 0
    assert rig.disk.contents[3 * BLOCK : 5 * BLOCK] == bytes(range(256)) * 4
    assert not rig.in_python
    assert rig.controller.pause(0)
    smart = rig.controller.logs.smart
    assert (smart.read_commands, smart.bytes_read) == (0, 0)
    assert (smart.write_commands, smart.bytes_written) == (1, 1024)


def test_a_read_with_fua_is_a_read(rig: Rig) -> None:
    assert rig.command(1, Nvm.READ, nsid=1, cdw12=FUA).status == 0
    assert rig.ram.data[DATA : DATA + BLOCK] == b"\xaa" * BLOCK
    assert not rig.in_python


def test_without_a_write_cache_every_write_is_durable_and_the_loops(rig: Rig) -> None:
    assert order(rig, (Nvm.WRITE, {}), READ) == [0, 1]
    assert rig.admin(Admin.SET_FEATURES, cdw10=6, cdw11=0).status == 0
    rig.disk.requests.clear()  # it was flushed for that
    rig.engine.runs.clear()
    assert order(rig, (Nvm.WRITE, {}), READ) == [1, 0]
    assert not rig.in_python


def test_on_a_disk_that_writes_through_every_write_is_durable() -> None:
    disk = LentDisk()
    disk.durable = True
    rig = Rig(disk)
    assert order(rig, (Nvm.WRITE, {}), READ) == [1, 0]
    assert not rig.in_python


def test_a_disk_without_flushes_does_all_at_once() -> None:
    disk = LentDisk()
    disk.syncs, disk.durable = False, True
    rig = Rig(disk)
    commands = [(Nvm.FLUSH, {}), (Nvm.WRITE, {}), (Nvm.WRITE, {"cdw12": FUA}), READ]
    assert order(rig, *commands) == [0, 1, 2, 3]
    assert not rig.in_python


def test_a_flush_of_a_disk_that_cannot_be_written_is_nothing() -> None:
    disk = LentDisk()
    disk.read_only, disk.syncs = True, False
    rig = Rig(disk)
    assert order(rig, (Nvm.FLUSH, {}), READ) == [0, 1]
    assert not rig.in_python
    assert rig.command(1, Nvm.WRITE_ZEROES, nsid=1).status == Status.WRITE_PROTECTED


@pytest.mark.parametrize("flags", [0, FUA, DEAC, FUA | DEAC])
def test_zeroes_are_made_where_they_were_asked_for(rig: Rig, flags: int) -> None:
    assert rig.command(1, Nvm.WRITE_ZEROES, nsid=1, cdw10=2, cdw12=flags | 2).status == 0
    expected = bytearray(b"\xaa" * rig.disk.size)
    expected[2 * BLOCK : 5 * BLOCK] = bytes(3 * BLOCK)
    assert rig.disk.contents == bytes(expected)
    assert not rig.in_python


def test_zeroes_may_be_longer_than_a_transfer(rig: Rig) -> None:
    assert rig.command(1, Nvm.WRITE_ZEROES, nsid=1, cdw12=2047).status == 0
    assert rig.disk.contents == bytes(rig.disk.size)
    assert not rig.in_python


SPACES = [
    (LentSpace(ASK, PUNCH, PUNCH), 0, True),
    (LentSpace(ASK, PUNCH, PUNCH), DEAC, False),
    (LentSpace(PUNCH, ASK, PUNCH), 0, False),
    (LentSpace(PUNCH, ASK, PUNCH), DEAC, True),
]


@pytest.mark.parametrize(("space", "flags", "is_asked"), SPACES)
def test_zeroes_that_the_back_end_must_make_are_its(space: LentSpace, flags: int, is_asked: bool) -> None:
    disk = LentDisk()
    disk.space = space
    rig = Rig(disk)
    fill(rig)
    assert rig.command(1, Nvm.WRITE_ZEROES, nsid=1, cdw12=flags).status == 0
    assert rig.disk.contents[:BLOCK] == bytes(BLOCK)
    assert rig.disk.operations == [Operation.WRITE_ZEROES] * is_asked


def deallocate(rig: Rig, ranges: list[tuple[int, int]], prp1: int = DATA, prp2: int = 0, attributes: int = 4) -> int:
    """Deallocate ranges of (LBA, blocks) whose list is in the pages at `prp1` and `prp2`; return the status."""
    data = b"".join(DSM_RANGE.pack(0, blocks, lba) for lba, blocks in ranges)
    first = min(len(data), 4096 - prp1 % 4096)
    rig.ram.data[prp1 : prp1 + first] = data[:first]
    rig.ram.data[prp2 : prp2 + len(data) - first] = data[first:]
    return rig.command(
        1, Nvm.DATASET_MANAGEMENT, nsid=1, cdw10=len(ranges) - 1, cdw11=attributes, prp1=prp1, prp2=prp2
    ).status


@pytest.mark.parametrize("offset", [0, 4096 - 32, 4096 - 8])
def test_all_ranges_of_a_deallocate_are_given_back(rig: Rig, offset: int) -> None:
    ranges = [(2 * number, number % 2) for number in range(256)]
    assert deallocate(rig, ranges, DATA + offset, DATA + 3 * 4096 if offset else 0) == 0
    expected = bytearray(b"\xaa" * rig.disk.size)
    for lba, blocks in ranges:
        expected[lba * BLOCK : (lba + blocks) * BLOCK] = bytes(blocks * BLOCK)
    assert rig.disk.contents == bytes(expected)
    assert not rig.in_python


def test_a_deallocate_changes_nothing_unless_all_ranges_are_inside(rig: Rig) -> None:
    before = rig.disk.contents
    assert deallocate(rig, [(0, 8), (2047, 2)]) == Status.LBA_OUT_OF_RANGE
    assert deallocate(rig, [(0, 8), (1 << 63, 1 << 31)]) == Status.LBA_OUT_OF_RANGE
    assert deallocate(rig, [(0, 8), (2049, 0)]) == Status.LBA_OUT_OF_RANGE
    assert rig.disk.contents == before
    assert rig.disk.operations == []


@pytest.mark.parametrize(
    ("discard", "ranges", "attributes", "asked"),
    [
        (NOTHING, [(0, 8)], DSM_DEALLOCATE, []),
        (ASK, [(0, 8), (9, 1)], DSM_DEALLOCATE, [Operation.DISCARD] * 2),
        (PUNCH, [(0, 8), (4000, 1)], 3, []),
        (PUNCH, [(8, 0), (2048, 0)], DSM_DEALLOCATE, []),
    ],
)
def test_what_a_deallocate_does_is_the_disks_to_say(
    discard: int, ranges: list[tuple[int, int]], attributes: int, asked: list[Operation]
) -> None:
    """Nothing where discards are ignored, none is wanted, or there is nothing in the ranges."""
    disk = LentDisk()
    disk.space = LentSpace(discard=discard)
    rig = Rig(disk)
    fill(rig)
    assert deallocate(rig, ranges, attributes=attributes) == 0
    assert rig.disk.operations == asked
    assert (rig.disk.contents == b"\xaa" * rig.disk.size) == (not asked)


def test_more_flushes_than_there_are_slots_all_complete() -> None:
    rig = Rig()
    rig.create(2, sq_size=300, cq_size=300)
    rig.drain()
    cids = [rig.submit(2, Nvm.FLUSH, nsid=1) for _ in range(290)]
    rig.drain()
    assert sorted(c.cid for c in rig.reap(2)) == cids
    assert not rig.in_python


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken() -> Iterator[Rig]:
    """A disk whose file answers EBADF to all, and whose back end finds nothing wrong."""
    rig = Rig()
    rig.disk.lent_fd = os.open(f"/proc/self/fd/{rig.disk.fd}", os.O_PATH)
    yield rig
    rig.controller.pause(0)
    os.close(rig.disk.lent_fd)


DURABLE = [(Nvm.FLUSH, 0, True), (Nvm.WRITE, FUA, False)]


@pytest.mark.parametrize(("opcode", "flags", "is_flush"), DURABLE)
def test_an_error_that_linux_tells_once_is_told_and_not_asked_for_again(
    broken: Rig, opcode: int, flags: int, is_flush: bool
) -> None:
    completion = broken.command(1, opcode, nsid=1, cdw10=0 if is_flush else 7, cdw12=flags)
    assert completion.status == Status.INTERNAL_ERROR
    assert broken.disk.operations == []
    assert broken.controller.pause(0)
    (entry,) = broken.controller.logs.errors.entries
    assert (entry.cid, entry.lba) == (completion.cid, 0 if is_flush else 7)
    assert broken.disk.syncs_failed == [errno.EBADF] * is_flush  # of a write, only EIO tells of data that was lost


@pytest.mark.parametrize(("opcode", "flags", "is_flush"), DURABLE)
def test_such_an_error_meets_the_drives_policy(broken: Rig, opcode: int, flags: int, is_flush: bool) -> None:
    reports: list[ErrorReport] = []
    broken.controller.on_error = reports.append
    broken.controller.errors = {"d0": DriveErrors(ErrorPolicy.STOP, ErrorPolicy.REPORT)}
    cids = [broken.submit(1, opcode, nsid=1, cdw12=flags) for _ in range(2)]
    broken.drain()
    assert broken.reap(1) == []
    assert broken.controller.held == 2
    assert [report.errno for report in reports] == [errno.EBADF] * 2
    assert broken.controller.pause(0)
    broken.controller.resume()
    broken.drain()
    assert [(c.cid, c.status) for c in broken.reap(1)] == [(cid, 0) for cid in cids]
    assert len(broken.disk.operations) == 2
    broken.controller.errors = {"d0": DriveErrors(ErrorPolicy.IGNORE, ErrorPolicy.REPORT)}
    assert broken.command(1, opcode, nsid=1, cdw12=flags).status == 0
    assert len(broken.disk.operations) == 2


@pytest.mark.parametrize(
    ("opcode", "fields", "operation"),
    [
        (Nvm.WRITE, {}, Operation.WRITE),
        (Nvm.WRITE_ZEROES, {}, Operation.WRITE_ZEROES),
        (Nvm.WRITE_ZEROES, {"cdw12": FUA}, Operation.WRITE_ZEROES),
        (Nvm.DATASET_MANAGEMENT, {"cdw11": DSM_DEALLOCATE}, Operation.DISCARD),
    ],
)
def test_other_errors_are_found_anew_by_the_back_end(
    broken: Rig, opcode: int, fields: dict[str, int], operation: Operation
) -> None:
    broken.ram.data[DATA : DATA + 16] = DSM_RANGE.pack(0, 1, 0)
    assert broken.command(1, opcode, nsid=1, **fields).status == 0
    assert broken.disk.operations == [operation]


def test_a_file_that_has_no_flush_is_left_to_the_back_end() -> None:
    rig = Rig()
    rig.disk.lent_fd = os.open("/dev/null", os.O_RDWR)
    try:
        assert rig.command(1, Nvm.FLUSH, nsid=1).status == 0
        assert rig.disk.operations == [Operation.FLUSH]
    finally:
        rig.controller.pause(0)
        os.close(rig.disk.lent_fd)


def test_without_io_uring_the_back_end_does_it(rig: Rig) -> None:
    assert rig.create_cq(2, flags=1).status == 0  # no interrupt, which would need a descriptor
    rig.new_cq(2, 0x4_0000, 16)
    assert rig.create_sq(2, 2).status == 0
    rig.new_sq(2, 0xA_0000, 16, 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # no descriptor for a ring
    try:
        cids = [rig.submit(2, opcode, nsid=1) for opcode in (Nvm.READ, Nvm.FLUSH, Nvm.READ)]
        rig.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [(c.cid, c.status) for c in rig.reap(2)] == [(cid, 0) for cid in cids]
    assert rig.disk.operations == [Operation.FLUSH]


# --- a disk that takes its time --------------------------------------------------------------------------------------


class TwoDisks(Host):
    """Namespace 2 is a pipe: durable writes to it end when there is room. Its queue has a thread."""

    CONFIG = ControllerConfig(
        serial="S1",
        namespaces=(
            NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1)),
            NamespaceConfig(nsid=2, drive="d1", uuid=uuid.UUID(int=2)),
        ),
    )

    disk: LentDisk

    def __init__(self) -> None:
        self.slow = LentDisk()
        self.out, self.slow.lent_fd = os.pipe()
        self.room = fcntl.fcntl(self.slow.lent_fd, fcntl.F_SETPIPE_SZ, 4096)
        self.threads = CompiledEngine(spin_us=20)
        disks = {"d0": LentDisk(), "d1": self.slow}
        super().__init__(ram=LentRam(), lines=LentLines(), disks=disks, engine=self.threads, config=self.CONFIG)
        self.enable()
        self.create(1)

    def drain(self) -> None:
        """Wait for the admin queue's next completion."""
        self.wait(lambda: self.peek(0) is not None)

    def wait(self, is_there: Callable[[], bool]) -> None:
        for _ in range(200_000):
            if is_there():
                return
            threading.Event().wait(0.0001)
        raise AssertionError("it never came")

    def next_cid(self) -> int:
        self.wait(lambda: self.peek(1) is not None)
        (completion,) = self.reap(1, 1)
        assert completion.status == 0
        return completion.cid

    def fill(self) -> None:
        """From now on writes to namespace 2 wait."""
        os.write(self.slow.lent_fd, bytes(self.room))

    def let_go(self) -> None:
        assert os.read(self.out, self.room) == bytes(self.room)

    def close(self) -> None:
        assert self.controller.pause(LONG)
        self.threads.close()
        os.close(self.out)
        os.close(self.slow.lent_fd)


@pytest.fixture
def two() -> Iterator[TwoDisks]:
    two = TwoDisks()
    yield two
    two.close()


def test_a_durable_write_that_takes_long_keeps_no_read_from_completing(two: TwoDisks) -> None:
    two.fill()
    slow = two.submit(1, Nvm.WRITE, nsid=2, cdw12=FUA)
    for _ in range(40):  # some with the write, others long after it
        assert two.submit(1, Nvm.READ, nsid=1) == two.next_cid()
    assert two.controller.inspect()["live"]["lent"] == [1]
    two.let_go()
    assert two.next_cid() == slow
    assert two.slow.operations == two.disk.operations == []


def test_a_pause_waits_for_what_is_at_the_disk_and_nothing_is_begun_meanwhile(two: TwoDisks) -> None:
    two.fill()
    slow = two.submit(1, Nvm.WRITE, nsid=2, cdw12=FUA)
    assert two.submit(1, Nvm.READ, nsid=1) == two.next_cid()  # the write was fetched before
    assert not two.controller.pause(0)
    late = two.submit(1, Nvm.READ, nsid=1)
    two.let_go()
    assert two.controller.pause(LONG)
    assert [c.cid for c in two.reap(1)] == [slow]
    assert two.disk.loans == two.slow.loans == 0
    two.controller.resume()
    assert two.next_cid() == late


def test_deleting_the_queue_waits_for_what_is_at_the_disk(two: TwoDisks) -> None:
    two.fill()
    slow = two.submit(1, Nvm.WRITE, nsid=2, cdw12=FUA)
    assert two.submit(1, Nvm.READ, nsid=1) == two.next_cid()
    cid = two.submit(0, Admin.DELETE_SQ, cdw10=1)
    two.wait(lambda: two.slow.loans == 1 and 1 not in two.controller.sqs)
    assert two.peek(0) is None
    two.let_go()
    two.drain()
    assert [(c.cid, c.status) for c in two.reap(0)] == [(cid, 0)]
    assert two.next_cid() == slow
