"""A process that may have few files open."""

from __future__ import annotations

from pathlib import Path

from nvmove.lab.fio import disk_complaints
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import clean_machine, disk, front, loadvm, make_image, savevm

DESCRIPTORS = 60
"""For nvmove, where 1024 is usual; stock QEMU gets along with 19 for this guest."""


def test_queues_share_few_descriptors(tree: Sysroot, work: Path) -> None:
    limited = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", *front()]
    with clean_machine(tree, limited, work / "vm") as machine:
        machine.boot(["-smp", "4", *disk(make_image(tree, work / "d.qcow2"))])
        write = "dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=4 oflag=direct"
        machine.console.check(" && ".join(f"taskset -c {cpu} {write} seek={4 * cpu}" for cpu in range(4)))
        savevm(machine, "a")
        loadvm(machine, "a")
        machine.console.check(write)
        assert disk_complaints(machine.console) == []
        assert machine.quit() == 0
