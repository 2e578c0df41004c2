"""Migrations that are hit at every moment: one side has the guest or can have it, says so, and its disk is whole."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvmove.lab import migration
from nvmove.lab.console import Console
from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Traveller
from nvmove.lab.qmp import QmpClosed, QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image
from tests.guest.failing_disks import fault, io_status
from tests.guest.wire import Wire

LOAD = Fio("v", blocks=4096, rate=150)
SLOW, FAST = ({"max-bandwidth": bandwidth} for bandwidth in (4 << 20, 1 << 30))
MOMENTS = (0.0, 0.02, 0.08)
"""Seconds after the switch-over has begun; it takes some hundredths."""
KINDS = pytest.mark.parametrize("suffix", ["qcow2", "raw"])


wait_status = functools.partial(migration.wait_status, timeout=40)
wait_run_state = functools.partial(migration.wait_run_state, timeout=40)


class Trial:
    """One guest, under fio, whose migrations are hit."""

    def __init__(self, guest: Traveller) -> None:
        self.guest = guest
        self._wires = itertools.count()

    @classmethod
    def boot(cls, machines: MachineFactory, image: Path, options: str = "") -> Trial:
        guest = Traveller(machines("m0"), ["-M", "q35", *disk(image, drive=options)], machines)
        guest.boot()
        LOAD.start(guest.machine.console)
        return cls(guest)

    @property
    def source(self) -> Machine:
        return self.guest.machine

    def begin(self, *, slow: bool = False, through: Callable[[Path, Path], Wire] | None = None) -> Machine:
        """Start a migration; `through`: over a wire."""
        self.moves()
        self.source.qmp.execute("migrate-set-parameters", SLOW if slow else FAST)
        target = self.guest.destination()
        there = target.directory / "migration"
        target.qmp.execute("migrate-incoming", {"uri": f"unix:{there}"})
        here = there
        if through is not None:
            here = target.directory / "wire"
            self.wire = through(here, there)
        self.source.qmp.execute("migrate", {"uri": f"unix:{here}"})
        return target

    def at_switch_over(self, **how: Callable[[Path, Path], Wire]) -> Machine:
        """Start a migration, and return when everything waits for `migrate-continue`."""
        self.pause_before(True)
        target = self.begin(**how)  # type: ignore[arg-type]
        wait_status(self.source.qmp, "pre-switchover")
        return target

    def go_on(self) -> None:
        with contextlib.suppress(QmpError):  # it has failed meanwhile
            self.source.qmp.execute("migrate-continue", {"state": "pre-switchover"})

    def pause_before(self, state: bool) -> None:
        listed = [{"capability": "pause-before-switchover", "state": state}]
        self.source.qmp.execute("migrate-set-capabilities", {"capabilities": listed})

    def moves(self) -> None:
        """The guest runs, and its disk works."""
        console = self.source.console
        before, deadline = requests_done(console), time.monotonic() + 60
        while requests_done(console) < before + 10:
            assert time.monotonic() < deadline
            if LOAD.finished(console):
                LOAD.start(console)

    def settled(self, target: Machine) -> str:
        """Wait for the end; the guest is on the one side that has it from then on. Return the source's verdict."""
        status = str(wait_status(self.source.qmp, *ENDED)["status"])
        if status != "completed":
            wait_run_state(self.source.qmp, "running")
            if not target.process_ended(1):  # all had arrived there
                wait_run_state(target.qmp, "paused")
                stays_locked(target)
                target.kill()
        elif target.alive:
            wait_run_state(target.qmp, "running")
            assert self.source.qmp.status == "postmigrate"
            self.source.kill()
            self.guest.machine = target
        else:
            assert self.source.qmp.status == "postmigrate"
            revive(self.source)
        self.moves()
        return status

    def verify(self) -> None:
        LOAD.wait(self.source.console)
        assert disk_complaints(self.source.console) == []


def requests_done(console: Console) -> int:
    """Reads and writes that the guest's kernel has completed."""
    fields = console.check("cat /sys/block/nvme0n1/stat").split()
    return int(fields[0]) + int(fields[4])


def stays_locked(machine: Machine) -> None:
    """The VM cannot run: the other side has the image."""
    with pytest.raises(QmpError, match=r"lock|Migration is not finalized yet"):
        machine.qmp.execute("cont")
    assert machine.qmp.status != "running"


def revive(machine: Machine) -> None:
    """`cont`; a killed process's threads hold its locks for a moment longer than it is seen."""
    deadline = time.monotonic() + 30
    while True:
        try:
            machine.qmp.execute("cont")
        except QmpError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            assert machine.qmp.status == "running"
            return


@KINDS
def test_a_destination_that_dies_in_the_switch_over_leaves_the_guest_with_the_source(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    trial = Trial.boot(machines, make_image(tree, work / f"d0.{suffix}"))
    target = trial.at_switch_over()
    target.kill()
    trial.go_on()  # who asked for the pause is waited for, whatever has become of the other side
    assert trial.settled(target) == "failed"
    for moment in MOMENTS:
        target = trial.at_switch_over()
        trial.go_on()
        time.sleep(moment)
        target.kill()
        trial.settled(target)
    trial.verify()


@pytest.mark.parametrize("suffix", ["raw"])
def test_a_cancel_in_the_switch_over_leaves_the_guest_with_one_side(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    trial = Trial.boot(machines, make_image(tree, work / f"d0.{suffix}"))
    for moment in MOMENTS:
        target = trial.at_switch_over()
        trial.go_on()
        time.sleep(moment)
        trial.source.qmp.execute("migrate_cancel")
        trial.settled(target)
    trial.verify()


@pytest.mark.parametrize("suffix", ["qcow2"])
def test_a_network_that_is_cut_leaves_the_guest_with_one_side(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    trial = Trial.boot(machines, make_image(tree, work / f"d0.{suffix}"))
    target = trial.begin(slow=True, through=Wire)
    wait_status(trial.source.qmp, "active")
    trial.wire.cut()
    assert trial.settled(target) == "failed"

    target = trial.at_switch_over(through=Wire)
    trial.wire.cut()
    trial.go_on()
    assert trial.settled(target) == "failed"

    for moment in MOMENTS:
        target = trial.at_switch_over(through=Wire)
        trial.go_on()
        time.sleep(moment)
        trial.wire.cut()
        trial.settled(target)
    trial.verify()


@KINDS
def test_when_both_sides_have_the_guest_only_one_has_the_image(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    """All has arrived, and the network breaks before the source hears of it."""
    trial = Trial.boot(machines, make_image(tree, work / f"d0.{suffix}"))
    target = trial.at_switch_over(through=Wire)
    trial.wire.mute.set()  # the source hears of an end, and runs on; the destination comes too late
    trial.go_on()
    assert wait_status(trial.source.qmp, *ENDED)["status"] == "failed"
    wait_run_state(trial.source.qmp, "running")
    wait_run_state(target.qmp, "paused")
    stays_locked(target)
    assert [line for line in target.started.output.splitlines() if "lock" in line and line.startswith("nvmove: ")]
    target.kill()
    trial.moves()

    target = trial.at_switch_over(through=Wire)
    trial.wire.deaf.set()  # the source hears nothing while the destination takes the image
    trial.go_on()
    wait_run_state(target.qmp, "running")
    trial.wire.cut()
    wait_status(trial.source.qmp, *ENDED)
    wait_run_state(trial.source.qmp, "paused", "postmigrate", "finish-migrate")
    stays_locked(trial.source)
    trial.source.kill()
    trial.guest.machine = target
    trial.moves()
    trial.verify()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffix", ["raw"])
def test_a_source_that_dies_leaves_a_guest_that_has_arrived_or_none(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    image = make_image(tree, work / f"d0.{suffix}")
    trial = Trial.boot(machines, image)
    for moment in (None, *MOMENTS):
        if moment is None:
            target = trial.begin(slow=True)
            wait_status(trial.source.qmp, "active")
        else:
            target = trial.at_switch_over()
            trial.go_on()
            time.sleep(moment)
        trial.source.kill()
        try:
            wait_run_state(target.qmp, "running")
        except QmpClosed:
            assert target.started.wait(60) == 1
            trial = Trial.boot(machines, image)  # nothing holds the image
        else:
            trial.guest.machine = target
        trial.moves()
    trial.verify()


@pytest.mark.parametrize("suffix", ["qcow2"])
def test_a_vm_in_io_error_stays_so_when_its_destination_dies(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    trial = Trial.boot(machines, make_image(tree, work / f"d0.{suffix}"))
    source = trial.source
    rule = fault(source, op="write", errno="ENOSPC")
    wait_run_state(source.qmp, "io-error")
    for moment in (None, 0.0, 0.03):
        trial.pause_before(moment is not None)
        source.qmp.execute("migrate-set-parameters", SLOW if moment is None else FAST)
        target = trial.guest.destination()
        uri = trial.guest.uri(target)
        target.qmp.execute("migrate-incoming", {"uri": uri})
        source.qmp.execute("migrate", {"uri": uri})
        wait_status(source.qmp, "active" if moment is None else "pre-switchover")
        if moment is not None:
            trial.go_on()
            time.sleep(moment)
        target.kill()
        if wait_status(source.qmp, *ENDED)["status"] == "failed":
            assert wait_run_state(source.qmp, "io-error") == "io-error"
        assert io_status(source) == "nospace"
    source.qmp.execute("nvmove-fault-remove", {"id": rule})
    revive(source)
    trial.verify()
    assert io_status(source) == "ok"
