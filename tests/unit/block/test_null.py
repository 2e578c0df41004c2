"""Null disks: what their options say, and that they answer as a disk does without being one."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from nvmove import serve
from nvmove.block.backend import BackendError, Operation, Request
from nvmove.block.config import DriveConfig, NullConfig, OpenOptions
from nvmove.block.null import NullBackend, describe
from nvmove.block.open import open_drive, open_local
from nvmove.options import drives
from nvmove.options.drives import Drive
from nvmove.options.nulls import null_drive
from nvmove.options.syntax import OptionError, parse


def answer(disk: NullBackend, operation: Operation, offset: int, *buffers: bytearray) -> int:
    answers: list[int] = []
    views = [memoryview(buffer) for buffer in buffers]
    disk.submit(Request(operation, answers.append, offset, sum(map(len, buffers)), views))
    (one,) = answers
    return one


def null(size: int = 1 << 20, *, read_only: bool = False, active: bool = True, **config: bool | int) -> NullBackend:
    return NullBackend(NullConfig(size=size, **config), OpenOptions(read_only=read_only), active=active)  # type: ignore[arg-type]


def test_a_read_leaves_memory_as_it_was() -> None:
    buffer = bytearray(b"x" * 4096)
    assert answer(null(), Operation.READ, 0, buffer) == 0
    assert buffer == b"x" * 4096
    assert not null().moves_data


def test_a_read_gives_zeroes_where_it_is_asked_to() -> None:
    buffers = bytearray(b"x" * 100_000), bytearray(b"y" * 512)
    assert answer(null(read_zeroes=True), Operation.READ, 512, *buffers) == 0
    assert not any(buffers[0]) and not any(buffers[1])
    assert null(read_zeroes=True).moves_data


@pytest.mark.parametrize("operation", [Operation.WRITE, Operation.WRITE_ZEROES, Operation.FLUSH, Operation.DISCARD])
def test_all_else_succeeds(operation: Operation) -> None:
    assert answer(null(), operation, 0, bytearray(512)) == 0


def test_what_a_raw_image_refuses_is_refused() -> None:
    assert answer(null(), Operation.READ, 1 << 20, bytearray(1)) == errno.EIO
    assert answer(null(read_only=True), Operation.WRITE, 0, bytearray(1)) == errno.EROFS


def test_the_size_is_whole_sectors_and_fixed() -> None:
    disk = null(1000)
    assert disk.size == disk.refresh_size() == 1024
    assert not disk.supports_discard and disk.request_alignment == 1 and not disk.read_only
    disk.recover()
    with pytest.raises(BackendError, match="Image format driver does not support resize"):
        disk.resize(4096)
    with pytest.raises(BackendError, match="Image is read-only"):
        null(read_only=True).resize(4096)


def test_latency_is_kept_and_holds_up_nobody() -> None:
    disk = null(latency_ns=20_000_000)
    done = threading.Event()
    start = time.monotonic()
    disk.submit(Request(Operation.READ, lambda _error: done.set()))
    assert not done.is_set()
    assert done.wait(10)
    assert time.monotonic() - start >= 0.02
    assert disk.moves_data
    disk.close()


def test_closing_does_not_wait_for_the_latency() -> None:
    disk = null(latency_ns=3600 * 10**9)
    errors: list[int] = []
    disk.submit(Request(Operation.WRITE, errors.append))
    disk.close()
    assert errors == [0]
    assert answer(disk, Operation.READ, 0, bytearray(512)) == errno.ESHUTDOWN


def test_a_disk_that_another_has_refuses_requests() -> None:
    disk = null(active=False)
    assert answer(disk, Operation.READ, 0, bytearray(512)) == errno.EPERM
    disk.activate()
    assert answer(disk, Operation.READ, 0, bytearray(512)) == 0
    disk.inactivate()
    assert answer(disk, Operation.READ, 0, bytearray(512)) == errno.EPERM


def read(text: str) -> Drive:
    return drives.read_drive(parse("-drive", text, implied="file"), snapshot=False)


@pytest.mark.parametrize(
    ("text", "config", "name"),
    [
        ("file=null-co://,format=raw", NullConfig(), "null-co://"),
        ("file=null-aio://,format=raw", NullConfig(), "null-aio://"),
        (
            "file=null-co://,format=raw,file.size=10M,file.read-zeroes=on",
            NullConfig(size=10 << 20, read_zeroes=True),
            'json:{"driver":"null-co","size":10485760,"read-zeroes":true}',
        ),
        ("driver=null-co,latency-ns=5", NullConfig(latency_ns=5), "null-co://"),
        ("file.driver=null-aio,format=raw,file.latency-ns=0", NullConfig(), "null-aio://"),
    ],
)
def test_a_drive_is_read_as_qemu_reads_it(text: str, config: NullConfig, name: str) -> None:
    drive = read(f"id=d0,if=none,{text}")
    assert (drive.config.null, drive.config.file, drive.in_qemu) == (config, name, False)
    disk = open_local(drive.config)
    assert isinstance(disk, NullBackend)
    assert disk.size == config.size


@pytest.mark.parametrize(
    "text",
    [
        "file=null-co://",
        "file=null-co://,format=raw,file.other=1",
        "driver=null-co,offset=1",
        "file=null-co://,format=raw,snapshot=on",
    ],
)
def test_what_is_not_understood_stays_in_qemu(text: str) -> None:
    assert read(f"id=d0,if=none,{text}").in_qemu


def test_other_files_are_no_null_disks() -> None:
    for text in ("file=null-co,format=raw", "file=a.img,driver=raw", "file=null-co://,file.driver=file"):
        assert null_drive(parse("-drive", text)) is None


def test_a_size_that_is_none_is_refused() -> None:
    for text, message in (
        ("driver=null-co,size=big", "Parameter 'size' expects size"),
        ("driver=null-co,latency-ns=-1", "latency-ns is invalid"),
    ):
        with pytest.raises(OptionError, match=message):
            read(f"id=d0,if=none,{text}")


def node(text: str, *others: str) -> Drive:
    options = {
        option.get("node-name"): option
        for option in (parse("-blockdev", each, "driver", json_allowed=True) for each in (text, *others))
    }
    return drives.read_blockdev(next(iter(options.values())), options, frozenset())


def test_a_blockdev_is_read_as_qemu_reads_it() -> None:
    drive = node("null-co,node-name=n0,size=1048576,read-zeroes=on")
    assert drive.config.null == NullConfig(size=1 << 20, read_zeroes=True)
    assert (drive.config.format, drive.nodes, drive.in_qemu) == ("null-co", ("n0",), False)
    drive = node("raw,node-name=n0,file=below,read-only=on", '{"driver":"null-aio","node-name":"below","size":512}')
    assert drive.config.null == NullConfig(size=512)
    assert (drive.config.format, drive.nodes, drive.in_qemu) == ("raw", ("n0", "below"), False)
    assert not node("raw,node-name=n0,file.driver=null-co,file.latency-ns=7").in_qemu
    assert drive.config.options.read_only


def test_a_blockdev_of_more_stays_in_qemu() -> None:
    assert node("null-co,node-name=n0,size=512,other=1").in_qemu
    assert node("raw,node-name=n0,size=512,file.driver=null-co").in_qemu
    with pytest.raises(OptionError, match="Parameter 'size' expects integer"):
        node("null-co,node-name=n0,size=1G")
    with pytest.raises(OptionError, match="expects a >0 size"):
        node("null-co,node-name=n0,size=-1")


def test_serve_takes_null_disks(tmp_path: Path) -> None:
    devices = ["nvme,serial=S1,drive=d0"]
    _, found = serve._configure(devices, ["id=d0,file=null-co://,format=raw,file.size=1M"])
    disk = open_drive(found["d0"])
    assert isinstance(disk, NullBackend)
    assert disk.size == 1 << 20
    _, found = serve._configure(devices, ["id=d0,driver=null-aio,size=2M,readonly=on"])
    assert open_drive(found["d0"]).size == 2 << 20
    assert open_drive(found["d0"]).read_only
    _, found = serve._configure(devices, ["id=d0,driver=null-co,frob=1"])
    with pytest.raises(BackendError, match="option 'frob' is not supported without QEMU"):
        open_drive(found["d0"])


def test_names_are_qemus() -> None:
    assert describe("null-co", NullConfig(latency_ns=1)) == "null-co://"
    assert DriveConfig(file="null-co://").null is None
