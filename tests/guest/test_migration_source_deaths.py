"""One of the source's processes dies while a destination waits for the switch-over: neither side is left half-way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nvmove.lab.processes import marked, wait_gone
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("victim", ["nvmove", "qemu"])
def test_both_sides_end_and_the_image_can_be_used_again(
    machines: MachineFactory, tree: Sysroot, work: Path, kind: str, victim: str
) -> None:
    arguments = ["-M", "q35", *disk(make_image(tree, work / f"d0.{kind}", "16M"))]
    source, destination = machines("s"), machines("d")
    source.start(arguments)
    destination.start([*arguments, "-incoming", f"unix:{work}/m"])
    both = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
    source.qmp.execute("migrate-set-capabilities", {"capabilities": both})
    source.qmp.execute("migrate", {"uri": f"unix:{work}/m"})
    while source.qmp.wait_event("MIGRATION")["data"]["status"] != "pre-switchover":
        pass
    own = source.started.process.pid
    qemus = [one.pid for one in marked(source.mark) if one.pid != own and "-display" in one.command]
    os.kill(own if victim == "nvmove" else qemus[-1], signal.SIGKILL)
    assert source.started.wait(60) == (-signal.SIGKILL if victim == "nvmove" else 128 + signal.SIGKILL)
    assert wait_gone(source.mark, 60) == []
    assert destination.started.wait(60) == 1
    assert "load of migration failed" in destination.started.output
    assert "Traceback" not in source.started.output + destination.started.output
    source.start(arguments)
    assert source.quit() == 0
