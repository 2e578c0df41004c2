"""Two controllers, three namespaces, one of them raw."""

from __future__ import annotations

from pathlib import Path

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import loadvm, make_image, savevm

SIZES = {"a.qcow2": "64M", "b.qcow2": "96M", "c.raw": "128M"}


def controllers(work: Path, raw_options: str) -> list[str]:
    drives = []
    for letter, name in zip("abc", SIZES, strict=True):
        kind, more = ("raw", raw_options) if name.endswith(".raw") else ("qcow2", "")
        drives += ["-drive", f"if=none,id={letter},file={work / name},format={kind}{more}"]
    return [
        *("-M", "q35", *drives),
        *("-device", "nvme,serial=ONE,id=n0,drive=a", "-device", "nvme-ns,drive=b,bus=n0,nsid=5"),
        *("-device", "nvme,serial=TWO,id=n1", "-device", "nvme-ns,drive=c,bus=n1"),
    ]


def by_serial(machine: Machine, serial: str, nsid: int) -> str:
    """The block device of a namespace: Linux may number controllers in any order."""
    find = f"for c in /sys/class/nvme/nvme*; do if grep -qw {serial} $c/serial; then basename $c; fi; done"
    controller = machine.console.check(find)
    names = "cd /sys/block; for n in nvme*n*; do echo $(cat $n/nsid) $n; done"
    for line in machine.console.check(names).splitlines():
        number, name = line.split()
        if number == str(nsid) and name.startswith(f"{controller}n"):
            return f"/dev/{name}"
    raise AssertionError(f"no namespace {nsid} on {serial}")


def test_two_controllers_three_namespaces_one_raw(machine: Machine, tree: Sysroot, work: Path) -> None:
    for name, size in SIZES.items():
        make_image(tree, work / name, size)
    machine.boot(controllers(work, ""))
    disks = [by_serial(machine, "ONE", 1), by_serial(machine, "ONE", 5), by_serial(machine, "TWO", 1)]
    sizes = [machine.console.check(f"blockdev --getsize64 {device}") for device in disks]
    assert sizes == [str(megabytes << 20) for megabytes in (64, 96, 128)]

    runs = [Fio(f"v{number}", device, blocks=600, rate=150) for number, device in enumerate(disks)]
    for fio in runs:
        fio.start(machine.console)
    wait_writes(machine.console, 50, disks[2].removeprefix("/dev/"))
    refusal = machine.qmp.hmp("savevm t1")
    assert "is writable but does not support snapshots" in refusal
    assert machine.qmp.status == "running"
    for fio in runs:
        fio.wait(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_a_read_only_raw_namespace_does_not_hinder_savevm(machine: Machine, tree: Sysroot, work: Path) -> None:
    for name, size in SIZES.items():
        make_image(tree, work / name, size)
    (work / "c.raw").write_bytes(b"nvmove" * 100_000 + bytes((128 << 20) - 600_000))
    arguments = controllers(work, ",readonly=on")
    machine.boot(arguments)
    disks = [by_serial(machine, "ONE", 1), by_serial(machine, "ONE", 5), by_serial(machine, "TWO", 1)]
    digest = machine.console.check(f"sha256sum <{disks[2]}")
    refused, status = machine.console.run(f"dd if=/dev/zero of={disks[2]} bs=4096 count=1 conv=fsync")
    assert status != 0, refused

    runs = [Fio(f"v{number}", device, blocks=600, rate=150) for number, device in enumerate(disks[:2])]
    for fio in runs:
        fio.start(machine.console)
    wait_writes(machine.console, 150, disks[1].removeprefix("/dev/"))
    savevm(machine, "t1")
    for fio in runs:
        fio.wait(machine.console)
    loadvm(machine, "t1")
    for fio in runs:
        fio.wait(machine.console)
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t1"])
    for fio in runs:
        fio.wait(machine.console)
    assert machine.console.check(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum <{disks[2]}") == digest
