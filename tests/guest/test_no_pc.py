"""Machines that are no PCs: `virt` of arm64 and riscv64. Configuration space is reached by memory there (ECAM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nvmove.lab.fio import disk_complaints
from nvmove.lab.machine import ArmMachine, RiscvMachine, nvmove_command
from nvmove.lab.migration import Traveller
from nvmove.lab.processes import marked
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image, savevm

READ = "dd if=/dev/nvme0n1 bs=1M count=4 iflag=direct 2>/dev/null | md5sum"
WRITE = "dd if=/tmp/random of=/dev/nvme0n1 bs=1M oflag=direct 2>/dev/null"


@pytest.fixture(params=[ArmMachine, RiscvMachine])
def machines(request: pytest.FixtureRequest, tree: Sysroot, work: Path) -> Iterator[Callable[[str], ArmMachine]]:
    with ExitStack() as cleanup:

        def make(name: str) -> ArmMachine:
            machine: ArmMachine = request.param(work / name, tree, [*nvmove_command(), "run"])
            cleanup.callback(lambda: marked(machine.mark) == [] or pytest.fail("left running"))
            cleanup.callback(machine.kill)
            return machine

        yield make


def test_all_verbs_hold_on_a_machine_that_is_no_pc(
    machines: Callable[[str], ArmMachine], tree: Sysroot, work: Path
) -> None:
    guest = Traveller(machines("m0"), disk(make_image(tree, work / "d0.qcow2", "64M")), machines)
    guest.boot()
    guest.machine.console.check(f"dd if=/dev/urandom of=/tmp/random bs=1M count=4 2>/dev/null; {WRITE}")
    written = guest.machine.console.check(READ)
    savevm(guest.machine, "t1")
    guest.machine.console.check("dd if=/dev/zero of=/dev/nvme0n1 bs=1M count=4 oflag=direct 2>/dev/null")
    assert guest.machine.console.check(READ) != written
    assert guest.machine.qmp.hmp("loadvm t1") == ""
    assert guest.machine.console.check(READ) == written
    guest.hop()
    assert guest.machine.console.check(READ) == written
    guest.machine.console.check(WRITE)
    guest.machine.kill()
    guest.machine.start([*guest.machine.linux, *guest.arguments, "-loadvm", "t1"])
    assert guest.machine.console.check(READ) == written
    assert disk_complaints(guest.machine.console) == []
    assert guest.machine.quit() == 0
