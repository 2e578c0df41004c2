"""What others forgot, on a real guest, where a unit test cannot show it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from nvmove.lab.console import READY
from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Traveller, migrate_status, wait_run_state, wait_status
from nvmove.lab.sysroot import Sysroot
from nvmove.vm.moves.pciaddress import CONFIG_ADDRESS, CONFIG_DATA, find
from nvmove.vm.moves.replay import MSIX_CONTROL, MSIX_FUNCTION_MASK
from tests.guest.conftest import MachineFactory, disk, loadvm, make_image, savevm

FIO = Fio("v", blocks=900, rate=200)


@pytest.fixture
def arguments(tree: Sysroot, work: Path) -> list[str]:
    return ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "64M"))]


def linux(machine: Machine, parameters: str) -> list[str]:
    """The sysroot's Linux with more kernel parameters."""
    return [f"{word} {parameters}" if "console=" in word else word for word in machine.linux]


def start_linux(machine: Machine, arguments: Sequence[str]) -> None:
    machine.start(arguments)
    machine.console.wait_boot()


def assert_well(machine: Machine, *runs: Fio) -> None:
    for fio in runs:
        fio.wait(machine.console)
    assert disk_complaints(machine.console) == []


def wait_ready(machine: Machine) -> None:
    """Wait for the shell of a guest that boots; when it does not come, say whether its CPU runs, and where it is."""
    try:
        machine.console.read_until(READY, 240)
        machine.console.read_until("guest# ", 60)
    except TimeoutError as error:
        where = [machine.qmp.hmp("info registers").split("CR0")[0] for _ in range(3)]
        raise TimeoutError(f"{error}; {machine.qmp.hmp('info status')}; {where}") from None


def test_intx_survives_loadvm_in_place_and_in_new_processes(machine: Machine, arguments: list[str]) -> None:
    """Saved with the pin up, as it mostly is under fast I/O."""
    fio = Fio("v", blocks=4000)
    start = [*linux(machine, "pci=nomsi"), *arguments]
    start_linux(machine, start)
    assert "MSI" not in machine.console.check("grep nvme /proc/interrupts")
    fio.start(machine.console)
    wait_writes(machine.console, 60)
    machine.qmp.execute("stop")
    savevm(machine, "t1")
    machine.qmp.execute("cont")
    assert_well(machine, fio)
    loadvm(machine, "t1")
    assert_well(machine, fio)
    machine.kill()
    machine.start([*start, "-loadvm", "t1"])
    assert_well(machine, fio)
    idle = "grep nvme /proc/interrupts | tr -s ' ' | cut -d' ' -f3"
    before = int(machine.console.check(idle))
    machine.console.check("sleep 0.5")
    assert int(machine.console.check(idle)) - before < 10
    assert machine.quit() == 0


def test_several_vcpus_with_a_queue_each(machine: Machine, arguments: list[str]) -> None:
    start = [*machine.linux, "-smp", "3", *arguments]
    start_linux(machine, start)
    assert len(re.findall(r"nvme0q[1-9]", machine.console.check("cat /proc/interrupts"))) == 3
    runs = [Fio(f"v{number}", blocks=500, rate=150, offset=number << 23) for number in range(3)]
    for fio in runs:
        fio.start(machine.console)
    wait_writes(machine.console, 200)
    savevm(machine, "t1")
    assert_well(machine, *runs)
    loadvm(machine, "t1")
    assert_well(machine, *runs)
    machine.kill()
    machine.start([*start, "-loadvm", "t1"])
    assert_well(machine, *runs)
    assert machine.quit() == 0


def test_saved_and_loaded_in_the_midst_of_controller_resets(machine: Machine, arguments: list[str]) -> None:
    start_linux(machine, [*machine.linux, *arguments])
    machine.console.check(
        "((while [ ! -e /tmp/enough ] && nvme reset /dev/nvme0; do echo x >>/tmp/resets; done) >/dev/null 2>&1 &)"
    )
    for tag in ("t1", "t2", "t3"):
        machine.console.check("while [ ! -s /tmp/resets ]; do :; done", 90)
        savevm(machine, tag)
        loadvm(machine, tag)
        machine.console.check("rm -f /tmp/resets; while [ ! -s /tmp/resets ]; do :; done", 90)
    machine.console.check("touch /tmp/enough; while pidof nvme; do sleep 0.1; done")
    FIO.run(machine.console)
    said = [line for line in disk_complaints(machine.console) if "resetting controller" not in line]
    assert said == []
    assert machine.quit() == 0


@pytest.mark.timeout(900)
def test_saved_before_the_guest_has_enabled_the_controller(machine: Machine, arguments: list[str]) -> None:
    """Not one instruction was run; then in the firmware. What is loaded boots."""
    machine.start([*machine.linux, *arguments, "-S"])
    savevm(machine, "reset")
    assert machine.qmp.status == "prelaunch"
    machine.qmp.execute("cont")
    savevm(machine, "firmware")
    machine.console.wait_boot()
    for tag in ("firmware", "reset"):
        assert machine.qmp.hmp(f"loadvm {tag}") == ""
        assert machine.qmp.status == "running"
        wait_ready(machine)
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "firmware"])
    machine.console.wait_boot()
    FIO.run(machine.console)
    assert_well(machine)
    assert machine.quit() == 0


def test_a_guest_resets_its_controller_during_pre_copy(machines: MachineFactory, tree: Sysroot, work: Path) -> None:
    """As often as it can, the switch-over included: what was tracked before a reset is of no queue's any more."""
    guest = Traveller(machines("m0"), ["-M", "q35", *disk(make_image(tree, work / "d0.raw", "64M"))], machines)
    guest.boot()
    guest.machine.console.check(
        "((while [ ! -e /tmp/enough ] && nvme reset /dev/nvme0; do echo x >>/tmp/resets; done) >/dev/null 2>&1 &)"
    )
    source, destination = guest.machine, guest.destination()
    destination.qmp.execute("migrate-incoming", {"uri": guest.uri(destination)})
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    source.qmp.execute("migrate", {"uri": guest.uri(destination)})
    wait_status(source.qmp, "active")
    for _ in range(3):
        source.console.check("rm -f /tmp/resets; while [ ! -s /tmp/resets ]; do :; done", 90)
    assert migrate_status(source.qmp)["status"] == "active"
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
    assert wait_status(source.qmp, *ENDED)["status"] == "completed"
    wait_run_state(destination.qmp, "running")
    assert source.quit() == 0
    console = destination.console
    console.check("rm -f /tmp/resets; while [ ! -s /tmp/resets ]; do :; done", 90)
    console.check("touch /tmp/enough; while pidof nvme; do sleep 0.1; done")
    FIO.run(console)
    assert [line for line in disk_complaints(console) if "resetting controller" not in line] == []
    assert destination.quit() == 0


def test_a_controller_without_a_namespace_is_saved_and_loaded(machine: Machine, tree: Sysroot, work: Path) -> None:
    elsewhere = make_image(tree, work / "state.qcow2", "16M")
    arguments = ["-M", "q35", "-drive", f"if=none,id=s,file={elsewhere},format=qcow2", "-device", "nvme,serial=S1"]
    start_linux(machine, [*machine.linux, *arguments])
    savevm(machine, "t1")
    loadvm(machine, "t1")
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t1"])
    assert "S1" in machine.console.check("nvme id-ctrl /dev/nvme0 | grep '^sn '")
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_an_interrupt_that_was_masked_across_a_save_comes_when_it_is_unmasked(
    machine: Machine, arguments: list[str]
) -> None:
    start_linux(machine, [*machine.linux, *arguments])

    def mask(masked: bool) -> None:
        where = find(machine.qmp.execute("query-pci"), "nvmove0")
        control = 0x8000 | 64 | (MSIX_FUNCTION_MASK if masked else 0)
        machine.qmp.hmp(f"o /w {CONFIG_ADDRESS:#x} {where.config_address(MSIX_CONTROL):#x}")
        machine.qmp.hmp(f"o /h {CONFIG_DATA + MSIX_CONTROL % 4:#x} {control:#x}")

    machine.qmp.execute("stop")
    mask(True)
    machine.qmp.execute("cont")
    machine.console.check(
        "(dd if=/dev/nvme0n1 of=/dev/null bs=4096 count=1 iflag=direct >/tmp/dd 2>&1; echo $? >/tmp/done) &"
    )
    machine.console.check("sleep 1")
    assert machine.console.run("[ -e /tmp/done ]").status == 1
    savevm(machine, "t1")
    loadvm(machine, "t1")
    assert machine.console.run("[ -e /tmp/done ]").status == 1
    mask(False)
    machine.console.check("while [ ! -s /tmp/done ]; do :; done", 25)
    assert machine.console.check("cat /tmp/done") == "0"
    FIO.run(machine.console)
    assert_well(machine)
    assert machine.quit() == 0
