"""`nvmove inspect` on what stock QEMU writes: snapshots in images of every layout, migration files of every form."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nvmove.inspect import inspect
from nvmove.lab.sysroot import Sysroot
from nvmove.nvme.state.vmsd import dump
from nvmove.vmstate.bus import VMStateBus
from nvmove.vmstate.source import FileSource
from tests.states import busy, fresh

from .test_dbus_vmstate import Disk, migrated, qemu, story

DISKS = {"nvme0": Disk(dump(busy())), "nvme1": Disk(dump(fresh()))}


def idents(path: Path, tag: str | None = None) -> list[str]:
    source = FileSource(path)
    try:
        return [found.ident for found in inspect(source, tag).devices if not found.problem]
    finally:
        source.close()


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on,cluster_size=16k", "compat=0.10"])
def test_the_states_in_a_snapshot_are_found(tree: Sysroot, work: Path, options: str) -> None:
    image = work / "disk.qcow2"
    more = ["-o", options] if options else []
    subprocess.run([tree.program("qemu-img"), "create", "-q", "-f", "qcow2", *more, str(image), "100M"], check=True)

    def steps(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            assert qmp.hmp("savevm first") == ""
            assert qmp.hmp("savevm second") == ""

    story(work, tree, DISKS, steps)
    assert idents(image, "first") == idents(image, "second") == ["nvme0", "nvme1"]


@pytest.mark.parametrize("capabilities", [[], ["mapped-ram"], ["mapped-ram", "multifd"], ["xbzrle"]])
def test_the_states_in_a_migration_file_are_found(tree: Sysroot, work: Path, capabilities: list[str]) -> None:
    image = work / "disk.qcow2"
    subprocess.run([tree.program("qemu-img"), "create", "-q", "-f", "qcow2", str(image), "100M"], check=True)

    def steps(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            wanted = [{"capability": name, "state": True} for name in capabilities]
            qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
            migrated(qmp, "migrate", f"file:{work}/vm")

    story(work, tree, DISKS, steps)
    assert idents(work / "vm") == ["nvme0", "nvme1"]
