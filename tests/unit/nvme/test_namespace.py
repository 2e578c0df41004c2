"""Namespaces, attachment, Format NVM, resize."""

from __future__ import annotations

import errno
import struct

import pytest

from nvmove.block.backend import Operation
from nvmove.nvme.commands import management
from nvmove.nvme.commands.batch import Batch, Failure, Part
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.namespace import Namespace, NamespaceTable
from nvmove.nvme.spec import Admin, Cns, Nvm, Status
from tests.disk import Disk
from tests.nvme_commands import CommandHost, namespace
from tests.nvme_host import Completion

ONE_CONTROLLER = struct.pack("<HH", 1, 0).ljust(4096, b"\0")
ATTACH, DETACH = 0, 1


def table(*nsids: int) -> list[int]:
    config = ControllerConfig(serial="x", namespaces=tuple(namespace(nsid=nsid) for nsid in nsids))
    return [entry.nsid for entry in NamespaceTable(config, {"d0": Disk()})]


def test_namespaces_without_an_id_get_the_first_free_ones() -> None:
    assert table(0, 2, 0, 1) == [1, 2, 3, 4]
    assert len(table(*(0,) * 256)) == 256


@pytest.mark.parametrize("nsids", [(257,), (-1,), (3, 3), (0,) * 257])
def test_impossible_ids_are_named(nsids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="namespace"):
        table(*nsids)


def test_a_rest_that_is_no_whole_block_is_not_used() -> None:
    assert Namespace(1, namespace(), Disk(1024 + 511)).blocks == 2


def test_a_namespace_travels_without_its_disk() -> None:
    host = CommandHost(namespace(nsid=4))
    ours = host.controller.namespaces.require_active(4)
    ours.format_index, ours.attached, ours.error_recovery = 4, False, 9
    saved = ours.save()
    assert (saved.block_shift, saved.blocks, saved.read_only) == (12, 256, False)
    other = Namespace(4, namespace(nsid=4), Disk())
    other.load(saved)
    assert other.save() == saved


def test_detaching_takes_a_namespace_away_and_attaching_brings_it_back() -> None:
    host = CommandHost(namespace(), namespace())

    def attachment(select: int) -> Completion:
        return host.transfer(0, Admin.NAMESPACE_ATTACHMENT, nsid=2, cdw10=select, data=ONE_CONTROLLER)

    host.must(attachment(DETACH))
    assert host.controller.logs.changed == {2}
    assert host.read(0, 1, 2).status == Status.INVALID_FIELD
    assert host.identify(Cns.NAMESPACE, 2).data == bytes(4096)
    assert attachment(DETACH).status == Status.NAMESPACE_NOT_ATTACHED
    host.must(attachment(ATTACH))
    assert host.read(0, 1, 2).status == Status.SUCCESS
    assert attachment(ATTACH).status == Status.NAMESPACE_ALREADY_ATTACHED


@pytest.mark.parametrize(
    ("nsid", "select", "entries", "status"),
    [
        (0, ATTACH, (1, 0), Status.INVALID_NAMESPACE),
        (0xFFFF_FFFF, ATTACH, (1, 0), Status.INVALID_NAMESPACE),
        (9, ATTACH, (1, 0), Status.INVALID_FIELD),
        (1, 2, (1, 0), Status.INVALID_FIELD),
        (1, DETACH, (0, 0), Status.CONTROLLER_LIST_INVALID),
        (1, DETACH, (1, 1), Status.CONTROLLER_LIST_INVALID),
        (1, DETACH, (2048, 0), Status.CONTROLLER_LIST_INVALID),
    ],
)
def test_wrong_attachments(nsid: int, select: int, entries: tuple[int, int], status: Status) -> None:
    host = CommandHost()
    data = struct.pack("<HH", *entries).ljust(4096, b"\0")
    assert host.transfer(0, Admin.NAMESPACE_ATTACHMENT, nsid=nsid, cdw10=select, data=data).status == status
    assert host.controller.namespaces.require_active(1).attached


def test_format_erases_and_changes_the_block_size() -> None:
    host = CommandHost()
    host.write(0, b"x" * 512)
    host.must(host.admin(Admin.FORMAT_NVM, nsid=1, cdw10=4))
    identified = host.identify(Cns.NAMESPACE, 1).data
    assert (struct.unpack_from("<Q", identified), identified[26]) == ((256,), 4)
    assert host.read(0, 1, block=4096).data == bytes(4096)
    assert host.read(256, 1, block=4096).status == Status.LBA_OUT_OF_RANGE
    assert host.controller.logs.changed == {1}


def test_format_to_the_same_size_is_no_change_but_erases_everything() -> None:
    host = CommandHost(disks={"d0": Disk(512 * 3)})
    host.write(0, b"x" * 1536)
    host.must(host.admin(Admin.FORMAT_NVM, nsid=0xFFFF_FFFF, cdw10=1 << 9))
    assert host.disk.data == bytes(1536)
    assert host.controller.logs.changed == set()


def test_format_goes_over_a_large_disk_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "ERASE_CHUNK", 1 << 19)
    host = CommandHost(disks={"d0": Disk((1 << 20) + 512)})
    host.must(host.admin(Admin.FORMAT_NVM, nsid=1))
    assert [(r.offset, r.length) for r in host.disk.requests] == [(0, 1 << 19), (1 << 19, 1 << 19), (1 << 20, 512)]


@pytest.mark.parametrize(
    ("nsid", "cdw10", "status"),
    [
        (1, 1, Status.INVALID_FORMAT),
        (1, 9, Status.INVALID_FORMAT),
        (1, 1 << 12, Status.INVALID_FORMAT),
        (1, 1 << 4, Status.INVALID_FORMAT),
        (1, 1 << 5, Status.INVALID_FORMAT),
        (1, 2 << 9, Status.INVALID_FIELD),
        (5, 0, Status.INVALID_FIELD),
        (0, 0, Status.INVALID_NAMESPACE),
        (2, 0, Status.WRITE_PROTECTED),
    ],
)
def test_a_format_that_cannot_be(nsid: int, cdw10: int, status: Status) -> None:
    disks = {"a": Disk(), "b": Disk(read_only=True)}
    host = CommandHost(namespace("a"), namespace("b"), disks=disks)
    assert host.admin(Admin.FORMAT_NVM, nsid=nsid, cdw10=cdw10).status == status
    assert disks["a"].requests == []


def test_io_waits_until_a_format_is_over() -> None:
    host = CommandHost()
    host.disk.hold = True
    cid = host.start(0, Admin.FORMAT_NVM, nsid=1)
    answer = host.read(0, 1)
    assert (answer.status, answer.dnr) == (Status.FORMAT_IN_PROGRESS, False)
    second = host.start(0, Admin.FORMAT_NVM, nsid=1)
    assert host.completion(second).status == Status.FORMAT_IN_PROGRESS
    host.disk.hold = False
    host.disk.finish()
    host.drain()
    assert host.completion(cid).status == Status.SUCCESS
    assert host.read(0, 1).status == Status.SUCCESS


def test_a_format_that_fails_keeps_the_block_size() -> None:
    host = CommandHost()
    host.disk.fail[Operation.WRITE_ZEROES] = errno.EIO
    assert host.admin(Admin.FORMAT_NVM, nsid=1, cdw10=4).status == Status.WRITE_FAULT
    assert host.read(0, 1).status == Status.SUCCESS
    assert host.controller.namespaces.require_active(1).block_size == 512


def test_a_resized_disk_is_a_changed_namespace() -> None:
    host = CommandHost()
    assert not management.resized(host.controller, 1)
    assert not management.resized(host.controller, 2)
    host.disk.actual_size = 2 << 20
    assert management.resized(host.controller, 1)
    assert host.controller.logs.changed == {1}
    assert host.read(4095, 1).status == Status.SUCCESS
    host.must(host.io(Nvm.FLUSH))


def test_a_batch_ends_once_whatever_the_order_of_its_answers() -> None:
    disk = Disk()
    disk.hold = True
    ends: list[Failure | None] = []
    Batch((Part(disk, Operation.DISCARD, index * 512, 512) for index in range(5)), ends.append, depth=2).start()
    while disk.held:
        assert len(disk.held) <= 2
        disk.held.reverse()
        disk.fail = {Operation.DISCARD: errno.ENOSPC} if len(disk.requests) == 4 else {}
        disk.finish(1)
    assert len(ends) == 1
    assert ends[0] is not None
    assert (ends[0].operation, ends[0].errno) == (Operation.DISCARD, errno.ENOSPC)


def test_an_empty_batch_ends_at_once() -> None:
    ends: list[Failure | None] = []
    Batch((), ends.append).start()
    assert ends == [None]


def test_a_reset_ends_a_format_after_the_piece_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "ERASE_CHUNK", 1 << 18)
    host = CommandHost()
    host.disk.hold = True
    host.start(0, Admin.FORMAT_NVM, nsid=1, cdw10=4)
    host.disable()
    host.disk.finish()
    host.drain()
    assert len(host.disk.requests) == 1
    namespace = host.controller.namespaces.require_active(1)
    assert (namespace.block_size, namespace.formatting) == (512, False)
