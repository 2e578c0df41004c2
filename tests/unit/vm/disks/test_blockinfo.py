"""`query-block` and `info block` as QEMU 11.1 prints them for its own nvme (captured with -S and -device nvme)."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.block.config import DriveConfig, OpenOptions
from nvmove.block.policy import ErrorPolicy
from nvmove.block.raw.backend import open_raw
from nvmove.vm.disks import blockinfo
from nvmove.vm.disks.blockinfo import ServedDrive

QEMU_TEXT = (
    "d0 (#block240): a.qcow2 (qcow2)\r\n"
    "    Removable device: not locked, tray closed\r\n"
    "    Cache mode:       writeback\r\n"
    "\r\n"
    "cd0: [not inserted]\r\n"
    "    Attached to:      ide0\r\n"
    "    Removable device: not locked, tray closed\r\n"
)


@pytest.fixture
def raw(tmp_path: Path) -> ServedDrive:
    image = tmp_path / "b.raw"
    image.write_bytes(bytes(64 << 20))
    config = DriveConfig(id="d1", file=str(image), format="raw")
    return ServedDrive("d1", "#block1", "nv1", config, open_raw(str(image), options=config.options), in_qemu=False)


@pytest.fixture
def exported(raw: ServedDrive) -> ServedDrive:
    return ServedDrive("d0", "", "nv0", DriveConfig(id="d0", file="a.qcow2"), raw.backend, in_qemu=True)


def test_an_exported_drive_is_shown_attached_to_its_device(exported: ServedDrive) -> None:
    lines = blockinfo.complete_text(QEMU_TEXT, [exported], None, verbose=False).split("\r\n")
    assert lines[:3] == [
        "d0 (#block240): a.qcow2 (qcow2)",
        "    Attached to:      nv0",
        "    Cache mode:       writeback",
    ]


def test_other_drives_are_left_as_they_are(exported: ServedDrive) -> None:
    text = blockinfo.complete_text(QEMU_TEXT, [exported], None, verbose=False)
    assert text.endswith(QEMU_TEXT.partition("\r\n\r\n")[2])


def test_a_raw_drive_is_printed_as_qemu_prints_it(raw: ServedDrive) -> None:
    expected = [
        f"d1 (#block1): {raw.config.file} (raw)",
        "    Attached to:      nv1",
        "    Cache mode:       writeback",
        "",
    ]
    assert expected == blockinfo.complete_text("", [raw], None, verbose=False).split("\r\n")


def test_info_block_of_one_drive_shows_no_other(raw: ServedDrive) -> None:
    assert blockinfo.complete_text("x: y\r\n", [raw], "x", verbose=False) == "x: y\r\n"


def test_verbose_shows_the_image(raw: ServedDrive) -> None:
    text = blockinfo.complete_text("", [raw], "d1", verbose=True)
    assert "virtual size: 64 MiB (67108864 bytes)\r\n" in text
    assert "file format: raw\r\n" in text


def test_cache_mode_and_read_only_are_named(tmp_path: Path) -> None:
    image = tmp_path / "c.raw"
    image.write_bytes(bytes(512))
    options = OpenOptions(read_only=True, writeback=False, no_flush=True)
    config = DriveConfig(id="d2", file=str(image), format="raw", options=options)
    drive = ServedDrive("d2", "", "nv2", config, open_raw(str(image), options=options), in_qemu=False)
    lines = blockinfo.complete_text("", [drive], None, verbose=False).split("\r\n")
    assert lines[0] == f"d2: {image} (raw, read-only)"
    assert lines[2] == "    Cache mode:       writethrough, ignore flushes"


def test_query_block_names_the_device_and_adds_raw_drives(exported: ServedDrive, raw: ServedDrive) -> None:
    qemu = [
        {"device": "d0", "removable": True, "tray_open": False, "inserted": {"node-name": "#block240"}},
        {"device": "cd0", "removable": True, "tray_open": False},
    ]
    answer = blockinfo.complete(qemu, [exported, raw])
    exported_info = {"device": "d0", "removable": False, "inserted": {"node-name": "#block240"}, "qdev": "nv0"}
    assert answer[0] == {"io-status": "ok", **exported_info}
    assert next(iter(answer[2])) == "io-status", "the order is QEMU's"
    assert answer[1] == qemu[1]
    assert (answer[2]["device"], answer[2]["qdev"]) == ("d1", "nv1")
    assert answer[2]["inserted"]["image"]["virtual-size"] == 64 << 20


def test_an_io_status_that_is_not_ok_is_printed_as_qemu_prints_it(exported: ServedDrive, raw: ServedDrive) -> None:
    exported.io.fail(is_no_space=True)
    raw.io.fail(is_no_space=False)
    lines = blockinfo.complete_text(QEMU_TEXT, [exported, raw], None, verbose=False).split("\r\n")
    assert lines[1:4] == [
        "    Attached to:      nv0",
        "    I/O status:       nospace",
        "    Cache mode:       writeback",
    ]
    assert lines[-4:-1] == [
        "    Attached to:      nv1",
        "    I/O status:       failed",
        "    Cache mode:       writeback",
    ]


def test_the_first_error_sticks_until_the_vm_runs_again(raw: ServedDrive) -> None:
    raw.io.fail(is_no_space=True)
    raw.io.fail(is_no_space=False)
    assert blockinfo.entry(raw)["io-status"] == "nospace"
    raw.io.reset()
    assert blockinfo.entry(raw)["io-status"] == "ok"


@pytest.mark.parametrize(
    ("werror", "rerror", "shown"),
    [("report", "report", False), ("ignore", "ignore", False), ("enospc", "report", True), ("report", "stop", True)],
)
def test_there_is_an_io_status_where_an_error_may_stop_the_vm(
    raw: ServedDrive, werror: str, rerror: str, shown: bool
) -> None:
    raw.io.errors.werror, raw.io.errors.rerror = ErrorPolicy(werror), ErrorPolicy(rerror)
    raw.io.fail(is_no_space=True)
    assert ("io-status" in blockinfo.entry(raw)) == shown
    assert ("nospace" in blockinfo.complete_text("", [raw], None, verbose=False)) == shown


def test_a_node_of_blockdev_is_shown_as_qemu_shows_one_with_a_device(raw: ServedDrive) -> None:
    drive = ServedDrive("", "n0", "nv0", DriveConfig(node_name="n0", file=""), raw.backend, in_qemu=True, export="e0")
    assert blockinfo.unnamed([drive, raw]) == [drive]
    (info,) = blockinfo.complete([], [drive], {"e0": {"node-name": "overlay"}})
    assert (info["device"], info["qdev"], info["inserted"]) == ("", "nv0", {"node-name": "overlay"})
    assert blockinfo.complete([], [drive]) == [], "while it is not exported"
    shown = blockinfo.attach("\r\noverlay: o.qcow2 (qcow2)\r\n    Cache mode:       writeback\r\n", drive)
    assert shown == ("overlay: o.qcow2 (qcow2)\r\n    Attached to:      nv0\r\n    Cache mode:       writeback\r\n")
