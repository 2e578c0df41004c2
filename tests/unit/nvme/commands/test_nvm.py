"""The NVM commands: what reaches the disk, what the guest is told, what is counted."""

from __future__ import annotations

import errno
import struct

import pytest

from nvmove.block.backend import Operation
from nvmove.nvme.commands import failures
from nvmove.nvme.spec import COPY_RANGE, DEAC, DSM_RANGE, FUA, Feature, Log, Nvm, Status
from tests.disk import Disk
from tests.nvme_commands import CommandHost, namespace
from tests.nvme_host import DATA

PATTERN = bytes(range(256)) * 2


def test_what_was_written_is_read() -> None:
    host = CommandHost()
    assert host.write(3, PATTERN * 20).status == Status.SUCCESS
    answer = host.read(3, 20)
    assert (answer.status, answer.data) == (Status.SUCCESS, PATTERN * 20)
    assert host.disk.data[3 * 512 : 4 * 512] == PATTERN


def test_requests_are_counted_by_namespace_and_kind_and_failures_apart() -> None:
    host = CommandHost(namespace(), namespace("d1"), disks={"d0": Disk(), "d1": Disk()})
    first, second = (one.counters for one in host.controller.namespaces)
    assert host.write(0, PATTERN).status == Status.SUCCESS
    assert host.read(0, 2).status == Status.SUCCESS
    assert host.io(Nvm.FLUSH, 0xFFFF_FFFF).status == Status.SUCCESS
    host.disk.fail[Operation.READ] = errno.EIO
    assert host.read(0, 2).status == Status.UNRECOVERED_READ_ERROR
    assert [
        (one.operations, one.bytes, one.failed)
        for one in (first[Operation.READ], first[Operation.WRITE], first[Operation.FLUSH])
    ] == [(1, 1024, 1), (1, 512, 0), (1, 0, 0)]
    assert (second[Operation.READ].operations, second[Operation.FLUSH].operations) == (0, 1)


def test_a_read_beyond_the_end_is_out_of_range_and_touches_nothing() -> None:
    host = CommandHost()
    assert host.read(2047, 1).status == Status.SUCCESS
    for lba, blocks in ((2048, 1), (2047, 2), (1 << 63, 1), ((1 << 64) - 1, 1)):
        answer = host.read(lba, blocks)
        assert (answer.status, answer.dnr) == (Status.LBA_OUT_OF_RANGE, True)
    assert len(host.disk.requests) == 1


def test_a_transfer_beyond_mdts_is_an_invalid_field_even_out_of_range() -> None:
    host = CommandHost(mdts=1)
    assert host.read(0, 16).status == Status.SUCCESS
    assert host.read(0, 17).status == Status.INVALID_FIELD
    assert host.read(5000, 17).status == Status.INVALID_FIELD
    assert host.write(0, bytes(17 * 512)).status == Status.INVALID_FIELD


def test_an_unknown_opcode_and_a_fused_command_are_refused() -> None:
    host = CommandHost()
    assert host.io(0x7F).status == Status.INVALID_OPCODE
    assert host.io(Nvm.READ, flags=1, length=512).status == Status.INVALID_FIELD
    assert host.io(Nvm.FLUSH, 0xFFFF_FFFF, flags=1).status == Status.INVALID_FIELD


@pytest.mark.parametrize(
    ("nsid", "status"),
    [
        (0, Status.INVALID_NAMESPACE),
        (257, Status.INVALID_NAMESPACE),
        (0xFFFF_FFFF, Status.INVALID_NAMESPACE),
        (2, Status.INVALID_FIELD),
    ],
)
def test_a_namespace_that_is_not_there(nsid: int, status: Status) -> None:
    assert CommandHost().read(0, 1, nsid).status == status


def test_fua_or_a_write_cache_that_is_off_makes_writes_durable() -> None:
    host = CommandHost()
    host.write(0, PATTERN)
    host.write(0, PATTERN, cdw12=FUA)
    host.must(host.set_feature(Feature.VOLATILE_WRITE_CACHE, 0))
    host.write(0, PATTERN)
    host.io(Nvm.WRITE_ZEROES)
    writes = [r.fua for r in host.disk.requests if r.operation in {Operation.WRITE, Operation.WRITE_ZEROES}]
    assert writes == [False, True, True, True]


def test_flush_reaches_one_disk_or_all_that_can_be_written() -> None:
    disks = {"a": Disk(), "b": Disk(), "c": Disk(read_only=True)}
    host = CommandHost(*(namespace(drive) for drive in disks), disks=disks)
    host.must(host.io(Nvm.FLUSH, 2))
    assert [disk.operations for disk in disks.values()] == [[], [Operation.FLUSH], []]
    host.must(host.io(Nvm.FLUSH, 0xFFFF_FFFF))
    assert [len(disk.requests) for disk in disks.values()] == [1, 2, 0]
    host.must(host.io(Nvm.FLUSH, 3))


def test_writes_to_a_read_only_namespace_are_refused() -> None:
    host = CommandHost(disks={"d0": Disk(read_only=True)})
    deallocate = {"data": DSM_RANGE.pack(0, 1, 0), "cdw11": 4}
    assert host.write(0, PATTERN).status == Status.WRITE_PROTECTED
    assert host.io(Nvm.WRITE_ZEROES).status == Status.WRITE_PROTECTED
    assert host.io(Nvm.DATASET_MANAGEMENT, **deallocate).status == Status.WRITE_PROTECTED  # type: ignore[arg-type]
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(0, 0)).status == Status.WRITE_PROTECTED
    assert host.read(0, 1).status == Status.SUCCESS
    assert host.disk.operations == [Operation.READ]


def test_write_zeroes_knows_no_mdts_and_may_deallocate() -> None:
    host = CommandHost(mdts=1)
    host.disk.data[:] = b"\xff" * len(host.disk.data)
    host.must(host.io(Nvm.WRITE_ZEROES, cdw10=1, cdw12=999))
    host.must(host.io(Nvm.WRITE_ZEROES, cdw10=1, cdw12=DEAC))
    first, second = host.disk.requests
    assert (first.offset, first.length, first.may_unmap, second.may_unmap) == (512, 512_000, False, True)
    assert host.disk.data.count(0) == 512_000
    assert host.io(Nvm.WRITE_ZEROES, cdw10=2040, cdw12=8).status == Status.LBA_OUT_OF_RANGE


def test_dataset_management_deallocates_all_its_ranges_at_once() -> None:
    host = CommandHost()
    host.disk.data[:] = b"\xff" * len(host.disk.data)
    ranges = b"".join(DSM_RANGE.pack(0, 1, 2 * index) for index in range(256))
    host.must(host.io(Nvm.DATASET_MANAGEMENT, data=ranges, cdw10=255, cdw11=4))
    assert host.disk.operations == [Operation.DISCARD] * 256
    assert host.disk.data[:1024] == bytes(512) + b"\xff" * 512
    assert host.disk.data.count(0) == 256 * 512


def test_dataset_management_checks_every_range_before_the_first() -> None:
    host = CommandHost()
    ranges = DSM_RANGE.pack(0, 1, 0) + DSM_RANGE.pack(0, 2, 2047)
    assert host.io(Nvm.DATASET_MANAGEMENT, data=ranges, cdw10=1, cdw11=4).status == Status.LBA_OUT_OF_RANGE
    assert host.disk.requests == []


def test_dataset_management_without_deallocate_or_of_nothing_succeeds() -> None:
    host = CommandHost()
    host.must(host.io(Nvm.DATASET_MANAGEMENT, data=DSM_RANGE.pack(0, 1, 0), cdw11=1))
    host.must(host.io(Nvm.DATASET_MANAGEMENT, data=DSM_RANGE.pack(0, 0, 0), cdw11=4))
    assert host.disk.requests == []


def test_compare_tells_equal_from_different() -> None:
    host = CommandHost()
    host.write(0, PATTERN)
    assert host.io(Nvm.COMPARE, data=PATTERN).status == Status.SUCCESS
    assert host.io(Nvm.COMPARE, data=PATTERN[:-1] + b"x").status == Status.COMPARE_FAILURE


def test_verify_reads_in_pieces_up_to_its_limit() -> None:
    host = CommandHost(disks={"d0": Disk(4 << 20)}, vsl=9)
    host.must(host.io(Nvm.VERIFY, cdw12=4095))
    assert [request.length for request in host.disk.requests] == [1 << 20, 1 << 20]
    assert host.io(Nvm.VERIFY, cdw12=4096).status == Status.INVALID_FIELD
    assert host.io(Nvm.VERIFY, cdw10=8191, cdw12=1).status == Status.LBA_OUT_OF_RANGE
    host.disk.fail[Operation.READ] = errno.EIO
    assert host.io(Nvm.VERIFY).status == Status.UNRECOVERED_READ_ERROR


def test_copy_gathers_its_sources_before_it_writes() -> None:
    host = CommandHost()
    host.disk.data[:1536] = b"a" * 512 + b"b" * 512 + b"c" * 512
    sources = COPY_RANGE.pack(1, 1) + COPY_RANGE.pack(0, 0)
    host.must(host.io(Nvm.COPY, data=sources, cdw10=1, cdw12=1 | FUA))
    assert host.disk.data[:2048] == b"a" * 512 + b"b" * 512 + b"c" * 512 + b"a" * 512
    assert host.disk.requests[-1].fua


def test_copy_limits() -> None:
    host = CommandHost(namespace(mssrl=4, mcl=6, msrc=1))
    limit = Status.COMMAND_SIZE_LIMIT_EXCEEDED
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(0, 4)).status == limit
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(0, 3) * 2, cdw12=1).status == limit
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(0, 0) * 3, cdw12=2).status == limit
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(0, 0), cdw12=1 << 8).status == Status.INVALID_FIELD
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(2048, 0)).status == Status.LBA_OUT_OF_RANGE
    assert host.io(Nvm.COPY, data=COPY_RANGE.pack(0, 0), cdw10=2048).status == Status.LBA_OUT_OF_RANGE
    assert host.disk.requests == []


@pytest.mark.parametrize(
    ("operation", "number", "status"),
    [
        (Operation.READ, errno.EIO, Status.UNRECOVERED_READ_ERROR),
        (Operation.WRITE, errno.EIO, Status.WRITE_FAULT),
        (Operation.FLUSH, errno.EIO, Status.WRITE_FAULT),
        (Operation.WRITE_ZEROES, errno.ENOSPC, Status.CAPACITY_EXCEEDED),
        (Operation.WRITE, errno.EDQUOT, Status.CAPACITY_EXCEEDED),
        (Operation.READ, errno.ENOSPC, Status.INTERNAL_ERROR),
        (Operation.DISCARD, errno.EROFS, Status.WRITE_PROTECTED),
        (Operation.WRITE, errno.EPERM, Status.INTERNAL_ERROR),
        (Operation.READ, errno.ENOMEM, Status.INTERNAL_ERROR),
    ],
)
def test_status_of_an_errno(operation: Operation, number: int, status: Status) -> None:
    assert failures.status_of(operation, number) == status


def test_a_failure_may_be_retried_and_is_in_the_error_log() -> None:
    host = CommandHost()
    host.disk.fail[Operation.WRITE] = errno.EIO
    answer = host.write(7, PATTERN)
    assert (answer.status, answer.dnr, answer.more) == (Status.WRITE_FAULT, False, True)
    entry = host.get_log(Log.ERROR_INFORMATION, 64).data
    count, sqid, cid, status, location, lba, nsid = struct.unpack_from("<QHHHHQI", entry)
    assert (count, sqid, location, lba, nsid) == (1, 1, 0xFFFF, 7, 1)
    assert cid == host.cid - 1
    assert status >> 1 & 0x7FF == Status.WRITE_FAULT
    assert host.controller.logs.smart.media_errors == 1


def test_the_first_of_many_failures_ends_the_command_once() -> None:
    host = CommandHost()
    host.disk.fail[Operation.DISCARD] = errno.EIO
    ranges = b"".join(DSM_RANGE.pack(0, 1, index) for index in range(64))
    assert host.io(Nvm.DATASET_MANAGEMENT, data=ranges, cdw10=63, cdw11=4).status == Status.WRITE_FAULT
    assert len(host.disk.requests) == 1
    assert host.controller.logs.errors.count == 1


def test_a_command_of_many_parts_ends_with_its_last() -> None:
    host = CommandHost()
    host.disk.hold = True
    host.ram.write(DATA, b"".join(DSM_RANGE.pack(0, 1, index) for index in range(20)))
    cid = host.start(1, Nvm.DATASET_MANAGEMENT, nsid=1, cdw10=19, cdw11=4)
    assert len(host.disk.held) == 16
    host.disk.finish(16)
    host.drain()
    assert not host.has_completed(cid)
    assert len(host.disk.held) == 4
    host.disk.finish()
    host.drain()
    assert host.completion(cid).status == Status.SUCCESS


def test_data_that_cannot_be_given_to_the_guest_is_a_transfer_error() -> None:
    host = CommandHost()
    host.ram.fails_on_finish = True
    assert host.read(0, 1).status == Status.DATA_TRANSFER_ERROR
    host.disk.fail[Operation.READ] = errno.EIO
    assert host.read(0, 1).status == Status.UNRECOVERED_READ_ERROR


def test_the_counters_count() -> None:
    host = CommandHost(disks={"d0": Disk(4 << 20)})
    host.must(host.read(0, 256))
    host.must(host.write(0, bytes(512 * 256)))
    host.must(host.write(0, bytes(512)))
    host.must(host.io(Nvm.COMPARE, data=bytes(512)))
    host.must(host.io(Nvm.VERIFY, cdw12=1023))
    host.must(host.io(Nvm.WRITE_ZEROES))
    page = host.get_log(Log.SMART, 512).data
    read, written, reads, writes = (int.from_bytes(page[offset : offset + 16], "little") for offset in (32, 48, 64, 80))
    assert (read, written, reads, writes) == (2, 1, 2, 2)


def test_a_bug_in_a_completion_is_an_internal_error_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host = CommandHost()

    def broken(_length: int) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(host.controller.logs.smart, "count_read", broken)
    answer = host.read(0, 1)
    assert (answer.status, answer.dnr) == (Status.INTERNAL_ERROR, False)
    assert "failed inside nvmove" in caplog.text


def test_a_reset_ends_a_command_of_many_parts_early_and_without_a_trace() -> None:
    host = CommandHost()
    host.disk.hold = True
    host.ram.write(DATA, COPY_RANGE.pack(0, 0))
    copy = host.start(1, Nvm.COPY, nsid=1, cdw10=100)
    host.disable()
    host.disk.finish()
    host.drain()
    assert host.disk.operations == [Operation.READ]
    assert not host.has_completed(copy)
    assert host.controller.logs.errors.count == 0


def test_an_error_entry_says_what_was_wrong_where() -> None:
    host = CommandHost()
    host.read(5000, 1)
    entry = host.get_log(Log.ERROR_INFORMATION, 64).data
    status, location, lba = struct.unpack_from("<HHQ", entry, 12)
    assert (status >> 1 & 0x7FF, location, lba) == (Status.LBA_OUT_OF_RANGE, 40, 5000)
