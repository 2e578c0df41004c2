"""One end dies, or the way between them, at any stage: one side has the guest and its disk, and only one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Cable, Traveller, qemu_of, wait_run_state, wait_status
from nvmove.lab.qmp import QmpClosed, QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image


def set_up(machine: Machine, *, pause: bool, slow: bool) -> None:
    machine.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4 << 20 if slow else 1 << 30})
    listed = [{"capability": "pause-before-switchover", "state": pause}]
    machine.qmp.execute("migrate-set-capabilities", {"capabilities": listed})


class Deaths:
    """The guest stays on its machine through all of this. Each trial takes away a destination of its own."""

    def __init__(self, guest: Traveller, suffix: str) -> None:
        self.guest = guest
        self.source = guest.machine
        self.suffix = suffix

    def begin(self, *, pause: bool = False, slow: bool = False, cable: bool = False) -> tuple[Machine, Cable | None]:
        target = self.guest.destination()
        set_up(self.source, pause=pause, slow=slow)
        there = target.directory / "migration"
        target.qmp.execute("migrate-incoming", {"uri": f"unix:{there}"})
        between = Cable(target.directory / "cable", there) if cable else None
        self.source.qmp.execute("migrate", {"uri": f"unix:{target.directory / 'cable'}" if cable else f"unix:{there}"})
        wait_status(self.source.qmp, "pre-switchover" if pause else "active")
        return target, between

    def stays(self, status: str) -> None:
        answer = wait_status(self.source.qmp, *ENDED)
        assert answer["status"] == status, answer
        wait_run_state(self.source.qmp, "running")

    def switching(self) -> tuple[Machine, Cable, int]:
        """The source has sent all, the destination's QEMU has not looked at it yet."""
        target, cable = self.begin(pause=True, cable=True)
        assert cable is not None
        pid = qemu_of(target)
        os.kill(pid, signal.SIGSTOP)
        self.source.qmp.execute("migrate-continue", {"state": "pre-switchover"})
        wait_status(self.source.qmp, "device")
        return target, cable, pid

    def destination_may_not_run(self, target: Machine) -> None:
        """It ends, or it stays stopped, and cannot be continued."""
        deadline = time.monotonic() + 60
        status = "inmigrate"
        while target.alive:
            assert time.monotonic() < deadline
            with contextlib.suppress(QmpClosed):
                status = target.qmp.status
            if status != "inmigrate":
                assert status == "paused"
                with pytest.raises(QmpError, match="lock"):
                    target.qmp.execute("cont")
                break
            time.sleep(0.1)
        target.kill()

    # the trials

    def the_cable_in_precopy(self) -> None:
        target, cable = self.begin(slow=True, cable=True)
        assert cable is not None
        cable.cut()
        self.stays("failed")
        assert target.started.wait(60) == 1

    def nvmove_at_the_destination_in_precopy(self) -> None:
        target, _ = self.begin(slow=True)
        target.started.process.kill()
        self.stays("failed")

    def the_destination_in_the_pause(self) -> None:
        target, _ = self.begin(pause=True)
        target.kill()
        self.source.qmp.execute("migrate-continue", {"state": "pre-switchover"})
        self.stays("failed")

    def the_destination_in_the_switch_over(self) -> None:
        target, _, _ = self.switching()
        target.kill()
        self.stays("failed")

    def the_cable_in_the_switch_over(self) -> None:
        target, cable, pid = self.switching()
        cable.cut()
        self.stays("failed")
        os.kill(pid, signal.SIGCONT)
        self.destination_may_not_run(target)

    def the_answer_in_the_switch_over(self) -> None:
        """The destination gets everything and cannot say so: both could run now."""
        target, cable, pid = self.switching()
        cable.cut(at_the_source=True)
        self.stays("failed")
        os.kill(pid, signal.SIGCONT)
        self.destination_may_not_run(target)
        cable.cut()

    def a_cancel_in_the_switch_over(self) -> None:
        target, cable, pid = self.switching()
        self.source.qmp.execute("migrate_cancel", timeout=20)
        self.stays("cancelled")
        os.kill(pid, signal.SIGCONT)
        self.destination_may_not_run(target)
        cable.cut()


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_the_source_has_the_guest(machines: MachineFactory, tree: Sysroot, work: Path, suffix: str) -> None:
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))], machines)
    guest.boot()
    console = guest.machine.console
    deaths = Deaths(guest, suffix)
    load = Fio("v", blocks=4096, rate=100)
    load.start(console)
    done = 0
    trials: tuple[Callable[[], None], ...] = (
        deaths.the_cable_in_precopy,
        deaths.nvmove_at_the_destination_in_precopy,
        deaths.the_destination_in_the_pause,
        deaths.the_destination_in_the_switch_over,
        deaths.the_cable_in_the_switch_over,
        deaths.the_answer_in_the_switch_over,
        deaths.a_cancel_in_the_switch_over,
    )
    for trial in trials:
        done = wait_writes(console, done + 20)
        trial()
        done = wait_writes(console, done + 1)
        if load.finished(console):
            load.start(console)
    load.wait(console)
    assert disk_complaints(console) == []


@pytest.mark.parametrize("when", ["precopy", "pause"])
def test_a_destination_whose_source_dies_ends(machines: MachineFactory, tree: Sysroot, work: Path, when: str) -> None:
    """What was not handed over is lost with the source; the image is not, and free."""
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(make_image(tree, work / "d0.raw"))], machines)
    guest.machine.start([*guest.machine.linux, *guest.arguments])
    target, _ = Deaths(guest, "raw").begin(pause=when == "pause", slow=when == "precopy")
    guest.machine.kill()
    assert target.started.wait(60) == 1
    assert "Traceback" not in target.started.output
    target.start([*target.linux, *guest.arguments, "-S"])
    assert target.quit() == 0
