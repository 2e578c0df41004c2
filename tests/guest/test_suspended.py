"""A guest that sleeps (ACPI S3, run state `suspended`) is saved, loaded and moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.migration import Traveller, wait_run_state
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image, savevm

FIO = Fio("v", blocks=256)
SLEEP = "(sleep 1; echo deep >/sys/power/mem_sleep; echo mem >/sys/power/state) >/dev/null 2>&1 &"


@pytest.mark.timeout(900)
def test_a_guest_that_sleeps_is_asleep_after_every_verb(machines: MachineFactory, tree: Sysroot, work: Path) -> None:
    """This guest boots anew when it is woken, on stock QEMU with virtio-blk too; its disk works then."""
    arguments = ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))]
    guest = Traveller(machines("m0"), arguments, machines)
    guest.boot()
    FIO.run(guest.machine.console)
    guest.machine.console.check(SLEEP)
    wait_run_state(guest.machine.qmp, "suspended")
    savevm(guest.machine, "asleep")
    assert guest.machine.qmp.status == "suspended"
    guest.machine.qmp.execute("system_wakeup")
    wait_run_state(guest.machine.qmp, "running")
    guest.machine.console.wait_boot()
    FIO.run(guest.machine.console)
    assert guest.machine.qmp.hmp("loadvm asleep") == ""
    assert guest.machine.qmp.status == "suspended"
    guest.hop()
    assert guest.machine.qmp.status == "suspended"
    guest.machine.qmp.execute("system_wakeup")
    wait_run_state(guest.machine.qmp, "running")
    guest.machine.console.wait_boot()
    FIO.run(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []
    assert guest.machine.quit() == 0
