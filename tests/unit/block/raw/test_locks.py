"""Image locks, against QEMU's own tools and against ourselves."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from nvmove.block.backend import BackendError, Operation
from nvmove.block.config import OpenOptions
from nvmove.block.raw.backend import open_raw
from tests.block_helpers import do, image, read, tool, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return image(tmp_path / "disk.img")


def locked_bytes(path: Path) -> set[int]:
    """The bytes of a file that have open-file-description locks, from /proc/locks."""
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "OFDLCK" and fields[5].endswith(f":{path.stat().st_ino}"):
            found.update(range(int(fields[6]), int(fields[7]) + 1))
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # as /proc/locks shows for QEMU 11.1.3's nvme device with the same options
        (OpenOptions(), {100, 101, 201, 203}),
        (OpenOptions(read_only=True), {100, 201, 203}),
        (OpenOptions(share_rw=True), {100, 101, 203}),
        (OpenOptions(locking=False), set()),
    ],
    ids=["default", "read-only", "share-rw", "off"],
)
def test_the_locks_are_those_of_qemus_nvme(path: Path, options: OpenOptions, expected: set[int]) -> None:
    disk = open_raw(str(path), options=options)
    assert locked_bytes(path) == expected
    disk.close()
    assert locked_bytes(path) == set()


def test_qemu_cannot_write_to_an_image_we_hold(path: Path, sysroot: Path) -> None:
    disk = open_raw(str(path))
    refused = tool(sysroot, "qemu-io", "-f", "raw", "-c", "write 0 512", path)
    assert refused.returncode == 1
    assert refused.stderr == (
        f'qemu-io: can\'t open device {path}: Failed to get "write" lock\n'
        f"Is another process using the image [{path}]?\n"
    )
    resized = tool(sysroot, "qemu-img", "resize", "-f", "raw", path, "2M")
    assert resized.returncode == 1
    assert 'Failed to get "write" lock' in resized.stderr
    disk.close()
    assert tool(sysroot, "qemu-io", "-f", "raw", "-c", "write 0 512", path).returncode == 0


def test_qemu_may_read_what_we_hold(path: Path, sysroot: Path) -> None:
    disk = open_raw(str(path))
    assert tool(sysroot, "qemu-img", "info", "-f", "raw", path).returncode == 0
    disk.close()


def test_share_rw_lets_qemu_write(path: Path, sysroot: Path) -> None:
    disk = open_raw(str(path), options=OpenOptions(share_rw=True))
    assert tool(sysroot, "qemu-io", "-f", "raw", "-c", "write -P 0x58 0 512", path).returncode == 0
    assert read(disk, 0, 512) == b"X" * 512
    disk.close()


def test_two_writers_are_one_too_many(path: Path) -> None:
    disk = open_raw(str(path))
    with pytest.raises(BackendError) as caught:
        open_raw(str(path))
    assert str(caught.value) == f'Failed to get "write" lock. Is another process using the image [{path}]?'
    disk.close()
    open_raw(str(path)).close()


def test_a_reader_keeps_writers_out_and_a_writer_readers(path: Path) -> None:
    reader = open_raw(str(path), options=OpenOptions(read_only=True))
    with pytest.raises(BackendError, match='Failed to get "write" lock'):
        open_raw(str(path))
    second = open_raw(str(path), options=OpenOptions(read_only=True))
    second.close()
    reader.close()
    writer = open_raw(str(path))
    with pytest.raises(BackendError, match='Failed to get shared "write" lock'):
        open_raw(str(path), options=OpenOptions(read_only=True))
    writer.close()


def test_an_image_that_qemu_has_is_refused(path: Path, sysroot: Path) -> None:
    import pexpect

    command = str(sysroot / "bin" / "qemu-io")
    holder = pexpect.spawn(command, ["-f", "raw", str(path)], timeout=20)
    try:
        holder.expect("qemu-io> ")
        with pytest.raises(BackendError, match="Is another process using the image"):
            open_raw(str(path))
    finally:
        holder.close(force=True)
    open_raw(str(path)).close()


def test_a_refused_open_leaves_no_lock(path: Path) -> None:
    disk = open_raw(str(path))
    with pytest.raises(BackendError):
        open_raw(str(path))
    assert locked_bytes(path) == {100, 101, 201, 203}
    assert write(disk, 0, b"x" * 512) == 0
    disk.close()
    assert locked_bytes(path) == set()


def test_an_image_is_handed_over(path: Path) -> None:
    source = open_raw(str(path))
    destination = open_raw(str(path), active=False)
    assert write(destination, 0, b"d" * 512) == errno.EPERM
    assert write(source, 0, b"s" * 512) == 0
    with pytest.raises(BackendError, match="Is another process using the image"):
        destination.activate()
    source.inactivate()
    assert write(source, 0, b"l" * 512) == errno.EPERM, "no late write of the source"
    destination.activate()
    assert read(destination, 0, 512) == b"s" * 512
    with pytest.raises(BackendError, match="Is another process using the image"):
        source.activate()
    assert do(source, Operation.FLUSH) == errno.EPERM
    destination.close()
    source.activate()
    assert write(source, 0, b"b" * 512) == 0
    source.close()


def test_a_file_system_without_locks_says_how_to_do_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, command: int, argument: bytes) -> bytes:
        if command == fcntl.F_OFD_SETLK and argument[0] == fcntl.F_RDLCK:
            raise OSError(errno.ENOLCK, "No locks available")
        return argument

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with pytest.raises(BackendError) as caught:
        open_raw(str(path))
    assert str(caught.value) == f"Could not lock '{path}': No locks available (file.locking=off does without)"
