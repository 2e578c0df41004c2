"""Which engine serves the guests of these tests: what the environment of the whole run says, or the compiled one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.engine.choice import COMPILED, chosen
from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, front, make_image


@pytest.mark.both_engines
def test_the_engine_that_was_asked_for_serves_the_guest(
    machine: Machine, tree: Sysroot, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its process has loaded, and by what it says."""
    if not front():
        pytest.skip("QEMU's own nvme has no engine")
    monkeypatch.setenv("NVMOVE_LOG", "info")
    machine.start(["-M", "q35", "-S", *disk(make_image(tree, work / "d0.raw"))])
    loaded = Path(f"/proc/{machine.started.process.pid}/maps").read_text()
    assert ("/nvmove/engine/loop." in loaded) == (chosen() == COMPILED)
    assert f"nvmove: nvmove0: the {chosen()} engine\n" in machine.started.output
    assert machine.quit() == 0


@pytest.mark.both_engines
def test_a_disk_with_o_direct_keeps_its_data_while_the_vm_stops_and_goes_on(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    """The compiled engine has such a disk's commands under way in the kernel when it is asked to stop."""
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.raw"), drive="cache=none")])
    deep = Fio("deep", blocks=4000, iodepth=32, rate=1000)
    deep.start(machine.console)
    for done in (200, 600, 1000):
        wait_writes(machine.console, done)
        machine.qmp.execute("stop")
        machine.qmp.execute("cont")
    deep.wait(machine.console)
    Fio("single", blocks=1000, iodepth=1).run(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0
