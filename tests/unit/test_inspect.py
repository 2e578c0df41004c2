"""`nvmove inspect`: finds the state wherever QEMU or we put it, and says in one line what is wrong with a file."""

from __future__ import annotations

import argparse
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmove.errors import UserError
from nvmove.inspect import add_arguments, as_json, as_text, inspect, run
from nvmove.nvme.state.vmsd import NVME, dump, to_tree
from nvmove.nvme.state.vmsd_qemu import QEMU_NVME
from nvmove.vmstate import machine
from nvmove.vmstate.qcow2 import HEADER, SNAPSHOT, Qcow2
from nvmove.vmstate.qemu_file import QemuFile
from nvmove.vmstate.schema import Reader, StateError
from nvmove.vmstate.source import BytesSource, FileSource
from nvmove.vmstate.stream import Section
from nvmove.vmstate.stream import dump as dump_stream
from tests.states import busy, fresh

DATA = Path(__file__).parents[1] / "data"
RAM = b"QEVM\0\0\0\3" + bytes(range(256)) * 40


def section(number: int, name: str, body: bytes) -> bytes:
    head = b"\4" + number.to_bytes(4, "big") + bytes([len(name)]) + name.encode() + bytes(8)
    return head + body + b"\x7e" + number.to_bytes(4, "big")


def dbus_body(states: dict[str, bytes]) -> bytes:
    out = len(states).to_bytes(4, "big")
    for ident, data in states.items():
        out += len(ident).to_bytes(4, "big") + ident.encode() + len(data).to_bytes(4, "big") + data
    out += bytes(100)  # QEMU writes its whole buffer
    return len(out).to_bytes(4, "big") + out


def device(name: str, size: int, kind: str = "") -> dict[str, Any]:
    fields = [{"name": "data", "type": "buffer", "size": size}]
    return {"name": name, "instance_id": 0, "vmsd_name": kind or name, "version": 0, "fields": fields}


def described(devices: Any) -> bytes:
    text = msgspec.json.encode({"page_size": 4096, "devices": devices})
    return b"\0\6" + len(text).to_bytes(4, "big") + text


def migration(states: dict[str, bytes]) -> bytes:
    """A stream as QEMU's: RAM, the dbus-vmstate section, another section with a subsection, the description."""
    body = dbus_body(states)
    timer = device("timer", 10)
    timer["subsections"] = [
        {"vmsd_name": "timer/sub", "version": 1, "fields": [{"name": "a", "array_len": 3, "size": 2}]}
    ]
    sections = section(1, "dbus-vmstate/dbus-vmstate", body)
    sections += section(2, "timer", bytes(10) + b"\5\x09timer/sub\0\0\0\1" + bytes(6))
    return RAM + sections + described([device("dbus-vmstate/dbus-vmstate", len(body), "dbus-vmstate"), timer])


def qcow2(
    vm_states: dict[str, bytes], *, crypt: int = 0, features: int = 0, version: int = 3, entry_flag: int = 0
) -> bytes:
    """An image of 1 MiB with clusters of 4 KiB and internal snapshots: L1 and L2 tables hold the VM state alone."""
    cluster, disk = 4096, 1 << 20
    image = bytearray(4 * cluster)
    table = bytearray()
    for number, (name, data) in enumerate(vm_states.items(), 1):
        l1, l2 = len(image), len(image) + cluster
        image += bytes(2 * cluster)
        # One L2 table reaches 2 MiB: the disk is within the first, the VM state begins with the second.
        image[l1 + 8 : l1 + 16] = (l2 | 1 << 63).to_bytes(8, "big")
        for index in range(0, len(data), cluster):
            where = l2 + index // cluster * 8
            piece = data[index : index + cluster].ljust(cluster, b"\0")
            if any(piece):
                image[where : where + 8] = (len(image) | 1 << 63 | entry_flag).to_bytes(8, "big")
                image += piece
            elif index % 8192:
                image[where : where + 8] = (1).to_bytes(8, "big")  # reads as zeroes; others are not allocated
        extra = struct.pack(">QQQ", len(data), disk, 0)
        ident = str(number)
        entry = SNAPSHOT.pack(l1, 2, len(ident), len(name), 1000, 0, 0, len(data), len(extra))
        entry += extra + ident.encode() + name.encode()
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    header = HEADER.pack(
        b"QFI\xfb", version, 0, 0, 12, disk, crypt, 1, cluster, 2 * cluster, 1, len(vm_states), len(image)
    )
    image[: HEADER.size] = header
    image[72:80] = features.to_bytes(8, "big")
    return bytes(image + table)


STATES = {"nvme0": dump(busy()), "nvme1": dump(fresh())}


def idents(data: bytes, tag: str | None = None) -> list[str]:
    return [found.ident for found in inspect(BytesSource(data), tag).devices]


def test_a_state_file_is_found() -> None:
    report = inspect(BytesSource(STATES["nvme0"]))
    assert (report.kind, report.devices[0].tree["bar"]["csts"], report.devices[0].problem) == ("state", 1, "")


def test_every_device_in_a_migration_file_is_found_and_other_helpers_are_named() -> None:
    report = inspect(BytesSource(migration({**STATES, "swtpm": b"something else"})))
    assert [found.ident for found in report.devices] == ["nvme0", "nvme1"]
    assert report.others == ["swtpm"]


def test_the_state_of_the_vm_as_a_whole_is_shown() -> None:
    tree = {"run_state": "io-error", "devices": [{"id": "nvme0"}], "drives": []}
    whole = dump_stream([(Section(machine.IDENT, tree), machine.VM)])
    report = inspect(BytesSource(migration({"nvme0": STATES["nvme0"], machine.IDENT: whole})))
    assert (report.vm, report.others) == (tree, [])
    assert as_json(report)["vm"] == tree
    assert list(as_text(report))[-3:] == [
        "nvmove-vm: the VM as a whole",
        "  run_state: io-error",
        "  devices[0]: id=nvme0",
    ]
    with pytest.raises(StateError, match=r"^nvmove-vm: "):
        inspect(BytesSource(migration({"nvme0": STATES["nvme0"], machine.IDENT: whole[:-1]})))


def test_the_state_in_a_snapshot_is_found_by_name_by_id_and_when_it_is_the_only_one() -> None:
    with_zeroes = bytearray(migration({"nvme0": STATES["nvme0"]}))
    with_zeroes[8:8200] = bytes(8192)
    image = qcow2({"disk": b"", "two": bytes(with_zeroes)})
    assert idents(image) == idents(image, "two") == idents(image, "2") == ["nvme0"]
    report = inspect(BytesSource(image))
    assert report.snapshot is not None
    assert (report.snapshot.name, report.snapshot.ident, report.snapshot.seconds) == ("two", "2", 1000)


def test_qemus_own_nvme_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = gzip.decompress((DATA / "qemu-11.1-nvme-section.gz").read_bytes())
    tree = QEMU_NVME.read(Reader(raw[31:-5]), 1)
    body = bytearray()
    own = {"name": "0000:00:01.0/nvme", "instance_id": 0, **QEMU_NVME.write(body, tree)}
    file = tmp_path / "vm"
    file.write_bytes(RAM + raw + described([own]))
    assert command(str(file)) == 0
    printed = capsys.readouterr().out
    assert "0000:00:01.0/nvme: NVMe controller, saved by qemu, 22611 bytes; does not load" in printed
    assert "  sq[2]: sqid=2 cqid=2 head=3 tail=3 size=1024 dma_addr=0x17ce0000\n" in printed


@pytest.mark.parametrize(
    ("data", "tag", "says"),
    [
        (b"", None, "neither a qcow2 image nor a QEMU migration file nor a state file: it begins with b''"),
        (b"\x1f\x8b\x08\0", None, "(decompress it first: gzip -d)"),
        (b"QEVM", "t1", "--snapshot is for qcow2 images, and this is none"),
        (RAM, None, "no description at the end of the migration stream: it is truncated, or"),
        (migration(STATES)[:-1], None, "no description at the end"),
        (RAM + described([]), None, "there is no NVMe device's state in it"),
        (migration({"swtpm": b"x"}), None, "there is no NVMe device's state in it"),
        (migration({"nvme0": STATES["nvme0"][:-1]}), None, "nvme0: the description: truncated"),
        (migration({"nvme0": STATES["nvme0"].replace(b"S1", b"S2")}), None, "nvme0: the state is damaged"),
        (migration({"nvme0": dump_stream([])}), None, "nvme0: 0 sections instead of one"),
        (RAM + described(3), None, "lists no devices"),
        (RAM + described([{"name": 5, "fields": []}]), None, "the description names a device 5"),
        (RAM + described([{"name": "a", "fields": 5}]), None, "the description's 'fields' is no list"),
        (RAM + described([{"name": "a", "fields": [{"name": "b"}]}]), None, "the description gives 'b' no size"),
        (qcow2({}), None, "the image has no snapshot with VM state"),
        (qcow2({"a": RAM, "b": RAM}), None, "several snapshots with VM state, choose with --snapshot: a, b"),
        (qcow2({"a": RAM}), "c", "no snapshot 'c'; those with VM state: a"),
        (qcow2({"a": b""}), "a", "snapshot 'a' has no VM state: it is of the disk alone"),
        (qcow2({}, crypt=2), None, "the image is encrypted"),
        (qcow2({}, features=4), None, "the image has an external data file"),
        (qcow2({}, features=1 << 40), None, "a qcow2 image with unknown incompatible features (0x10000000000)"),
        (qcow2({}, version=9), None, "a qcow2 image of version 9"),
        (qcow2({"a": RAM}, entry_flag=1 << 62), None, "the VM state has compressed clusters"),
        (qcow2({"a": RAM})[:100], None, "truncated:"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_why(data: bytes, tag: str | None, says: str) -> None:
    with pytest.raises(StateError) as caught:
        inspect(BytesSource(data), tag)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", [(60, b"\xff\xff\xff\xff"), (64, b"\xff" * 8)])
def test_a_hostile_snapshot_table_is_refused(broken: tuple[int, bytes]) -> None:
    image = bytearray(qcow2({"a": RAM}))
    image[broken[0] : broken[0] + len(broken[1])] = broken[1]
    with pytest.raises(StateError):
        Qcow2(BytesSource(bytes(image)))


@settings(deadline=None)
@given(st.data())
def test_no_damage_raises_anything_but_a_state_error(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([MIGRATION, IMAGE])))
    for _ in range(3):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        inspect(BytesSource(bytes(whole)))
    except StateError as error:
        assert "\n" not in str(error)


MIGRATION = migration({"nvme1": STATES["nvme1"]})
IMAGE = qcow2({"a": MIGRATION})


def test_sections_before_the_ram_do_not_hinder(tmp_path: Path) -> None:
    body = dbus_body(STATES)
    early = device("0000:00:05.0/virtio-mem-early", 12)
    last = [early, device("dbus-vmstate/dbus-vmstate", len(body), "dbus-vmstate")]
    path = tmp_path / "vm"
    path.write_bytes(RAM + section(7, "dbus-vmstate/dbus-vmstate", body) + described(last))
    source = FileSource(path)
    assert [s.name for s in QemuFile(source).sections()] == ["dbus-vmstate/dbus-vmstate"]
    source.close()


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def test_the_tree_leaves_out_what_is_zero_unless_all_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "disk"
    file.write_bytes(qcow2({"t1": migration({**STATES, "swtpm": b"x"})}))
    assert command(str(file)) == 0
    short = capsys.readouterr().out
    assert command(str(file), "--all") == 0
    long = capsys.readouterr().out
    assert short.startswith("snapshot t1 (ID 1), ")
    assert f"\nnvme0: NVMe controller, saved by nvmove, {len(STATES['nvme0'])} bytes; loads\n" in short
    assert "\n  cq[4]: phase=1 cqid=4 head=1 vector=3 size=2 dma_addr=0x17cbc000\n" in short
    assert "\nswtpm: not an nvmove device\n" in short
    assert "cmbsz" not in short
    assert "cmbsz: 0" in long or "cmbsz=0" in long


def test_json_has_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "disk"
    file.write_bytes(qcow2({"t1": migration(STATES)}))
    assert command(str(file), "--json", "--snapshot", "t1") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "snapshot"
    assert shown["snapshot"]["name"] == "t1"
    assert [(d["id"], d["origin"], d["loadable"]) for d in shown["devices"]] == [
        ("nvme0", "nvmove", True),
        ("nvme1", "nvmove", True),
    ]
    state = shown["devices"][0]["state"]
    assert state.keys() >= to_tree(busy()).keys() - {
        "nvme/nvmove/irq-status",
        "nvme/nvmove/more-aers",
        "nvme/nvmove/held",
        "nvme/nvmove/doorbells",
    }
    assert state["nvme/nvmove/namespaces"]["namespaces"][0]["uuid"] == bytes(range(1, 17)).hex()


def test_a_state_that_would_not_load_is_shown_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = to_tree(busy())
    tree["cq"][1]["irq_enabled"] = 2
    file = tmp_path / "state"
    file.write_bytes(dump_stream([(Section("nvme", tree), NVME)]))
    assert command(str(file)) == 1
    assert "does not load: nvme.cq[1].irq_enabled: 2, which" in capsys.readouterr().out
    assert command(str(file), "--json") == 1
    assert json.loads(capsys.readouterr().out)["devices"][0]["problem"].startswith("nvme.cq[1].irq_enabled")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"text"), "neither a qcow2 image nor"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "file")
    with pytest.raises(UserError) as caught:
        command(str(tmp_path / "file"))
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: {says}")
    assert caught.value.status == 1
