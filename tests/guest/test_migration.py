"""A guest under fio moves from process to process: every page, every queue, every byte on its disk arrives."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes, writes_done
from nvmove.lab.migration import Traveller
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image

FIO = Fio("v", blocks=1200, rate=200)


@pytest.mark.parametrize("suffix", ["qcow2", pytest.param("raw", marks=pytest.mark.both_engines)])
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("suffix", "hops"), [("qcow2", 10), ("raw", 4)])
def test_hops_at_queue_depth_32_with_two_cpus(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str, hops: int
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
    for _ in range(hops):
        done = wait_writes(guest.machine.console, done + 200)
        guest.hop()
        assert guest.machine.qmp.status == "running"
        for load in loads:
            if load.finished(guest.machine.console):
                load.start(guest.machine.console)
    for load in loads:
        load.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == at_boot


@pytest.mark.parametrize("machine_type", ["pc", "q35-root-port"])
def test_two_disks_move_together_wherever_they_are_on_the_bus(
    machines: MachineFactory, tree: Sysroot, work: Path, machine_type: str
) -> None:
    """One that QEMU keeps and one that nvmove does; on i440fx, and behind a root port whose bus the guest numbers."""
    images = [make_image(tree, work / name) for name in ("d0.qcow2", "d1.raw")]
    ports = ["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"]
    first = disk(images[0], device="bus=rp0" if machine_type != "pc" else "")
    bus = ["-M", "pc"] if machine_type == "pc" else ["-M", "q35", *ports]
    guest = Traveller(machines("m0"), [*bus, *first, *disk(images[1], "d1")], machines)
    guest.boot()
    loads = [Fio(f"v{n}", device=f"/dev/nvme{n}n1", blocks=2400, rate=100, iodepth=8) for n in range(2)]
    for load in loads:
        load.start(guest.machine.console)
    for _ in range(2):
        wait_writes(guest.machine.console, writes_done(guest.machine.console) + 50)
        guest.hop()
    for load in loads:
        load.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []


@pytest.mark.timeout(900)
def test_idle_for_70_seconds_after_a_move_and_then_io(machines: MachineFactory, tree: Sysroot, work: Path) -> None:
    """Two of Linux's 30 s time-outs: a completion, an interrupt or an event that was lost would show in dmesg."""
    arguments = ["-M", "q35", *disk(make_image(tree, work / "d0.raw"))]
    guest = Traveller(machines("m0"), arguments, machines)
    guest.boot()
    Fio("before", blocks=200).run(guest.machine.console)
    guest.hop()
    guest.machine.console.check("sleep 70", timeout=400)
    assert disk_complaints(guest.machine.console) == []
    Fio("after", blocks=200).run(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []
