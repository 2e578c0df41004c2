"""Raw images through the page cache: every operation, every cache mode, every mistake."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvmove.block import linux
from nvmove.block.backend import BackendError, Operation
from nvmove.block.config import OpenOptions
from nvmove.block.raw.backend import RawBackend, open_raw
from tests.block_helpers import KIB, MIB, aligned, allocated, do, image, read, start, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.img")


@pytest.fixture
def disk(path: Path) -> Iterator[RawBackend]:
    backend = open_raw(str(path))
    yield backend
    backend.close()


def calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, tuple[object, ...]]]:
    """Record calls of functions of `os`, which still do their work."""
    seen: list[tuple[str, tuple[object, ...]]] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def recorded(*arguments: object) -> object:
            seen.append((name, arguments))
            return real(*arguments)

        monkeypatch.setattr(os, name, recorded)

    for name in names:
        watch(name)
    return seen


def test_what_is_written_is_read(disk: RawBackend, path: Path) -> None:
    assert write(disk, 4096, b"x" * 512) == 0
    assert read(disk, 4096, 512) == b"x" * 512
    assert path.read_bytes()[4096:4608] == b"x" * 512


def test_data_goes_straight_into_scattered_memory(disk: RawBackend, path: Path) -> None:
    memory = aligned(3 * 4096)
    pieces = [memory[8192:], memory[:4096], memory[4096:4608]]
    assert start(disk, Operation.READ, 1024, 8704, pieces).wait() == 0
    expected = path.read_bytes()[1024 : 1024 + 8704]
    assert b"".join(pieces) == expected


def test_more_buffers_than_one_system_call_takes(disk: RawBackend, path: Path) -> None:
    count = 2 * linux.IOV_MAX + 3
    memory = aligned(count * 16)
    pieces = [memory[i * 16 : (i + 1) * 16] for i in range(count)]
    assert start(disk, Operation.READ, 512, count * 16, pieces).wait() == 0
    assert bytes(memory[: count * 16]) == path.read_bytes()[512 : 512 + count * 16]
    assert start(disk, Operation.WRITE, 0, count * 16, pieces).wait() == 0
    assert path.read_bytes()[: count * 16] == bytes(memory[: count * 16])


def test_short_transfers_are_continued(disk: RawBackend, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_read, real_write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:100]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset, flags: real_write(fd, [buffers[0][:70]], offset))
    data = os.urandom(1024)
    assert start(disk, Operation.WRITE, 512, 1024, [memoryview(data)[:300], memoryview(data)[300:]]).wait() == 0
    into = [memoryview(bytearray(600)), memoryview(bytearray(0)), memoryview(bytearray(424))]
    assert start(disk, Operation.READ, 512, 1024, into).wait() == 0
    assert b"".join(into) == data
    assert path.read_bytes()[512:1536] == data


def test_an_odd_file_ends_in_zeroes(tmp_path: Path) -> None:
    path = image(tmp_path / "odd.img", 700)
    before = path.read_bytes()
    disk = open_raw(str(path))
    assert disk.size == 1024
    into = [memoryview(bytearray(b"\xff" * 600)), memoryview(bytearray(b"\xff" * 424))]
    assert start(disk, Operation.READ, 0, 1024, into).wait() == 0
    assert b"".join(into) == before + bytes(324)
    assert write(disk, 512, b"y" * 512) == 0
    assert path.read_bytes() == before[:512] + b"y" * 512
    disk.close()


def test_outside_the_image_is_eio(disk: RawBackend) -> None:
    assert write(disk, MIB, b"x" * 512) == errno.EIO
    assert do(disk, Operation.DISCARD, MIB - 512, 1024) == errno.EIO
    assert start(disk, Operation.READ, MIB, 1, [memoryview(bytearray(1))]).wait() == errno.EIO
    assert do(disk, Operation.WRITE_ZEROES, -512, 512) == errno.EIO
    assert disk.size == MIB


def test_requests_of_no_length_succeed(disk: RawBackend) -> None:
    for operation in Operation:
        assert do(disk, operation, 512, 0) == 0


def test_flush_is_fdatasync(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, "fdatasync")
    assert do(disk, Operation.FLUSH) == 0
    assert [name for name, _ in seen] == ["fdatasync"]


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the next call of a function of `os` fail with EIO, and no other: Linux tells of lost pages once."""
    real = getattr(os, name)

    def failing(*_arguments: object) -> object:
        monkeypatch.setattr(os, name, real)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, failing)


def test_after_a_flush_that_failed_none_succeeds(
    disk: RawBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A retry would be told that all is well, and the guest with it, though written pages are gone."""
    fail_once(monkeypatch, "fdatasync")
    assert [do(disk, Operation.FLUSH) for _ in range(3)] == [errno.EIO] * 3
    assert write(disk, 0, b"x" * 512) == 0
    assert len(caplog.messages) == 1
    assert "what was written before may be lost" in caplog.text


def test_after_a_durable_write_that_failed_no_flush_succeeds(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, "pwritev")
    assert write(disk, 0, b"x" * 512, fua=True) == errno.EIO
    assert do(disk, Operation.FLUSH) == errno.EIO


def test_a_sync_that_failed_where_the_file_was_lent_is_one_that_failed(disk: RawBackend) -> None:
    revoked: list[int] = []
    lent = disk.lend(lambda: revoked.append(1))
    assert lent is not None
    disk.sync_failed(errno.EIO)
    assert revoked == [1]
    assert disk.lend(lambda: None) is None
    assert do(disk, Operation.FLUSH) == errno.EIO
    lent.release()


def test_a_write_that_failed_keeps_no_flush_from_succeeding(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, "pwritev")
    assert write(disk, 0, b"x" * 512) == errno.EIO
    assert do(disk, Operation.FLUSH) == 0


def test_an_image_that_cannot_be_flushed_is_not_handed_over(
    disk: RawBackend, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write(disk, 0, b"x" * 512) == 0
    fail_once(monkeypatch, "fdatasync")
    with pytest.raises(BackendError, match=f"'{path}' cannot be flushed, and not be handed over: Input/output error"):
        disk.inactivate()
    assert write(disk, 0, b"y" * 512) == 0
    with pytest.raises(BackendError, match="lock"):
        open_raw(str(path))


def test_the_size_of_an_image_that_is_another_hosts_is_looked_at_each_time(disk: RawBackend, path: Path) -> None:
    """A destination waits with the image open while the source resizes it."""
    disk.inactivate()
    os.truncate(path, 2 * MIB)
    assert disk.size == 2 * MIB
    disk.activate()
    assert write(disk, 2 * MIB - 512, b"x" * 512) == 0


def test_fua_is_one_system_call(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, "fdatasync", "pwritev")
    assert write(disk, 0, b"x" * 512, fua=True) == 0
    assert [(name, arguments[3]) for name, arguments in seen] == [("pwritev", os.RWF_DSYNC)]


def test_fua_without_dsync_syncs_after(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def without_dsync(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", without_dsync)
    seen = calls(monkeypatch, "fdatasync")
    assert write(disk, 0, b"x" * 512, fua=True) == 0
    assert write(disk, 512, b"y" * 512, fua=True) == 0
    assert len(seen) == 2
    assert read(disk, 0, 1024) == b"x" * 512 + b"y" * 512


def test_writethrough_makes_every_write_stable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_raw(str(path), options=OpenOptions(writeback=False))
    seen = calls(monkeypatch, "pwritev", "fdatasync")
    assert write(disk, 0, b"x" * 512) == 0
    assert do(disk, Operation.WRITE_ZEROES, 0, 512) == 0
    assert [name for name, _ in seen] == ["pwritev", "fdatasync"]
    assert seen[0][1][3] == os.RWF_DSYNC
    disk.close()


def test_unsafe_never_syncs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_raw(str(path), options=OpenOptions(no_flush=True))
    seen = calls(monkeypatch, "pwritev", "fdatasync")
    assert write(disk, 0, b"x" * 512, fua=True) == 0
    assert do(disk, Operation.FLUSH) == 0
    disk.close()
    assert [(name, arguments[3:]) for name, arguments in seen] == [("pwritev", (0,))]


def test_close_flushes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_raw(str(path))
    seen = calls(monkeypatch, "fdatasync")
    disk.close()
    assert len(seen) == 1
    disk.close()


def test_errno_comes_out(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):

        def fail(*_: object, error: int = error) -> int:
            raise OSError(error, "injected")

        monkeypatch.setattr(os, "pwritev", fail)
        monkeypatch.setattr(os, "preadv", fail)
        assert write(disk, 0, b"x" * 512) == error
        assert start(disk, Operation.READ, 0, 1, [memoryview(bytearray(1))]).wait() == error


def test_a_write_that_stores_nothing_is_enospc(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    assert write(disk, 0, b"x" * 512) == errno.ENOSPC


def test_a_file_size_limit_comes_out_as_efbig(tmp_path: Path) -> None:
    path = image(tmp_path / "odd.img", 8192 + 100)
    disk = open_raw(str(path))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    try:
        assert write(disk, 8192, b"x" * 512) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    disk.close()


def test_read_only_refuses_every_change(path: Path) -> None:
    before = path.read_bytes()
    disk = open_raw(str(path), options=OpenOptions(read_only=True, discard="unmap"))
    assert disk.read_only
    assert not disk.supports_discard
    assert write(disk, 0, b"x" * 512) == errno.EROFS
    assert do(disk, Operation.WRITE_ZEROES, 0, 512) == errno.EROFS
    assert do(disk, Operation.DISCARD, 0, 512) == errno.EROFS
    assert do(disk, Operation.FLUSH) == 0
    assert read(disk, 0, 512) == before[:512]
    disk.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("may_unmap", [False, True])
@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_write_zeroes(path: Path, discard: str, may_unmap: bool) -> None:
    expected = bytearray(path.read_bytes())
    expected[4096 : 4096 + 512 * KIB] = bytes(512 * KIB)
    options = OpenOptions(discard="unmap" if discard == "unmap" else "ignore")
    disk = open_raw(str(path), options=options)
    assert do(disk, Operation.WRITE_ZEROES, 4096, 512 * KIB, may_unmap=may_unmap) == 0
    disk.close()
    assert path.read_bytes() == expected
    given_back = may_unmap and discard == "unmap"
    assert (allocated(path) < MIB) == given_back


def test_zeroes_are_written_where_fallocate_cannot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []

    def unsupported(fd: int, mode: int, offset: int, length: int) -> None:
        modes.append(mode)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(linux, "fallocate", unsupported)
    path = image(path, 3 * MIB)
    expected = bytearray(path.read_bytes())
    expected[1000 : 1000 + 5 * MIB // 2] = bytes(5 * MIB // 2)
    disk = open_raw(str(path), options=OpenOptions(discard="unmap"))
    for _ in range(2):
        assert do(disk, Operation.WRITE_ZEROES, 1000, 5 * MIB // 2, may_unmap=True) == 0
    assert len(modes) == 2, "asked once for each mode, then never again"
    assert do(disk, Operation.DISCARD, 0, MIB) == 0
    disk.close()
    assert path.read_bytes() == expected


def test_fallocate_that_fails_is_not_hidden(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(linux, "fallocate", full)
    assert do(disk, Operation.WRITE_ZEROES, 0, 4096) == errno.ENOSPC


def test_a_range_fallocate_finds_misaligned_is_written(disk: RawBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def misaligned(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EINVAL, "misaligned")

    monkeypatch.setattr(linux, "fallocate", misaligned)
    assert do(disk, Operation.WRITE_ZEROES, 512, 512) == 0
    assert read(disk, 512, 512) == bytes(512)


def test_discard_gives_space_back_when_asked(path: Path) -> None:
    disk = open_raw(str(path), options=OpenOptions(discard="unmap"))
    assert disk.supports_discard
    assert do(disk, Operation.DISCARD, 0, MIB) == 0
    disk.close()
    assert allocated(path) == 0
    assert path.stat().st_size == MIB


def test_discard_does_nothing_by_default(disk: RawBackend, path: Path) -> None:
    before = path.read_bytes()
    assert not disk.supports_discard
    assert do(disk, Operation.DISCARD, 0, MIB) == 0
    assert path.read_bytes() == before


def test_detect_zeroes_keeps_zeroes_from_taking_space(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    path.touch()
    os.truncate(path, MIB)
    disk = open_raw(str(path), options=OpenOptions(discard="unmap", detect_zeroes="unmap"))
    assert write(disk, 0, bytes(256 * KIB)) == 0
    assert allocated(path) == 0
    assert write(disk, 0, bytes(4096 - 1) + b"x") == 0
    assert read(disk, 0, 4096) == bytes(4095) + b"x"
    disk.close()


def test_a_resized_image_is_seen_on_refresh(disk: RawBackend, path: Path) -> None:
    os.truncate(path, 2 * MIB)
    assert disk.size == MIB
    assert disk.refresh_size() == 2 * MIB
    assert read(disk, 2 * MIB - 512, 512) == bytes(512)


def test_close_waits_for_what_is_under_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_raw(str(path))
    entered, go_on = threading.Event(), threading.Event()
    real = os.preadv

    def slow(*arguments: object) -> int:
        entered.set()
        assert go_on.wait(20)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(read(disk, 0, 512)))
    reader.start()
    assert entered.wait(20)
    closer = threading.Thread(target=disk.close)
    closer.start()
    while write(disk, 0, b"x" * 512) != errno.ESHUTDOWN:  # until close has shut the gate
        pass
    assert closer.is_alive()
    assert path.exists()
    go_on.set()
    reader.join(20)
    closer.join(20)
    assert not closer.is_alive()
    assert len(results) == 1
    assert write(disk, 0, b"y" * 512) == errno.ESHUTDOWN


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "Could not open '{}': No such file or directory (qemu-img create makes an image)"),
        (lambda p: p.mkdir(), "Could not open '{}': it is a directory, not a disk image"),
        (os.mkfifo, "Could not open '{}': it is neither a regular file nor a block device"),
        (lambda p: p.symlink_to(p), "Could not open '{}': Too many levels of symbolic links"),
    ],
    ids=["missing", "directory", "fifo", "loop"],
)
def test_what_is_no_image_is_one_clear_line(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "disk"
    assert callable(make)
    make(path)
    with pytest.raises(BackendError) as caught:
        open_raw(str(path))
    assert str(caught.value) == message.format(path)


def test_a_name_with_nul_is_refused() -> None:
    with pytest.raises(BackendError, match="has no NUL in it"):
        open_raw("a\0b")


def forbid_writing(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    real = os.open

    def forbidden(path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(error, os.strerror(error))
        return real(path, flags)

    monkeypatch.setattr(os, "open", forbidden)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_no_permission_says_how_to_do_without(path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    forbid_writing(monkeypatch, error)
    with pytest.raises(BackendError) as caught:
        open_raw(str(path))
    assert str(caught.value) == (f"Could not open '{path}': {os.strerror(error)} (readonly=on needs no right to write)")


def test_auto_read_only_falls_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_writing(monkeypatch, errno.EACCES)
    disk = open_raw(str(path), options=OpenOptions(auto_read_only=True))
    assert disk.read_only
    assert write(disk, 0, b"x" * 512) == errno.EROFS
    disk.close()


def test_a_file_system_without_direct_io_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags)

    monkeypatch.setattr(os, "open", no_direct)
    with pytest.raises(BackendError, match="its filesystem has no O_DIRECT: use cache=writeback"):
        open_raw(str(path), options=OpenOptions(direct=True))


def test_a_failed_open_leaves_no_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    holder = open_raw(str(path))
    with pytest.raises(BackendError):
        open_raw(str(path))
    holder.close()

    def broken(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", broken)
        with pytest.raises(BackendError, match=f"Could not open '{path}': Input/output error"):
            open_raw(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_descriptor_is_not_inherited(disk: RawBackend, path: Path) -> None:
    mine = [int(fd) for fd in os.listdir("/proc/self/fd") if points_to(int(fd), path)]
    assert len(mine) == 1
    assert not os.get_inheritable(mine[0])
    assert stat.S_ISREG(os.fstat(mine[0]).st_mode)


def points_to(fd: int, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except OSError:
        return False


def test_an_image_that_is_taken_over_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page cache has of it may be older than what the other host wrote; an ordinary open keeps the cache."""
    advice: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, kind: advice.append(kind))
    path = tmp_path / "d.raw"
    path.write_bytes(bytes(1 << 16))
    image = open_raw(str(path))
    assert advice == []
    image.inactivate()
    image.activate()
    image.activate()
    assert advice == [os.POSIX_FADV_DONTNEED]
    image.close()
