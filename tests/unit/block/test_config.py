"""-drive options as QEMU reads them, and what a configuration opens."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nvmove.block.backend import BackendError, Operation
from nvmove.block.config import DriveConfig, OpenOptions
from nvmove.block.late import LateBackend
from nvmove.block.nbd.backend import NbdBackend, nbd_unix_uri
from nvmove.block.open import open_drive
from nvmove.block.raw.backend import RawBackend, open_raw
from tests.block_helpers import MIB, do, image, read
from tests.nbd_server import Server, serving


def drive(**options: str) -> DriveConfig:
    given = {"if": "none", "id": "d0", "file": "disk.img", "format": "raw"}
    return DriveConfig.from_options(given | {name.replace("_", "-"): value for name, value in options.items()})


def test_the_defaults_are_qemus() -> None:
    config = drive()
    assert config == DriveConfig(id="d0", file="disk.img", format="raw")
    assert (config.werror, config.rerror) == ("enospc", "report")
    assert config.options == OpenOptions()
    assert DriveConfig.from_options({"file": "x"}).format is None


@pytest.mark.parametrize(
    ("cache", "writeback", "direct", "no_flush"),
    [
        ("writeback", True, False, False),
        ("none", True, True, False),
        ("off", True, True, False),
        ("writethrough", False, False, False),
        ("directsync", False, True, False),
        ("unsafe", True, False, True),
    ],
)
def test_cache_modes(cache: str, writeback: bool, direct: bool, no_flush: bool) -> None:
    options = drive(cache=cache).options
    assert (options.writeback, options.direct, options.no_flush) == (writeback, direct, no_flush)


def test_cache_switches_override_the_mode() -> None:
    given = {"file": "x", "cache": "none", "cache.direct": "off", "cache.no-flush": "on", "cache.writeback": "no"}
    options = DriveConfig.from_options(given).options
    assert (options.writeback, options.direct, options.no_flush) == (False, False, True)


@pytest.mark.parametrize(("value", "unmap"), [("ignore", False), ("off", False), ("unmap", True), ("on", True)])
def test_discard(value: str, unmap: bool) -> None:
    assert drive(discard=value).options.unmap == unmap


def test_everything_else_is_read() -> None:
    config = drive(
        readonly="on", auto_read_only="on", werror="stop", rerror="ignore", aio="native", cache="none",
        detect_zeroes="unmap", node_name="n0",
    )  # fmt: skip
    assert config == DriveConfig(
        id="d0",
        node_name="n0",
        file="disk.img",
        format="raw",
        aio="native",
        werror="stop",
        rerror="ignore",
        options=OpenOptions(read_only=True, auto_read_only=True, direct=True, detect_zeroes="unmap"),
    )
    assert drive(werror="auto", rerror="auto") == drive()
    assert DriveConfig.from_options({"file": "x", "read-only": "yes"}).options.read_only
    given = {"driver": "raw", "file.filename": "x", "file.locking": "off"}
    config = DriveConfig.from_options(given)
    assert (config.format, config.file, config.options.locking) == ("raw", "x", False)


def test_what_only_qemu_has_is_kept_in_order() -> None:
    given = {"throttling.iops-total": "9", "file": "x", "copy-on-read": "on"}
    assert DriveConfig.from_options(given).others == (("throttling.iops-total", "9"), ("copy-on-read", "on"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": ""}, "needs file=PATH"),
        ({"cache": "foo"}, "cache=foo is not one of writeback, none, off, writethrough, directsync, unsafe"),
        ({"discard": "foo"}, "discard=foo is not one of ignore, off, unmap, on"),
        ({"werror": "foo"}, "werror=foo is not one of report, ignore, enospc, stop, auto"),
        ({"rerror": "enospc"}, "rerror=enospc is not one of report, ignore, stop, auto"),
        ({"readonly": "maybe"}, "readonly=maybe is neither on nor off"),
        ({"readonly": "on", "read_only": "on"}, "readonly is given twice, also as read-only"),
        ({"aio": "foo"}, "aio=foo is not one of threads, native, io_uring"),
        ({"aio": "native"}, "aio=native needs cache=none or cache=directsync"),
    ],
)
def test_a_mistake_is_one_clear_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError) as caught:
        drive(**options)
    assert str(caught.value) == f"drive 'd0': {message}"


def test_a_raw_drive_is_opened(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.img")
    for name in (str(path), f"file:{path}"):
        disk = open_drive(drive(file=name), share_rw=True)
        again = open_drive(drive(file=name), share_rw=True)
        assert isinstance(disk, RawBackend)
        assert disk.size == MIB
        disk.close()
        again.close()


def test_an_nbd_drive_is_opened(tmp_path: Path) -> None:
    with serving(Server(bytearray(MIB)), tmp_path / "nbd.sock"):
        disk = open_drive(drive(file=nbd_unix_uri(str(tmp_path / "nbd.sock"))))
        assert isinstance(disk, NbdBackend)
        disk.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": ""}, "drive 'd0': needs format=raw (nvmove does not guess formats)"),
        ({"format": "qcow2"}, "drive 'd0': format=qcow2 needs QEMU or qemu-nbd behind it: "),
        ({"copy_on_read": "on"}, "drive 'd0': option 'copy-on-read' is not supported without QEMU"),
        ({"file": "rbd:pool/image"}, "'rbd:pool/image': only nbd:// and nbd+unix:// are spoken, without TLS"),
    ],
)
def test_what_needs_qemu_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError) as caught:
        open_drive(drive(**options))
    assert str(caught.value).startswith(message)


def test_a_drive_opened_late_has_no_size_before(tmp_path: Path) -> None:
    late = LateBackend()
    assert (late.size, late.read_only, late.supports_discard, late.request_alignment) == (0, False, False, 1)
    assert late.refresh_size() == 0
    assert do(late, Operation.FLUSH) == errno.ENODEV
    late.close()
    path = image(tmp_path / "disk.img")
    late.open(open_raw(str(path), options=OpenOptions(read_only=True, discard="unmap")))
    assert (late.size, late.read_only, late.supports_discard, late.request_alignment) == (MIB, True, False, 1)
    assert late.refresh_size() == MIB
    assert read(late, 0, MIB) == path.read_bytes()
    late.close()
    assert do(late, Operation.FLUSH) == errno.ESHUTDOWN
