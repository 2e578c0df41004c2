"""A disk behind a virtual IOMMU that the guest uses: it is saved, reverted in place, loaded anew and moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import QUICK, Machine
from nvmove.lab.migration import Traveller
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, loadvm, make_image, savevm

FIO = Fio("v", blocks=1200, rate=100)
IOMMU = {
    "asked-for": "intel-iommu,intremap=on,caching-mode=on",
    "as-people-publish-it": "intel-iommu,intremap=on",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", IOMMU)
def test_all_verbs_hold_where_the_guest_maps_what_the_disk_may_reach(
    machines: MachineFactory, tree: Sysroot, work: Path, how: str
) -> None:
    image = make_image(tree, work / "d0.qcow2")
    arguments = ["-M", "q35,kernel-irqchip=split", "-device", IOMMU[how], *disk(image)]

    def make(name: str) -> Machine:
        machine = machines(name)
        machine.append = f"{QUICK} intel_iommu=on iommu.passthrough=0"
        return machine

    guest = Traveller(make("m0"), arguments, make)
    guest.boot()
    console = guest.machine.console
    assert console.check("cat /sys/class/nvme/nvme0/device/iommu_group/type").startswith("DMA")
    FIO.start(console)
    wait_writes(console, 200)
    savevm(guest.machine, "t1")
    assert not FIO.finished(console)
    loadvm(guest.machine, "t1")
    wait_writes(guest.machine.console, 300)
    guest.hop()
    assert guest.machine.qmp.status == "running"
    FIO.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []
    warned = "caching-mode=on added" in guest.machine.started.output
    assert warned == ("caching-mode" not in IOMMU[how])
    guest.machine.kill()
    guest.machine.start([*guest.machine.linux, *arguments, "-loadvm", "t1"])
    FIO.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []
    assert guest.machine.quit() == 0
