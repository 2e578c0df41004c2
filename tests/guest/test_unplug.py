"""A slot with an NVMe disk cannot be emptied, by the host or by the guest, and the VM lives on; others can."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.machine import ArmMachine, Machine, nvmove_command
from nvmove.lab.processes import marked
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import block_device, disk, loadvm, make_image, savevm

REFUSAL = "Device 'nv' cannot be unplugged: QEMU would abort"
ROOT_PORT = ["-device", "pcie-root-port,id=rp,addr=7,chassis=3,slot=3"]
SWITCH = ["-device", "pcie-root-port,id=up,chassis=1,slot=1", "-device", "x3130-upstream,id=us,bus=up"]
SWITCH += ["-device", "xio3130-downstream,id=rp,bus=us,chassis=2,slot=2"]
EJECT = "for slot in /sys/bus/pci/slots/*; do [ $(cat $slot/address) = {address} ] && echo 0 > $slot/power; done; true"


def reads(machine: Machine) -> None:
    """The disk answers."""
    device = block_device(machine, "d0")
    machine.console.check(f"dd if=/dev/{device} of=/dev/null bs=64k count=16 iflag=direct")


def refused(machine: Machine, ident: str) -> str:
    with pytest.raises(QmpError) as caught:
        machine.qmp.execute("device_del", {"id": ident})
    assert caught.value.error_class == "GenericError"
    return str(caught.value)


@pytest.mark.parametrize(
    ("board", "before", "device", "eject"),
    [
        ("pc", [], ",addr=5", "o /w 0xae10 0\no /w 0xae08 0x20"),
        ("q35", ROOT_PORT, ",bus=rp", "o /w 0xcd0 0\no /w 0xcc8 1"),
    ],
)
def test_an_nvme_slot_cannot_be_ejected(
    machine: Machine, tree: Sysroot, work: Path, board: str, before: list[str], device: str, eject: str
) -> None:
    rng = ["-device", "virtio-rng-pci,id=rng,addr=6"] if board == "pc" else []
    image = make_image(tree, work / "d0.qcow2")
    machine.boot(["-M", board, *before, *disk(image, device=f"id=nv{device}"), *rng])
    for ident in ("nv", "/machine/peripheral/nv"):
        assert refused(machine, ident) == REFUSAL.replace("nv'", f"{ident}'")
    assert machine.qmp.hmp("device_del nv") == f"Error: {REFUSAL}\n"
    address = machine.console.check("basename $(readlink /sys/class/nvme/nvme0/device)").strip().partition(".")[0]
    machine.console.check(EJECT.format(address=address))  # acpiphp lets the driver go first
    for line in eject.splitlines():
        assert machine.qmp.hmp(line) == ""  # what a hostile guest writes to the port
    machine.console.check("echo 1 > /sys/bus/pci/rescan; udevadm settle 2>/dev/null; true")
    machine.console.check("for i in $(seq 600); do [ -b /dev/nvme0n1 ] && break; sleep 0.1; done; [ -b /dev/nvme0n1 ]")
    reads(machine)
    if board == "pc":
        machine.qmp.execute("device_del", {"id": "rng"})
        while machine.qmp.wait_event("DEVICE_DELETED")["data"].get("device") != "rng":
            pass  # of the parts of it
        machine.qmp.execute("device_add", {"driver": "virtio-rng-pci", "id": "rng", "bus": "pci.0"})
    savevm(machine, "s")
    loadvm(machine, "s")
    reads(machine)
    for line in eject.splitlines():
        assert machine.qmp.hmp(line) == ""
    machine.qmp.execute("system_reset")
    machine.console.wait_boot(240)
    reads(machine)
    assert machine.quit() == 0


NATIVE = {
    "pc-q35-6.0": ["-M", "pc-q35-6.0", "-device", "pcie-root-port,id=rp,chassis=3,slot=3"],
    "a switch": ["-M", "q35", "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off", *SWITCH],
    "arm64 virt": ["-device", "pcie-root-port,id=rp,chassis=3,slot=3"],
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_port_that_plugs_by_itself_cannot_eject_an_nvme(tree: Sysroot, work: Path, name: str) -> None:
    """The guest finds no slot with hot plug on the way to its disk."""
    kind = ArmMachine if name == "arm64 virt" else Machine
    machine = kind(work / "m", tree, [*nvmove_command(), "run"])
    try:
        machine.boot([*NATIVE[name], *disk(make_image(tree, work / "d0.qcow2"), device="id=nv,bus=rp")])
        machine.console.check("for slot in /sys/bus/pci/slots/*; do [ -e $slot ] && echo 0 > $slot/power; done; true")
        assert refused(machine, "nv") == REFUSAL
        reads(machine)
        savevm(machine, "s")
        loadvm(machine, "s")
        reads(machine)
        assert machine.quit() == 0
    finally:
        machine.kill()
    assert marked(machine.mark) == []


def test_a_state_with_another_device_about_to_leave_does_not_hang_at_the_next_reset(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    """QEMU takes such a device out at a reset, and would try for ever on a bus that is closed to the guest."""
    line = ["-M", "pc", *disk(make_image(tree, work / "d0.qcow2"), device="id=nv,addr=5")]
    line += ["-device", "virtio-rng-pci,id=rng,addr=6"]
    machine.start([*line, "-S"])
    machine.qmp.execute("device_del", {"id": "rng"})  # no guest runs that could answer
    savevm(machine, "asked")
    machine.kill()
    machine.start([*line, "-S", "-loadvm", "asked"])
    bus = {"path": "/machine/i440fx/pci.0", "property": "hotplug-handler"}
    assert machine.qmp.execute("qom-get", bus) != ""
    machine.qmp.execute("system_reset")
    machine.qmp.execute("cont")
    while machine.qmp.wait_event("DEVICE_DELETED")["data"].get("device") != "rng":
        pass  # of the parts of it
    assert machine.qmp.hmp("o /w 0xae10 0") == machine.qmp.hmp("o /w 0xae08 0x20") == ""
    assert refused(machine, "nv") == REFUSAL
    assert machine.qmp.status == "running"
    assert machine.quit() == 0
