"""Migrations that end otherwise than by arriving: the source has the guest, running, and its disk is whole."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvmove.lab.console import Console
from nvmove.lab.fio import Fio, disk_complaints, writes_done
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Traveller, wait_run_state, wait_status
from nvmove.lab.qmp import QmpError, connect_unix
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image

SLOW = {"max-bandwidth": 4 << 20}
"""Pre-copy of a guest that writes takes as long as the test wants."""
FAST = {"max-bandwidth": 1 << 30}


def migrate(guest: Traveller, target: Machine) -> None:
    target.qmp.execute("migrate-incoming", {"uri": guest.uri(target)})
    guest.machine.qmp.execute("migrate", {"uri": guest.uri(target)})


def pause_capability(machine: Machine, state: bool) -> None:
    listed = [{"capability": name, "state": state} for name in ("pause-before-switchover", "events")]
    machine.qmp.execute("migrate-set-capabilities", {"capabilities": listed})


def statuses(machine: Machine) -> list[str]:
    machine.qmp.execute("query-status")  # takes what has come
    seen = [event["data"]["status"] for event in machine.qmp.events if event["event"] == "MIGRATION"]
    machine.qmp.events.clear()
    return seen


class Ends:
    """The guest stays on its first machine whatever is tried."""

    def __init__(self, guest: Traveller) -> None:
        self.guest = guest
        self.source = guest.machine

    def stays(self, status: str) -> None:
        answer = wait_status(self.source.qmp, *ENDED)
        assert answer["status"] == status, answer
        wait_run_state(self.source.qmp, "running")

    def destination_refuses(self) -> None:
        """The other end has another disk; it says so in one line, and ends with status 1."""
        other = [word.replace("serial=S-d0", "serial=S-other") for word in self.guest.arguments]
        target = self.guest.destination(arguments=other)
        migrate(self.guest, target)
        assert target.started.wait(60) == 1
        lines = [line for line in target.started.output.splitlines() if line.startswith("nvmove: ")]
        reason = "nvmove0: serial is 'S-other' here, and was 'S-d0' when saved"
        assert lines == [f"nvmove: the VM that arrives does not fit: {reason}"]
        self.stays("failed")

    def destination_has_one_device_less(self) -> None:
        target = self.guest.destination(arguments=[*self.guest.arguments, "-device", "nvme,serial=X"])
        migrate(self.guest, target)
        assert target.started.wait(60) == 1
        self.stays("failed")

    def destination_dies_in_precopy(self) -> None:
        self.source.qmp.execute("migrate-set-parameters", SLOW)
        target = self.guest.destination()
        migrate(self.guest, target)
        wait_status(self.source.qmp, "active")
        target.kill()
        self.stays("failed")

    def cancelled_in_precopy(self) -> None:
        self.source.qmp.execute("migrate-set-parameters", SLOW)
        target = self.guest.destination()
        migrate(self.guest, target)
        wait_status(self.source.qmp, "active")
        assert self.source.qmp.hmp("savevm t1").startswith("Error: ")
        self.source.qmp.execute("migrate_cancel")
        self.stays("cancelled")
        target.started.wait(60)

    def cancelled_in_the_users_pause(self) -> None:
        self.source.qmp.execute("migrate-set-parameters", FAST)
        pause_capability(self.source, True)
        target = self.guest.destination()
        migrate(self.guest, target)
        wait_status(self.source.qmp, "pre-switchover")
        assert self.source.qmp.status == "finish-migrate"
        self.source.qmp.execute("migrate_cancel")
        self.stays("cancelled")
        assert statuses(self.source) == ["setup", "active", "pre-switchover", "cancelling", "cancelled"]
        target.started.wait(60)
        pause_capability(self.source, False)

    def nobody_listens(self) -> None:
        self.source.qmp.execute("migrate", {"uri": f"unix:{self.source.directory / 'nobody'}"})
        self.stays("failed")
        with pytest.raises(QmpError, match="unknown migration protocol"):
            self.source.qmp.execute("migrate", {"uri": "bogus:"})
        self.stays("failed")

    def cancelled_while_io_does_not_end(self) -> None:
        """A disk that does not answer holds up the pause, not the user."""
        qmp = self.source.qmp
        qmp.execute("migrate-set-parameters", FAST)
        fault = qmp.execute("nvmove-fault-add", {"op": "write", "delay": "600s", "count": 1})
        target = self.guest.destination()
        migrate(self.guest, target)
        wait_run_state(qmp, "finish-migrate")
        qmp.execute("migrate_cancel", timeout=10)
        self.stays("cancelled")
        qmp.execute("nvmove-fault-remove", {"id": fault["id"]})
        target.started.wait(60)


def keep_writing(console: Console, load: Fio, count: int) -> int:
    """Wait for `count` writes, and return how many there were; a load that a slow trial has seen end begins anew."""
    deadline = time.monotonic() + 120
    while (done := writes_done(console)) < count:
        assert time.monotonic() < deadline, f"{done} writes; {count} were expected"
        if load.finished(console):
            load.start(console)
        time.sleep(0.1)
    return done


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_the_source_runs_on(machines: MachineFactory, tree: Sysroot, work: Path, suffix: str) -> None:
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))], machines)
    guest.boot()
    console = guest.machine.console
    ends = Ends(guest)
    load = Fio("v", blocks=4096, rate=100)
    load.start(console)
    done = 0
    trials: tuple[Callable[[], None], ...] = (
        ends.destination_refuses,
        ends.destination_has_one_device_less,
        ends.destination_dies_in_precopy,
        ends.cancelled_in_precopy,
        ends.cancelled_in_the_users_pause,
        ends.nobody_listens,
        ends.cancelled_while_io_does_not_end,
    )
    for trial in trials:
        done = keep_writing(console, load, done + 30)
        trial()
        keep_writing(console, load, done + 1)
    guest.machine.qmp.execute("migrate-set-parameters", FAST)
    guest.hop()
    load.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []


def test_hmp_shows_progress_and_waits(machines: MachineFactory, tree: Sysroot, work: Path) -> None:
    """`migrate` without -d holds its terminal until the end, here a cancel from another; then one that arrives."""
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(make_image(tree, work / "d0.raw"))], machines)
    monitor = work / "hmp"
    guest.machine.start([*guest.machine.linux, *guest.arguments, "-monitor", f"unix:{monitor},server=on,wait=off"])
    qmp = guest.machine.qmp
    terminal = Console(connect_unix(monitor, 30, lambda: guest.machine.alive))
    terminal.read_until(re.escape("(qemu) "), 30)
    target = guest.destination()
    target.qmp.execute("migrate-incoming", {"uri": guest.uri(target)})
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 10})
    terminal.send(f"migrate {guest.uri(target)}\n")
    terminal.read_until(r"active: \d+ %, .* sent, .* left, \d+ pages", 60)
    qmp.execute("migrate_cancel")
    terminal.read_until("migration cancelled\n", 60)
    terminal.read_until(re.escape("(qemu) "), 30)
    target.kill()
    target = guest.destination()
    target.qmp.execute("migrate-incoming", {"uri": guest.uri(target)})
    qmp.execute("migrate-set-parameters", FAST)
    terminal.send(f"migrate {guest.uri(target)}\n")
    before, _ = terminal.read_until(re.escape("(qemu) "), 60)
    assert "rror" not in before
    terminal.send("info migrate\n")
    terminal.read_until(r"Status: \s*completed", 30)
    terminal.read_until(r"nvmove marking: \s*pages=\d+, time \(ms\)=\d+\n", 30)
    terminal.close()
    wait_run_state(target.qmp, "running")
