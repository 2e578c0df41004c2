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
