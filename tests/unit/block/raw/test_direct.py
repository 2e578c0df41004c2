"""Raw images with O_DIRECT: what is not aligned arrives all the same, and nothing beside it changes."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nvmove.block import linux
from nvmove.block.backend import Operation
from nvmove.block.config import OpenOptions
from nvmove.block.raw import direct
from nvmove.block.raw.backend import RawBackend, open_raw
from nvmove.block.raw.direct import BusyRanges
from tests.block_helpers import KIB, MIB, aligned, do, image, read, start, write

DIRECT = OpenOptions(direct=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.img")


@pytest.fixture(params=[512, 4096])
def disk(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> RawBackend:
    """A disk with O_DIRECT on a device of 512- and of 4096-byte blocks."""
    real = linux.direct_alignment
    monkeypatch.setattr(direct, "direct_alignment", lambda fd: max(real(fd), request.param))
    backend = open_raw(str(path), options=DIRECT)
    request.addfinalizer(backend.close)
    return backend


def test_direct_images_say_what_they_align_to(path: Path) -> None:
    disk = open_raw(str(path), options=DIRECT)
    assert disk.request_alignment in (512, 1024, 2048, 4096)
    disk.close()
    buffered = open_raw(str(path))
    assert buffered.request_alignment == 1
    buffered.close()


def test_guest_pages_are_used_as_they_are(disk: RawBackend, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_page_aligned", None)  # no copy may be made
    memory = aligned(16 * KIB)
    pieces = [memory[8 * KIB :], memory[: 8 * KIB]]
    assert start(disk, Operation.READ, 4096, 16 * KIB, pieces).wait() == 0
    assert b"".join(pieces) == path.read_bytes()[4096 : 20 * KIB]
    assert start(disk, Operation.WRITE, 0, 16 * KIB, pieces).wait() == 0


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (512, 512), (512, 4096), (3584, 1024), (7, 3), (4095, 2), (100, 9000), (MIB - 512, 512), (MIB - 1, 1)],
)
def test_what_is_not_aligned_arrives_alone(disk: RawBackend, path: Path, offset: int, length: int) -> None:
    expected = bytearray(path.read_bytes())
    assert read(disk, offset, length) == expected[offset : offset + length]
    data = os.urandom(length)
    expected[offset : offset + length] = data
    assert write(disk, offset, data, fua=True) == 0
    assert path.read_bytes() == expected


def test_read_only_memory_is_written_from(disk: RawBackend) -> None:
    data = os.urandom(4096)
    assert start(disk, Operation.WRITE, 4096, 4096, [memoryview(data)]).wait() == 0
    assert read(disk, 4096, 4096) == data


@pytest.mark.parametrize("size", [700, 512 * 9, 8192 + 100])
def test_an_odd_file_does_not_grow_past_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(direct, "direct_alignment", lambda fd: 4096)
    path = image(tmp_path / "odd.img", size)
    before = path.read_bytes()
    disk = open_raw(str(path), options=DIRECT)
    rounded = disk.size
    assert rounded == (size + 511) // 512 * 512
    assert read(disk, 0, rounded) == before + bytes(rounded - size)
    memory = aligned(16 * KIB)[:rounded]
    memory[:] = b"\xff" * rounded
    assert start(disk, Operation.READ, 0, rounded, [memory]).wait() == 0
    assert bytes(memory) == before + bytes(rounded - size)
    assert write(disk, 0, b"x" * 100) == 0
    assert path.read_bytes() == b"x" * 100 + before[100:]
    assert write(disk, rounded - 512, b"y" * 512) == 0
    assert path.stat().st_size == rounded
    assert path.read_bytes()[-512:] == b"y" * 512
    disk.close()


def test_a_probe_that_saw_too_little_is_mended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file that begins with a hole, on a disk of 4096-byte blocks."""
    monkeypatch.setattr(direct, "direct_alignment", lambda fd: 512)
    disk = open_raw(str(path), options=DIRECT)
    real_read, real_write = os.preadv, os.pwritev

    def refuse(buffers: list[memoryview], offset: int) -> None:
        if offset % 4096 or any(len(buffer) % 4096 for buffer in buffers):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def strict_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        refuse(buffers, offset)
        return real_read(fd, buffers, offset)

    def strict_write(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        refuse(buffers, offset)
        return real_write(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", strict_read)
    monkeypatch.setattr(os, "pwritev", strict_write)
    expected = bytearray(path.read_bytes())
    expected[512:1024] = b"w" * 512
    assert write(disk, 512, b"w" * 512) == 0
    assert disk.request_alignment == 4096
    assert read(disk, 0, 8192) == expected[:8192]
    disk.close()
    assert path.read_bytes() == expected


def test_einval_that_alignment_does_not_mend_comes_out(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwritev", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    assert write(disk, 0, b"w" * 4096) == errno.EINVAL
    into = [memoryview(bytearray(512))]
    assert start(disk, Operation.READ, 0, 512, into).wait() == errno.EINVAL


def test_the_probe_finds_the_smallest_that_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(alignment: int) -> Callable[[int, list[memoryview], int], int]:
        def strict(fd: int, buffers: list[memoryview], offset: int) -> int:
            if offset % alignment or len(buffers[0]) % alignment:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return 0

        return strict

    for alignment in (512, 1024, 4096):
        monkeypatch.setattr(os, "preadv", of(alignment))
        assert linux.direct_alignment(0) == alignment

    def bad_sector(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", bad_sector)
    assert linux.direct_alignment(0) == 512


def test_writes_to_parts_of_one_block_at_once_lose_nothing(disk: RawBackend, path: Path) -> None:
    """Four threads, each on its own 512 bytes of every 2 KiB, so that all share blocks of 4096."""

    def hammer(lane: int) -> None:
        for turn in range(40):
            write(disk, (turn % 8) * 2048 + lane * 512 + 1, bytes([lane * 50 + turn]) * 500)

    threads = [threading.Thread(target=hammer, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stored = path.read_bytes()
    for lane in range(4):
        for slot in range(8):
            at = slot * 2048 + lane * 512 + 1
            assert stored[at : at + 500] == bytes([lane * 50 + 32 + slot]) * 500


def test_zeroes_and_writes_mix(disk: RawBackend, path: Path) -> None:
    expected = bytearray(path.read_bytes())
    random.seed(1)
    for _ in range(30):
        offset = random.randrange(0, 64 * KIB, 512)
        expected[offset : offset + 3000] = bytes(3000)
        assert do(disk, Operation.WRITE_ZEROES, offset, 3000) == 0
        expected[offset + 512 : offset + 1024] = b"z" * 512
        assert write(disk, offset + 512, b"z" * 512) == 0
    assert path.read_bytes() == expected


def test_zeroes_without_fallocate_do_not_wait_for_themselves(
    disk: RawBackend, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(linux, "fallocate", unsupported)
    expected = bytearray(path.read_bytes())
    expected[513:5000] = bytes(5000 - 513)
    assert do(disk, Operation.WRITE_ZEROES, 513, 5000 - 513) == 0
    assert path.read_bytes() == expected


def test_a_read_modify_write_waits_for_a_write_of_its_block() -> None:
    busy = BusyRanges()
    order: list[str] = []
    waiting = threading.Event()

    def later() -> None:
        waiting.set()
        with busy.claim(0, 4096, alone=True):
            order.append("read-modify-write")

    thread = threading.Thread(target=later)
    with busy.claim(512, 1024, alone=False), busy.claim(512, 1024, alone=False), busy.claim(4096, 8192, alone=True):
        thread.start()
        assert waiting.wait(20)
        order.append("write")
    thread.join(20)
    assert order == ["write", "read-modify-write"]
