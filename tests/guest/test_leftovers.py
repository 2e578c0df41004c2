"""Nothing is left: whichever process dies, however it dies, the others end and their files go."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, wait_writes
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine
from nvmove.lab.processes import Process, marked, wait_gone
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import assert_nothing_left, disk, make_image

END = 30
"""Seconds within which everything has ended, on a loaded machine."""


@pytest.fixture
def arguments(tree: Sysroot, work: Path) -> list[str]:
    return ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2")), *disk(make_image(tree, work / "d1.raw"), "d1")]


def of_program(machine: Machine, name: str) -> Process:
    """The one process of the VM whose program is `name`."""
    found = [
        process for process in marked(machine.mark) if f"--argv0 {machine.sysroot.program(name)} " in process.command
    ]
    assert len(found) == 1, found
    return found[0]


def busy(machine: Machine, arguments: list[str]) -> None:
    machine.boot(arguments)
    Fio("busy", blocks=30000).start(machine.console)
    wait_writes(machine.console, 100)


def test_quit_leaves_nothing(machine: Machine, arguments: list[str], work: Path) -> None:
    before = Surroundings.look(work)
    busy(machine, arguments)
    assert machine.quit() == 0
    assert_nothing_left(machine, before)


def test_the_guest_powers_off(machine: Machine, arguments: list[str], work: Path) -> None:
    before = Surroundings.look(work)
    machine.boot(arguments)
    machine.console.send("poweroff -f\n")
    assert machine.started.wait(END) == 0
    machine.hang_up()
    assert_nothing_left(machine, before)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_vm_cleanly(machine: Machine, arguments: list[str], work: Path, sig: signal.Signals) -> None:
    before = Surroundings.look(work)
    busy(machine, arguments)
    machine.started.process.send_signal(sig)
    assert machine.started.wait(END) in {0, 128 + sig}
    machine.hang_up()
    assert_nothing_left(machine, before)


def test_qemu_killed_ends_nvmove(machine: Machine, arguments: list[str], work: Path) -> None:
    before = Surroundings.look(work)
    busy(machine, arguments)
    os.kill(of_program(machine, "qemu-system-x86_64").pid, signal.SIGKILL)
    assert machine.started.wait(END) == 128 + signal.SIGKILL
    machine.hang_up()
    assert_nothing_left(machine, before)


def test_nvmove_killed_ends_qemu_and_the_next_start_cleans_up(
    machine: Machine, arguments: list[str], work: Path
) -> None:
    before = Surroundings.look(work)
    busy(machine, arguments)
    machine.started.process.kill()
    machine.started.wait(END)
    assert wait_gone(machine.mark, END) == []
    machine.hang_up()
    machine.boot(arguments)
    assert machine.quit() == 0
    assert_nothing_left(machine, before)


def test_dbus_daemon_killed_leaves_a_vm_that_runs_and_refuses_to_save(
    machine: Machine, arguments: list[str], work: Path
) -> None:
    before = Surroundings.look(work)
    machine.boot(arguments[:6])
    os.kill(of_program(machine, "dbus-daemon").pid, signal.SIGKILL)
    Fio("v", blocks=256).run(machine.console)
    said = machine.qmp.hmp("savevm t1")
    assert re.fullmatch(r"Error: dbus-daemon \(pid \d+\), .* ended with status -9: .* until it is started anew\n", said)
    assert "t1" not in machine.qmp.hmp("info snapshots")
    Fio("w", blocks=256).run(machine.console)
    assert machine.quit() == 0
    assert_nothing_left(machine, before)
