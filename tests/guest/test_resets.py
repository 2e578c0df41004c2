"""Resets, by the guest and by the monitor: the disk is there again each time, and saves and loads afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, loadvm, make_image, savevm
from tests.waiting import wait


@pytest.mark.timeout(900)
def test_reboot_and_system_reset(machine: Machine, tree: Sysroot, work: Path) -> None:
    arguments = ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))]
    machine.boot(arguments)
    for number in range(2):
        Fio(f"before{number}", blocks=256).run(machine.console)
        machine.console.send("reboot -f\n")
        machine.console.wait_boot()
        assert disk_complaints(machine.console) == []

    # In the midst of I/O, without a warning.
    Fio("cut", blocks=20000).start(machine.console)
    wait_writes(machine.console, 100)
    machine.qmp.execute("system_reset")
    machine.console.wait_boot()
    Fio("after", blocks=256).run(machine.console)
    assert disk_complaints(machine.console) == []

    # And a moment before the reset can be gone back to, after it.
    fio = Fio("v", blocks=800, rate=200)
    fio.start(machine.console)
    wait_writes(machine.console, 200)
    savevm(machine, "t1")
    machine.qmp.execute("system_reset")
    machine.console.wait_boot()
    loadvm(machine, "t1")
    fio.wait(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_a_reset_in_the_midst_of_deep_writes_is_answered_at_once(machine: Machine, tree: Sysroot, work: Path) -> None:
    """QEMU waits for it in its main loop; nothing that the device waits for may need that loop."""
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "1G"))])
    for _ in range(2):
        machine.console.send(
            "fio --name=w --filename=/dev/nvme0n1 --rw=randwrite --bs=64k --iodepth=32 --ioengine=libaio --direct=1"
            " --time_based --runtime=600 >/dev/null 2>&1 &\n"
        )
        wait_written(machine, 64 << 20)
        machine.qmp.execute("system_reset")
        machine.console.wait_boot()
    Fio("after", blocks=256).run(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0
    assert machine.started.output == ""


def wait_written(machine: Machine, size: int) -> None:
    """Wait until the guest has written `size` bytes more to its disk."""

    def written() -> int:
        (row,) = (one for one in machine.qmp.execute("query-blockstats") if one["device"] == "d0")
        return int(row["stats"]["wr_bytes"])

    start = written()
    wait(lambda: written() >= start + size, 60)


def test_the_guest_resets_the_controller(machine: Machine, tree: Sysroot, work: Path) -> None:
    """Controller reset under I/O, rescan, unbind and bind, function-level reset: what Linux does, Linux survives."""
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))])
    console = machine.console
    Fio("v", blocks=800, rate=200).start(console)
    wait_writes(console, 200)
    console.check("nvme reset /dev/nvme0")
    Fio("v", blocks=800, rate=200).wait(console)
    console.check("nvme ns-rescan /dev/nvme0")

    address = console.check("basename $(readlink /sys/class/nvme/nvme0/device)")
    console.check(f"cd /sys/bus/pci/drivers/nvme; echo {address} >unbind; echo {address} >bind")
    console.check("for i in $(seq 100); do [ -b /dev/nvme0n1 ] && break; sleep 0.1; done; [ -b /dev/nvme0n1 ]")
    console.check(f"echo 1 >/sys/bus/pci/devices/{address}/reset")
    Fio("after", blocks=256).run(console)
