"""QEMU's snapshots and block jobs on a disk that nvmove serves: the guest's I/O goes where it would on stock QEMU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image

MIB = 1 << 20


def write(machine: Machine, mib: int) -> None:
    """Write one mebibyte of the disk."""
    machine.console.check(
        f"fio --name=w --filename=/dev/nvme0n1 --rw=write --bs=64k --offset={mib}M --size=1M --direct=1"
        " --buffer_pattern=0x5a --end_fsync=1"
    )


def written(tree: Sysroot, image: Path) -> set[int]:
    """The mebibytes that lie in `image` itself, not in what backs it."""
    words = [tree.program("qemu-img"), "map", "-U", "--output=json", str(image)]
    extents = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=60).stdout)
    found: set[int] = set()
    for extent in extents:
        if extent["data"] and not extent["depth"]:
            found |= set(range(extent["start"] // MIB, -(-(extent["start"] + extent["length"]) // MIB)))
    return found


def finish(machine: Machine, job: str) -> None:
    """Complete a job that keeps two nodes in step: the other one takes the place of the first."""
    assert machine.qmp.wait_event("BLOCK_JOB_READY")["data"]["device"] == job
    machine.qmp.execute("block-job-complete", {"device": job})
    done = machine.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert "error" not in done


def shown(machine: Machine) -> tuple[str, str]:
    """The device and the image of the only disk in `query-block`."""
    (info,) = machine.qmp.execute("query-block")
    name = info["inserted"]["node-name"]
    assert f"{name}: " in machine.qmp.hmp("info block") or f"({name}): " in machine.qmp.hmp("info block")
    return info["qdev"], Path(info["inserted"]["file"]).name


@pytest.mark.parametrize("kind", ["drive", "blockdev"])
def test_io_follows_overlays_commits_and_mirrors(machine: Machine, tree: Sysroot, work: Path, kind: str) -> None:
    base, mirror = (make_image(tree, work / f"{name}.qcow2", "64M") for name in ("base", "mirror"))
    overlay = work / "overlay.qcow2"
    node = {
        "drive": disk(base, drive="node-name=base"),
        "blockdev": [
            *("-blockdev", f"driver=qcow2,node-name=base,file.driver=file,file.filename={base}"),
            *("-device", "nvme,serial=S,drive=base"),
        ],
    }[kind]
    machine.boot(["-M", "q35", *node])
    qmp = machine.qmp
    assert shown(machine) == ("nvmove0", "base.qcow2")
    write(machine, 0)
    qmp.execute(
        "blockdev-snapshot-sync",
        {"node-name": "base", "snapshot-file": str(overlay), "snapshot-node-name": "overlay"},
    )
    write(machine, 1)
    assert (written(tree, base), written(tree, overlay)) == ({0}, {1})
    assert shown(machine) == ("nvmove0", "overlay.qcow2")
    assert qmp.execute("block_resize", {"node-name": "overlay", "size": 80 * MIB}) == {}
    write(machine, 70)
    assert written(tree, overlay) == {1, 70}, "the export was given back on the overlay"
    with pytest.raises(QmpError, match="node is used as backing hd of 'overlay'"):
        qmp.execute("block_resize", {"node-name": "base", "size": 16 * MIB})
    assert qmp.execute("block_resize", {"node-name": "overlay", "size": 64 * MIB}) == {}
    qmp.execute("block-commit", {"job-id": "commit", "device": "overlay"})
    finish(machine, "commit")
    write(machine, 2)
    assert written(tree, base) == {0, 1, 2}
    qmp.execute(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "mirror", "file": {"driver": "file", "filename": str(mirror)}},
    )
    fio = Fio("v", blocks=1000, rate=300, offset=32 * MIB)
    fio.start(machine.console)
    wait_writes(machine.console, 100)
    qmp.execute("blockdev-mirror", {"job-id": "m", "device": "base", "target": "mirror", "sync": "full"})
    finish(machine, "m")
    fio.wait(machine.console)
    write(machine, 3)
    assert {0, 1, 2, 3} <= written(tree, mirror)
    assert 3 not in written(tree, base)
    assert shown(machine) == ("nvmove0", "mirror.qcow2")
    qmp.execute("nvmove-fault-add", {"op": "write", "errno": "ENOSPC", "count": 1})
    machine.console.check(
        "(sleep 1; fio --name=w --filename=/dev/nvme0n1 --rw=write --bs=4k --offset=4M --size=4k --direct=1 >/tmp/w &)"
    )
    assert qmp.wait_event("BLOCK_IO_ERROR")["data"]["node-name"] == "mirror"
    qmp.wait_event("STOP")
    qmp.execute("cont")
    assert qmp.hmp("savevm t1") == ""
    complaints = [line for line in disk_complaints(machine.console) if "rescanning" not in line]
    assert complaints == []
    assert machine.quit() == 0


def test_a_raw_image_that_is_qemus_can_be_backed_up_while_the_guest_writes(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    raw, target = make_image(tree, work / "d0.raw", "64M"), make_image(tree, work / "target.qcow2", "64M")
    machine.boot(["-M", "q35", *disk(raw, drive="node-name=n0", device="image-owner=qemu")])
    qmp = machine.qmp
    Fio("first", blocks=512).run(machine.console)
    before = raw.read_bytes()
    fio = Fio("v", blocks=1000, rate=300)
    machine.qmp.execute(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": str(target)}},
    )
    job: dict[str, Any] = {"job-id": "b", "device": "n0", "target": "t", "sync": "full", "speed": 16 * MIB}
    qmp.execute("blockdev-backup", job)
    fio.start(machine.console)
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    qmp.execute("blockdev-del", {"node-name": "t"})
    fio.wait(machine.console)
    assert qmp.hmp("savevm t1") == "Error: Device 'd0' is writable but does not support snapshots\n"
    subprocess.run(
        [tree.program("qemu-img"), "convert", "-O", "raw", str(target), str(work / "copy.raw")], check=True, timeout=60
    )
    assert (work / "copy.raw").read_bytes() == before, "as the disk was when the job began"
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_a_backup_program_reads_the_disk_as_it_was_over_nbd_while_the_guest_writes(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    image, scratch = (make_image(tree, work / f"{name}.qcow2", "64M") for name in ("d0", "scratch"))
    machine.boot(["-M", "q35", *disk(image, drive="node-name=n0")])
    qmp = machine.qmp
    Fio("first", blocks=2048).run(machine.console)
    qmp.execute("stop")
    subprocess.run(
        [tree.program("qemu-img"), "convert", "-U", "-O", "raw", str(image), str(work / "before.raw")], check=True
    )
    file = {"driver": "file", "filename": str(scratch)}
    qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "scratch", "file": file, "backing": "n0"})
    backup = {"job-id": "b", "device": "n0", "target": "scratch", "sync": "none"}
    qmp.execute("transaction", {"actions": [{"type": "blockdev-backup", "data": backup}]})
    qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(work / "nbd")}}})
    qmp.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "scratch", "name": "backup"})
    qmp.execute("cont")
    fio = Fio("v", blocks=2048, rate=400)
    fio.start(machine.console)
    wait_writes(machine.console, 2148)
    uri = f"nbd+unix:///backup?socket={work / 'nbd'}"
    copy = [tree.program("qemu-img"), "convert", "-f", "raw", "-O", "raw", uri, str(work / "copy.raw")]
    subprocess.run(copy, check=True, timeout=60)
    qmp.execute("nbd-server-stop")
    qmp.execute("block-job-cancel", {"device": "b"})
    qmp.wait_event("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED")
    qmp.execute("blockdev-del", {"node-name": "scratch"})
    assert (work / "copy.raw").read_bytes() == (work / "before.raw").read_bytes()
    fio.wait(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_commands_about_a_raw_image_of_nvmoves_say_the_way_out(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.start(["-M", "q35", *disk(make_image(tree, work / "d0.raw", "16M"), drive="node-name=n0")])
    refused = "is an image that nvmove has opened, and QEMU does not know: start with -device nvme,…,image-owner=qemu"
    for name, arguments in (
        ("drive-mirror", {"device": "d0", "target": "/x", "sync": "full"}),
        ("blockdev-mirror", {"device": "n0", "target": "t", "sync": "full"}),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "n0"}),
        ("transaction", {"actions": [{"type": "blockdev-snapshot", "data": {"node": "n0", "overlay": "x"}}]}),
    ):
        with pytest.raises(QmpError, match=refused):
            machine.qmp.execute(name, arguments)
    assert refused in machine.qmp.hmp("drive_mirror d0 /x")
    assert machine.quit() == 0
