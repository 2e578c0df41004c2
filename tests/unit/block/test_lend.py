"""What a raw image says when it is lent: what flushes do, how zeroes are made and space is given back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nvmove.block import linux
from nvmove.block.backend import Operation
from nvmove.block.config import NullConfig, OpenOptions
from nvmove.block.fault import FaultRules, FaultyBackend
from nvmove.block.lend import ASK, NO_SPACE, NOTHING, LentSpace
from nvmove.block.null import NullBackend
from nvmove.block.raw.backend import RawBackend, open_raw
from nvmove.block.raw.space import DeviceSpace
from nvmove.block.transfer import FileTransfer
from tests.block_helpers import do, image

ZERO = linux.FALLOC_FL_ZERO_RANGE | linux.FALLOC_FL_KEEP_SIZE
PUNCH = linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE


def opened(tmp_path: Path, **options: object) -> RawBackend:
    return open_raw(str(image(tmp_path / "disk.img")), options=OpenOptions(**options))  # type: ignore[arg-type]


def revoke() -> None:
    pass


@pytest.mark.parametrize(
    ("options", "syncs", "durable", "writable"),
    [
        ({}, True, False, True),
        ({"writeback": False}, True, True, True),
        ({"no_flush": True}, False, False, True),
        ({"no_flush": True, "writeback": False}, False, True, True),
        ({"read_only": True}, False, False, False),
    ],
)
def test_a_lent_image_says_what_a_flush_does_and_which_writes_are_durable(
    tmp_path: Path, options: dict[str, bool], syncs: bool, durable: bool, writable: bool
) -> None:
    disk = opened(tmp_path, **options)
    file = disk.lend(revoke)
    assert file is not None
    assert (file.syncs, file.durable, file.writable) == (syncs, durable, writable)
    file.release()
    disk.close()


def test_rules_for_faults_lend_the_image_as_it_is(tmp_path: Path) -> None:
    disk = opened(tmp_path, writeback=False, discard="unmap")
    one, other = disk.lend(revoke), FaultyBackend(disk, FaultRules(), ["d0"]).lend(lambda: None)
    assert one is not None
    assert other is not None
    for name in ("fd", "writable", "syncs", "durable", "space", "zeroes", "alignment"):
        assert getattr(one, name) == getattr(other, name)
    one.release()
    other.release()
    disk.close()


def test_a_null_disk_has_nothing_to_flush_and_no_space() -> None:
    file = NullBackend(NullConfig(), OpenOptions()).lend(revoke)
    assert file is not None
    assert (file.syncs, file.durable, file.space) == (False, False, NO_SPACE)


def space(disk: RawBackend) -> LentSpace:
    file = disk.lend(revoke)
    assert file is not None
    file.release()
    return file.space


def test_space_is_given_back_only_where_it_may_be(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    assert space(disk) == (ZERO, ZERO, NOTHING)
    disk.close()
    disk = opened(tmp_path, discard="unmap")
    assert space(disk) == (ZERO, PUNCH, PUNCH)
    disk.close()


def test_what_a_filesystem_turned_out_not_to_have_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: set[int] = set()

    def fallocate(_fd: int, mode: int, _offset: int, _length: int) -> None:
        missing.add(mode)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(linux, "fallocate", fallocate)
    disk = opened(tmp_path, discard="unmap")
    assert do(disk, Operation.WRITE_ZEROES, 0, 512) == 0
    assert space(disk) == (ASK, PUNCH, PUNCH)
    assert do(disk, Operation.DISCARD, 0, 512) == 0
    assert space(disk) == (ASK, ASK, NOTHING)
    assert missing == {ZERO, PUNCH}
    disk.close()


def test_a_block_device_is_zeroed_as_a_file_and_discards_are_its_own() -> None:
    def lent(unmap: bool, *missing: int) -> LentSpace:
        found = DeviceSpace(-1, FileTransfer(-1), unmap)
        found._missing.update(missing)
        return found.lent

    assert lent(False) == (ZERO, ZERO, NOTHING)
    assert lent(True) == (ZERO, PUNCH, ASK)
    assert lent(True, linux.BLKDISCARD) == (ZERO, PUNCH, NOTHING)
    assert lent(True, linux.FALLOC_FL_PUNCH_HOLE) == (ZERO, ZERO, ASK)
    assert lent(True, linux.BLKZEROOUT) == (ASK, PUNCH, ASK)
    assert lent(False, linux.BLKZEROOUT) == (ASK, ASK, NOTHING)
