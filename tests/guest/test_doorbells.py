"""Shadow doorbells under a stock Linux: used, rarely rung, right when they travel; and a guest without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, loadvm, make_image, savevm
from tests.guest.test_checklist import assert_well

DEEP = Fio("deep", blocks=8000, iodepth=32)
SLOW = Fio("slow", blocks=1200, rate=200)
DOORBELL_WRITE = "vfio_region_write"


def arguments(tree: Sysroot, work: Path, device: str = "", image: str = "d0.qcow2") -> list[str]:
    return ["-M", "q35", "-smp", "2", *disk(make_image(tree, work / image), device=device)]


def traced(work: Path) -> list[str]:
    """Let QEMU write down every write of a region that leaves it."""
    return ["-trace", DOORBELL_WRITE, "-D", str(work / "trace")]


def writes(work: Path) -> int:
    """How many there were since the last time."""
    trace = work / "trace"
    count = trace.read_text().count(DOORBELL_WRITE)
    trace.write_text("")
    return count


def rung_per_io(machine: Machine, work: Path) -> float:
    """Doorbells by message for each of 8000 writes and 8000 reads at depth 32."""
    writes(work)
    DEEP.run(machine.console)
    return writes(work) / (2 * DEEP.blocks)


@pytest.mark.both_engines
def test_a_guest_with_shadow_doorbells_seldom_rings(tree: Sysroot, machine: Machine, work: Path) -> None:
    machine.boot([*arguments(tree, work, image="d0.img"), *traced(work)])
    assert machine.console.check("cat /sys/class/nvme/nvme0/queue_count") == "3"
    rung = rung_per_io(machine, work)
    assert_well(machine)
    assert machine.quit() == 0
    assert rung < 0.5


def test_a_guest_that_is_offered_none_works_as_before(tree: Sysroot, machine: Machine, work: Path) -> None:
    machine.boot([*arguments(tree, work, "dbcs=off", "d0.img"), *traced(work)])
    rung = rung_per_io(machine, work)
    assert rung > 0.5
    assert_well(machine)
    assert machine.quit() == 0


@pytest.mark.both_engines
@pytest.mark.parametrize("pending", [True, False], ids=["pending", "idle"])
def test_shadow_doorbells_travel(tree: Sysroot, machine: Machine, work: Path, pending: bool) -> None:
    """In place, and in new processes."""
    start = [*machine.linux, *arguments(tree, work)]
    machine.start(start)
    machine.console.wait_boot()
    SLOW.start(machine.console)
    wait_writes(machine.console, 100)
    if not pending:
        SLOW.wait(machine.console)
    savevm(machine, "t1")
    SLOW.wait(machine.console)
    loadvm(machine, "t1")
    SLOW.wait(machine.console)
    machine.kill()
    machine.start([*start, "-loadvm", "t1"])
    SLOW.wait(machine.console)
    SLOW.run(machine.console)
    assert_well(machine)
    assert machine.quit() == 0


def test_a_reset_of_the_guest_starts_them_anew(tree: Sysroot, machine: Machine, work: Path) -> None:
    machine.boot(arguments(tree, work))
    SLOW.start(machine.console)
    wait_writes(machine.console, 50)
    machine.console.check("echo 1 >/sys/class/nvme/nvme0/reset_controller", 60)
    SLOW.wait(machine.console)
    machine.qmp.execute("system_reset")
    machine.console.wait_boot()
    Fio("after", blocks=500).run(machine.console)
    assert_well(machine)
    assert machine.quit() == 0


@pytest.mark.timeout(900)
def test_qemu_works_with_mapped_doorbells(tree: Sysroot, machine: Machine, work: Path) -> None:
    """No doorbell is a message; they are right after a controller reset, a system reset, and loads."""
    start = [*machine.linux, *arguments(tree, work, "x-doorbells=mapped"), *traced(work)]
    machine.start(start)
    machine.console.wait_boot()
    assert rung_per_io(machine, work) == 0
    SLOW.start(machine.console)
    wait_writes(machine.console, DEEP.blocks + 50)
    savevm(machine, "t1")
    SLOW.wait(machine.console)
    loadvm(machine, "t1")
    SLOW.wait(machine.console)
    machine.console.check("echo 1 >/sys/class/nvme/nvme0/reset_controller", 60)
    SLOW.run(machine.console)
    machine.qmp.execute("system_reset")
    machine.console.wait_boot()
    Fio("after", blocks=500).run(machine.console)
    assert_well(machine)
    machine.kill()
    machine.start([*start, "-loadvm", "t1"])
    SLOW.wait(machine.console)
    assert_well(machine)
    assert machine.quit() == 0
