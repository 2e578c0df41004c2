"""A guest that sleeps (ACPI S3, run state `suspended`) is saved, loaded and moved, and wakes up."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.migration import Traveller, wait_run_state
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image, savevm

FIO = Fio("v", blocks=256)
SLEEP = (
    "(echo deep >/sys/power/mem_sleep; echo mem >/sys/power/state; stty -echo -onlcr <>/dev/ttyS0; echo woke'-'up) &\n"
)
"""The serial port has forgotten its settings when the guest wakes up."""


@pytest.mark.timeout(900)
def test_a_guest_that_sleeps_is_asleep_after_every_verb_and_wakes_up(
    machines: MachineFactory, tree: Sysroot, work: Path
) -> None:
    """With the packed kernel: the other one does not wake up, on stock QEMU with virtio-blk neither."""
    arguments = ["-M", "q35", "-kernel", str(tree.packed_kernel), *disk(make_image(tree, work / "d0.qcow2"))]
    guest = Traveller(machines("m0"), arguments, machines)
    guest.boot()

    def wake_up() -> None:
        guest.machine.qmp.execute("system_wakeup")
        guest.machine.console.read_until("woke-up", 120)
        FIO.run(guest.machine.console)
        assert disk_complaints(guest.machine.console) == []

    FIO.run(guest.machine.console)
    guest.machine.console.send(SLEEP)
    wait_run_state(guest.machine.qmp, "suspended")
    savevm(guest.machine, "asleep")
    assert guest.machine.qmp.status == "suspended"
    wake_up()
    assert guest.machine.qmp.hmp("loadvm asleep") == ""
    assert guest.machine.qmp.status == "suspended"
    guest.hop()
    assert guest.machine.qmp.status == "suspended"
    wake_up()
    assert guest.machine.quit() == 0
