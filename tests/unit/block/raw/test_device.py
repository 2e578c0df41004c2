"""Block devices: on a loop device where this machine lets us have one, and their calls one by one."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvmove.block import linux
from nvmove.block.backend import BackendError, Operation
from nvmove.block.config import OpenOptions
from nvmove.block.raw.backend import open_raw
from nvmove.block.raw.space import DeviceSpace
from nvmove.block.transfer import FileTransfer
from tests.block_helpers import MIB, allocated, do, image, read, write


@contextlib.contextmanager
def loop_device(path: Path, *arguments: str) -> Iterator[str]:
    """A loop device, which the kernel takes away when its last user goes, however that happens."""
    try:
        command = ["losetup", "--find", "--show", *arguments, str(path)]
        name = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine gives us no loop device")
    user = os.open(name, os.O_RDONLY)
    subprocess.run(["losetup", "--detach", name], check=True, timeout=30)  # takes effect on the last close
    try:
        yield name
    finally:
        os.close(user)


@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device_is_a_disk(tmp_path: Path, direct: bool) -> None:
    path = image(tmp_path / "disk.img")
    expected = bytearray(path.read_bytes())
    with loop_device(path, "--sector-size", "4096") as name:
        disk = open_raw(name, options=OpenOptions(direct=direct, discard="unmap"))
        assert disk.size == MIB
        assert disk.request_alignment == (4096 if direct else 1)
        assert write(disk, 512, b"x" * 512, fua=True) == 0
        expected[512:1024] = b"x" * 512
        for offset in (4096, 512 * 1001):  # the second is no multiple of the device's block
            assert do(disk, Operation.WRITE_ZEROES, offset, 8192) == 0
            expected[offset : offset + 8192] = bytes(8192)
        assert do(disk, Operation.WRITE_ZEROES, 65536, 8192, may_unmap=True) == 0
        expected[65536 : 65536 + 8192] = bytes(8192)
        assert do(disk, Operation.FLUSH) == 0
        assert read(disk, 0, MIB) == expected
        assert do(disk, Operation.DISCARD, MIB // 2, MIB // 2) == 0
        assert do(disk, Operation.DISCARD, 512, 512) == 0, "too small to discard"
        assert read(disk, 0, MIB // 2) == expected[: MIB // 2]
        disk.close()
    assert allocated(path) <= MIB // 2


def test_a_block_device_in_use_is_refused(tmp_path: Path) -> None:
    with loop_device(image(tmp_path / "disk.img")) as name:
        disk = open_raw(name)
        with pytest.raises(BackendError, match='Failed to get "write" lock'):
            open_raw(name)
        disk.close()


def test_a_read_only_device_says_what_to_do(tmp_path: Path) -> None:
    with loop_device(image(tmp_path / "disk.img"), "--read-only") as name:
        with pytest.raises(BackendError, match=r"\(readonly=on needs no right to write\)"):
            open_raw(name)
        disk = open_raw(name, options=OpenOptions(read_only=True))
        assert disk.size == MIB
        disk.close()


def test_zeroes_and_holes_are_the_devices_own_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(linux, "block_device_range", lambda fd, call, at, count: seen.append((call, at, count)))
    monkeypatch.setattr(linux, "fallocate", lambda fd, mode, at, count: seen.append((mode, at, count)))
    space = DeviceSpace(0, FileTransfer(0), unmap=True)
    space.write_zeroes(0, 4096, may_unmap=False)
    space.write_zeroes(0, 4096, may_unmap=True)
    space.discard(4096, 8192)
    punch = linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE
    assert seen == [(linux.BLKZEROOUT, 0, 4096), (punch, 0, 4096), (linux.BLKDISCARD, 4096, 8192)]


def test_a_size_that_cannot_be_read_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_raw(str(image(tmp_path / "disk.img")))

    def gone(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", gone)
        assert disk.refresh_size() == MIB
    disk.close()


def test_fallocate_says_why_it_failed() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match=os.strerror(errno.ESPIPE)):
        linux.fallocate(writing, 0, 0, 1)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
        linux.block_device_size(writing)
    os.close(reading)
    os.close(writing)


def test_a_flush_that_fails_at_the_end_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = open_raw(str(image(tmp_path / "disk.img")))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    assert do(disk, Operation.FLUSH) == errno.EIO
    disk.close()
    assert caplog.messages[-1] == f"'{tmp_path}/disk.img' cannot be flushed: Input/output error"
