"""A guest under fio moves from process to process: every page, every queue, every byte on its disk arrives."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.migration import Traveller
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image

FIO = Fio("v", blocks=1200, rate=200)


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_a_guest_under_fio_moves_and_its_data_verifies(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    arguments = ["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))]
    guest = Traveller(machines("m0"), arguments, machines)
    guest.boot()
    FIO.start(guest.machine.console)
    wait_writes(guest.machine.console, 300)
    guest.hop()
    assert guest.machine.qmp.status == "running"
    FIO.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []
    assert guest.machine.quit() == 0


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_ten_hops_at_queue_depth_32_with_two_cpus(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    """Every generation of processes takes over from the last one; the guest notices nothing."""
    arguments = ["-M", "q35", "-smp", "2", *disk(make_image(tree, work / f"d0.{suffix}"))]
    guest = Traveller(machines("m0"), arguments, machines)
    guest.boot()
    loads = [Fio(f"v{n}", blocks=4096, iodepth=32, offset=n * 32 << 20) for n in range(2)]
    for load in loads:
        load.start(guest.machine.console)
    at_boot = disk_complaints(guest.machine.console)  # a BIOS bug, of two CPUs
    done = 0
    for _ in range(10):
        done = wait_writes(guest.machine.console, done + 200)
        guest.hop()
        assert guest.machine.qmp.status == "running"
        for load in loads:
            if load.finished(guest.machine.console):
                load.start(guest.machine.console)
    for load in loads:
        load.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == at_boot
