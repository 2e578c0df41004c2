"""`block_resize` under I/O: the guest sees the new size, and its I/O goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image

MIB = 1 << 20


def wait_size(machine: Machine, size: int, timeout: float = 60) -> None:
    """Wait until the guest's kernel gives its disk so many bytes."""
    deadline = time.monotonic() + timeout
    while (seen := int(machine.console.check("cat /sys/block/nvme0n1/size")) * 512) != size:
        assert time.monotonic() < deadline, f"the guest sees {seen} bytes, expected {size}"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_the_guest_sees_the_new_size_under_io(machine: Machine, tree: Sysroot, work: Path, kind: str) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / f"d0.{kind}", "32M"))])
    fio = Fio("v", blocks=1200, rate=200)
    fio.start(machine.console)
    wait_writes(machine.console, 100)
    assert machine.qmp.execute("block_resize", {"device": "d0", "size": 64 * MIB}) == {}
    wait_size(machine, 64 * MIB)
    assert machine.qmp.status == "running"
    assert not any(event["event"] == "BLOCK_EXPORT_DELETED" for event in machine.qmp.events)
    assert machine.qmp.hmp("block_resize d0 48") == ""
    wait_size(machine, 48 * MIB)
    fio.wait(machine.console)
    Fio("end", blocks=256, offset=47 * MIB).run(machine.console)
    machine.qmp.execute("stop")
    assert machine.qmp.hmp("block_resize d0 80M") == ""
    machine.qmp.execute("cont")
    wait_size(machine, 80 * MIB)
    Fio("last", blocks=256, offset=79 * MIB).run(machine.console)
    (block,) = (info for info in machine.qmp.execute("query-block") if info["device"] == "d0")
    assert block["inserted"]["image"]["virtual-size"] == 80 * MIB
    complaints = [line for line in disk_complaints(machine.console) if "rescanning" not in line]
    assert complaints == []
    assert machine.quit() == 0


def test_a_snapshot_of_another_size_loads_when_the_disk_has_that_size_again(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    machine.start(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "16M"))])
    assert machine.qmp.hmp("savevm t1") == ""
    assert machine.qmp.hmp("block_resize d0 32M") == ""
    assert "Could not load snapshot 't1' on 'd0'" in machine.qmp.hmp("loadvm t1")
    assert machine.qmp.status == "running"
    assert machine.qmp.hmp("block_resize d0 16M") == ""
    assert machine.qmp.hmp("loadvm t1") == ""
    assert machine.qmp.status == "running"
    assert machine.quit() == 0


def test_a_snapshot_of_two_disks_loads_after_each_was_resized_and_has_its_size_again(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    """The VM's state is on one of them, and QEMU looks only at what it takes for the first."""
    images = {name: make_image(tree, work / f"{name}.qcow2", "16M") for name in ("d0", "d1")}
    machine.start(["-M", "q35", *(word for name, path in images.items() for word in disk(path, name))])
    assert machine.qmp.hmp("savevm t1") == ""
    for name in images:
        for size in ("32M", "16M"):
            assert machine.qmp.hmp(f"block_resize {name} {size}") == ""
        assert machine.qmp.hmp("loadvm t1") == ""
    assert machine.qmp.status == "running"
    assert machine.quit() == 0
