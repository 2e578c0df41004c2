"""A disk that does not answer for longer than a guest's driver would wait: the guest sees a slow disk, and no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import QUICK, Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image
from tests.guest.failing_disks import fault, wait_hits
from tests.waiting import wait

IMPATIENT = f"{QUICK} nvme_core.io_timeout=5 nvme_core.admin_timeout=5"
"""Linux's driver aborts after 5 s, resets after 10, and waits 7.5 for RDY."""


@pytest.mark.both_engines
@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_an_impatient_driver_waits_for_a_disk_that_stalls(
    machine: Machine, tree: Sysroot, work: Path, suffix: str
) -> None:
    """The VM stands still when the driver aborts, and at whatever it does next, until the disk answers."""
    machine.append = IMPATIENT
    machine.boot(["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))])
    qmp, console = machine.qmp, machine.console
    fio = Fio("v", blocks=800, rate=200)
    fio.start(console)
    wait_writes(console, 100)
    rule = fault(machine, op="write", delay="3600s")
    wait_hits(machine, rule, 1)
    stalled = qmp.wait_event("NVMOVE_DISK_STALLED")["data"]
    assert stalled == {"qom-path": "/machine/peripheral/nvmove0", "stalled": True}
    wait(lambda: qmp.status == "paused")
    qmp.events.clear()
    qmp.execute("nvmove-fault-remove", {"id": rule})
    qmp.wait_event("RESUME")
    fio.wait(console)
    assert qmp.status == "running"
    expected = "timeout, aborting|Abort status|ommand line: "
    assert [line for line in disk_complaints(console) if not re.search(expected, line)] == []
    assert machine.quit() == 0


@pytest.mark.both_engines
@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
@pytest.mark.parametrize("kind", ["system_reset", "flr"])
def test_a_reset_waits_for_reads_at_a_disk_that_stalls(
    machine: Machine, tree: Sysroot, work: Path, kind: str, suffix: str
) -> None:
    """For longer than QEMU's own five seconds, which it says nothing of; the guest's disk works after it."""
    machine.boot(["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))])
    qmp, console = machine.qmp, machine.console
    rule = fault(machine, op="read", delay="8s", count=16)
    reads = (
        "fio --name=r --filename=/dev/nvme0n1 --rw=read --bs=1M --size=16M --iodepth=16 --ioengine=libaio --direct=1"
    )
    console.check(f"({reads} >/dev/null 2>&1 &)")
    wait_hits(machine, rule, 16)
    if kind == "system_reset":
        qmp.execute("system_reset")
        console.wait_boot()
    else:
        function = console.check("basename $(readlink /sys/class/nvme/nvme0/device)")
        console.check(f"echo 1 >/sys/bus/pci/devices/{function}/reset", 120)
    console.check("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct", 120)
    Fio("after", blocks=256).run(console)
    assert machine.quit() == 0
    assert machine.started.output == ""
