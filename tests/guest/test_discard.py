"""What the guest gives back: with `discard=unmap` the image gets smaller, with QEMU's default it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import disk_complaints
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image

MIB = 1 << 20


def allocated(image: Path) -> int:
    """Bytes that the host has given to the file."""
    return image.stat().st_blocks * 512


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_a_deallocation_reaches_the_image(
    machine: Machine, tree: Sysroot, work: Path, suffix: str, discard: str
) -> None:
    image = make_image(tree, work / f"d0.{suffix}")
    machine.boot(["-M", "q35", *disk(image, drive=f"discard={discard}")])
    machine.console.check("dd if=/dev/urandom of=/dev/nvme0n1 bs=1M count=16 2>/dev/null && sync")
    assert allocated(image) >= 16 * MIB
    machine.console.check("blkdiscard -o 1048576 -l 12582912 /dev/nvme0n1 && sync")
    if discard == "unmap":
        assert allocated(image) < 5 * MIB
    else:
        assert allocated(image) >= 16 * MIB
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0
