"""query-blockstats counts what the guest does, whoever has the image and whatever engine runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import block_device, disk, make_image


def counts(machine: Machine, drive: str) -> list[int]:
    rows: list[dict[str, Any]] = machine.qmp.execute("query-blockstats")
    (found,) = (row["stats"] for row in rows if row["device"] == drive)
    return [found[name] for name in ("rd_operations", "rd_bytes", "wr_operations", "wr_bytes", "flush_operations")]


def test_what_the_guest_reads_writes_and_flushes_is_counted(machine: Machine, tree: Sysroot, work: Path) -> None:
    images = {"d0": work / "d0.raw", "d1": work / "d1.qcow2"}
    arguments = [word for name, path in images.items() for word in disk(make_image(tree, path, "64M"), name)]
    machine.boot(["-M", "q35", *arguments])
    for name in images:
        device = f"/dev/{block_device(machine, name)}"
        before = counts(machine, name)
        machine.console.check(f"dd if=/dev/zero of={device} bs=8k count=20 oflag=direct conv=fsync 2>&1")
        machine.console.check(f"dd if={device} of=/dev/null bs=4k count=30 iflag=direct 2>&1")
        after = counts(machine, name)
        flushes = 1 if machine.front else 0  # QEMU's own nvme does not count them; its virtio-blk does
        assert [new - old for old, new in zip(before, after, strict=True)] == [30, 30 << 12, 20, 20 << 13, flushes]
    assert machine.quit() == 0
