"""VMs that do not run when they move, or are not to where they arrive; who may run while both ends exist."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Traveller, wait_run_state, wait_status
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image

LOAD = Fio("v", blocks=2048, iodepth=32)


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_held_requests_and_a_pause_travel(machines: MachineFactory, tree: Sysroot, work: Path, suffix: str) -> None:
    """Twice in io-error, once paused, once to a destination with -S: nothing runs that is not told to."""
    image = make_image(tree, work / f"d0.{suffix}")
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(image, drive="werror=stop,rerror=stop")], machines)
    guest.boot()
    LOAD.start(guest.machine.console)
    wait_writes(guest.machine.console, 100)
    full = {"op": "write", "errno": "ENOSPC"}
    guest.machine.qmp.execute("nvmove-fault-add", full)
    wait_run_state(guest.machine.qmp, "io-error")
    for _ in range(2):
        guest.hop()
        assert guest.machine.qmp.status == "io-error"
        (block,) = guest.machine.qmp.execute("query-block")
        assert block["io-status"] == "nospace"
        assert "io-error" in guest.machine.qmp.hmp("info status")
    fault = guest.machine.qmp.execute("nvmove-fault-add", full)
    guest.machine.qmp.execute("cont")
    guest.machine.qmp.wait_event("BLOCK_IO_ERROR")  # tried again, held again
    wait_run_state(guest.machine.qmp, "io-error")
    guest.machine.qmp.execute("nvmove-fault-remove", {"id": fault["id"]})
    guest.machine.qmp.execute("cont")
    guest.machine.qmp.execute("stop")
    guest.hop()
    assert guest.machine.qmp.status == "paused"
    guest.machine.qmp.execute("cont")
    guest.hop("-S")
    assert guest.machine.qmp.status == "paused"
    guest.machine.qmp.execute("cont")
    LOAD.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []


def cont_when_unlocked(machine: Machine) -> None:
    """`cont`; a killed process's threads hold its locks for a moment longer than it is seen."""
    deadline = time.monotonic() + 30
    while True:
        try:
            machine.qmp.execute("cont")
        except QmpError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_one_side_runs_at_a_time(machines: MachineFactory, tree: Sysroot, work: Path, suffix: str) -> None:
    """The source cannot go on while the destination has the image; it can when the destination is gone."""
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))], machines)
    guest.boot()
    source, target = guest.machine, guest.destination()
    target.qmp.execute("migrate-incoming", {"uri": guest.uri(target)})
    source.qmp.execute("migrate", {"uri": guest.uri(target)})
    assert wait_status(source.qmp, *ENDED)["status"] == "completed"
    wait_run_state(target.qmp, "running")
    with pytest.raises(QmpError, match="lock"):
        source.qmp.execute("cont")
    assert source.qmp.status == "postmigrate"
    LOAD.run(target.console)
    target.kill()
    cont_when_unlocked(source)
    assert source.qmp.status == "running"
    Fio("w", blocks=200).run(source.console)
    assert disk_complaints(source.console) == []
