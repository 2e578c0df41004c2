"""Run states × verbs: what QEMU's own disks allow, nvmove's do, and the state is the same after it.

No guest runs but the firmware. NVMOVE_TEST_STOCK=1 runs the rows with virtio-blk on QEMU alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nvmove.lab.machine import Machine
from nvmove.lab.migration import move_by_file, wait_run_state
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, make_image
from tests.waiting import wait

DEVICE = "virtio-blk" if os.environ.get("NVMOVE_TEST_STOCK") else "nvme"


def _stop(machine: Machine) -> None:
    machine.qmp.execute("stop")


def _panic(machine: Machine) -> None:
    """pvpanic's port; the guest says that it has panicked."""
    machine.qmp.hmp("o /b 0x505 1")


def _bark(machine: Machine) -> None:
    """ib700's port: no second is left."""
    machine.qmp.hmp("o /b 0x443 0xf")


def _reset(machine: Machine) -> None:
    """A stopped VM that is reset has not begun yet."""
    machine.qmp.execute("stop")
    machine.qmp.execute("system_reset")


def _power_off(machine: Machine) -> None:
    """ACPI's PM1a control register, as soon as the firmware has placed it: soft off."""

    def is_off() -> bool:
        machine.qmp.hmp("o /h 0x604 0x2000")
        return machine.qmp.status == "shutdown"

    wait(is_off)


STATES: dict[str, Callable[[Machine], None]] = {
    "running": lambda _machine: None,
    "paused": _stop,
    "prelaunch": _reset,
    "guest-panicked": _panic,
    "watchdog": _bark,
    "shutdown": _power_off,
}


@pytest.mark.parametrize("state", STATES)
def test_every_verb_in_every_run_state(machines: MachineFactory, tree: Sysroot, work: Path, state: str) -> None:
    image = make_image(tree, work / "d0.qcow2", "16M")
    words = [
        *(
            "-M",
            "q35",
            "-device",
            "pvpanic",
            "-device",
            "ib700",
            "-action",
            "panic=pause,watchdog=pause,shutdown=pause",
        ),
        *("-drive", f"if=none,id=d0,file={image},format=qcow2", "-device", f"{DEVICE},serial=S1,drive=d0"),
    ]
    machine = machines("a", "64M")
    machine.start(words)
    STATES[state](machine)
    wait_run_state(machine.qmp, state)
    assert machine.qmp.hmp("savevm t1") == ""
    assert machine.qmp.status == state
    assert machine.qmp.hmp("loadvm t1") == ""
    assert machine.qmp.status == state
    other = machines("b", "64M")
    move_by_file(machine, other, words)
    wait_run_state(other.qmp, state)
    assert other.quit() == 0
