"""A PC boots from the disk: the firmware's own NVMe driver, then GRUB on it, then Linux."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nvmove.lab.bootdisk import make_boot_disk
from nvmove.lab.fio import disk_complaints
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk


@pytest.fixture(scope="module")
def boot_disk(tree: Sysroot, module_work: Path) -> Path:
    return make_boot_disk(tree, module_work / "boot.raw")


def firmware(tree: Sysroot, work: Path) -> list[str]:
    """OVMF, with variables of its own."""
    ovmf = tree.path / "usr/share/OVMF"
    variables = shutil.copy(ovmf / "OVMF_VARS_4M.fd", work / "vars.qcow2.raw")
    code = f"if=pflash,format=raw,readonly=on,file={ovmf / 'OVMF_CODE_4M.fd'}"
    return ["-drive", code, "-drive", f"if=pflash,format=raw,file={variables}"]


@pytest.mark.parametrize("kind", [pytest.param("raw", marks=pytest.mark.both_engines), "qcow2"])
@pytest.mark.parametrize("bios", ["seabios", "ovmf"])
def test_boot_from_the_disk(machine: Machine, tree: Sysroot, work: Path, boot_disk: Path, bios: str, kind: str) -> None:
    """Raw and qcow2 are different back ends; BIOS and UEFI are different drivers, and ROM maps come and go."""
    image = work / f"boot.{kind}"
    subprocess.run([tree.program("qemu-img"), "convert", "-O", kind, str(boot_disk), str(image)], check=True)
    machine.start(["-M", "q35", *disk(image, device="bootindex=0"), *(firmware(tree, work) if bios == "ovmf" else [])])
    machine.console.wait_boot(400)
    assert "nvmove.booted-from-disk" in machine.console.check("cat /proc/cmdline")
    assert machine.console.run("[ -d /sys/firmware/efi ]").status == (0 if bios == "ovmf" else 1)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0
