"""The served function beside QEMU's own nvme, in a stock guest: the same to lspci, and it works."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvmove.block.raw.backend import open_raw
from nvmove.device import NvmeDevice
from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from tests.guest.conftest import clean_machine, disk, make_image, savevm

SHARED = ["-object", "memory-backend-memfd,id=ram,size=512M,share=on", "-machine", "memory-backend=ram"]
LSPCI = "lspci -vvv -xxxx -d ::0108"
ROOT_PORT = ["-device", "pcie-root-port,id=rp0,addr=5"]


@contextmanager
def served(image: Path, socket: Path) -> Iterator[NvmeDevice]:
    """An nvmove device with one namespace, in this process."""
    backend = open_raw(str(image))
    namespace = NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1))
    device = NvmeDevice(ControllerConfig(serial="S1", namespaces=(namespace,)), {"d0": backend}, id="nvme0")
    device.start(socket)
    try:
        yield device
    finally:
        device.close()
        backend.close()


def vfio_user(socket: Path, **options: str) -> list[str]:
    return [
        "-device",
        json.dumps({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}, **options}),
    ]


def seen(machine: Machine) -> dict[int, str]:
    """What lspci prints of NVMe functions: decoded lines, and the bytes of configuration space by offset."""
    output = machine.console.check(LSPCI)
    lines = {-number: line for number, line in enumerate(output.splitlines(), 1) if not re.match("[0-9a-f]+: ", line)}
    for match in re.finditer(r"^([0-9a-f]+): ((?:[0-9a-f]{2} ?)+)$", output, re.MULTILINE):
        for position, byte in enumerate(match[2].split()):
            lines[int(match[1], 16) + position] = byte
    return lines


@pytest.mark.parametrize(
    ("board", "before", "bus"), [("q35", [], "pcie.0"), ("q35", ROOT_PORT, "rp0"), ("pc", [], "pci.0")]
)
def test_lspci_cannot_tell_it_from_qemus_nvme(
    tree: Sysroot, work: Path, board: str, before: list[str], bus: str
) -> None:
    address = "0" if bus == "rp0" else "2"
    image = make_image(tree, work / "d0.raw")
    with clean_machine(tree, [], work / "qemu") as reference:
        reference.boot(["-M", board, *before, *disk(image, device=f"bus={bus},addr={address}")])
        expected = seen(reference)
        warnings = reference.started.tail()
    with served(image, work / "s"), clean_machine(tree, [], work / "nvmove") as machine:
        machine.boot(["-M", board, *SHARED, *before, *vfio_user(work / "s", bus=bus, addr=address)])
        actual = seen(machine)
        assert warnings == machine.started.tail()
    assert len(expected) > 256
    differing = {offset: (expected.get(offset), actual.get(offset)) for offset in expected.keys() | actual.keys()}
    differing = {offset: pair for offset, pair in differing.items() if pair[0] != pair[1]}
    # docs/reference/differences.md, "PCI": on q35's root bus QEMU's vfio layer clears the link registers.
    cleared = {0x8C: ("11", "00"), 0x8D: ("04", "00"), 0x92: ("11", "00")} if bus == "pcie.0" else {}
    assert cleared == differing


@pytest.mark.parametrize("shared", [True, False])
def test_fio_verifies_on_shared_ram_and_by_message(tree: Sysroot, work: Path, shared: bool) -> None:
    """RAM that is not shared reaches the device by DMA_READ and DMA_WRITE messages alone."""
    image = make_image(tree, work / "d0.raw")
    with served(image, work / "s") as device, clean_machine(tree, [], work / "m") as machine:
        machine.boot(["-M", "q35", *(SHARED if shared else []), *vfio_user(work / "s")])
        low = {region["access"] for region in device.inspect()["memory"] if region["address"] == 0}
        assert {"mapped" if shared else "by message"} == low
        Fio("v", blocks=512).start(machine.console)
        Fio("v", blocks=512).wait(machine.console)
        assert disk_complaints(machine.console) == []
        machine.console.send("reboot -f\n")
        machine.console.wait_boot()
        machine.console.check("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=8")
        assert disk_complaints(machine.console) == []


def test_a_new_qemu_is_served_after_the_old_one_was_killed(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "d0.raw")
    with served(image, work / "s"), clean_machine(tree, [], work / "m") as machine:
        for _ in range(2):
            machine.boot(["-M", "q35", *SHARED, *vfio_user(work / "s")])
            machine.console.check("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=8")
            machine.kill()


def test_intx_works_where_msix_is_switched_off(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "d0.raw")
    with served(image, work / "s"), clean_machine(tree, [], work / "m") as machine:
        append = ["-append", f"{machine.append} pci=nomsi"]
        machine.boot(["-M", "q35", *append, *SHARED, *vfio_user(work / "s")])
        assert "fasteoi" in machine.console.check("grep nvme /proc/interrupts")
        Fio("v", blocks=256).start(machine.console)
        Fio("v", blocks=256).wait(machine.console)
        assert disk_complaints(machine.console) == []


def test_a_function_level_reset_by_the_guest_is_survived(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "d0.raw")
    with served(image, work / "s") as device, clean_machine(tree, [], work / "m") as machine:
        machine.boot(["-M", "q35", *SHARED, *vfio_user(work / "s", addr="2")])
        resets = device.resets
        assert machine.console.check("cat /sys/bus/pci/devices/0000:00:02.0/reset_method") == "flr"
        machine.console.check("echo 1 > /sys/bus/pci/devices/0000:00:02.0/reset")
        assert device.resets > resets
        Fio("v", blocks=256).start(machine.console)
        Fio("v", blocks=256).wait(machine.console)


def test_a_vm_that_never_ran_is_saved_and_loaded_with_its_disk_behind_a_port(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    """The firmware has not numbered the buses: the function is nowhere yet."""
    machine.memory = "64M"
    port = ["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"]
    machine.start(["-M", "q35", "-S", *port, *disk(make_image(tree, work / "d.qcow2", "8M"), device="bus=rp0")])
    savevm(machine, "new")
    assert machine.qmp.hmp("loadvm new") == ""
    assert machine.quit() == 0
