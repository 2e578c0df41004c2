"""QEMU's dbus-vmstate and our service: the state goes into the user's qcow2 and comes back; refusals reach QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from nvmove.lab.processes import Marked
from nvmove.lab.qmp import Qmp, connect_unix
from nvmove.lab.sysroot import Sysroot
from nvmove.vmstate.bus import VMStateBus
from nvmove.vmstate.schema import StateError

from .conftest import make_image


class Disk:
    """A device that counts what QEMU asks of it."""

    def __init__(self, state: bytes) -> None:
        self.state = state
        self.saved = 0
        self.loaded: list[bytes] = []
        self.refuses = ""

    def save(self) -> bytes:
        self.saved += 1
        return self.state

    def load(self, data: bytes) -> None:
        if self.refuses:
            raise StateError(self.refuses)
        self.loaded.append(data)


@contextlib.contextmanager
def qemu(tree: Sysroot, work: Path, image: Path, vmstate: dict[str, str], *more: str) -> Iterator[tuple[Qmp, Marked]]:
    """QEMU without a guest, the image as its only disk, and a dbus-vmstate object."""
    monitor = work / "qmp"
    properties = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in vmstate.items() if key != "qom-type")
    program = Marked.start(
        [
            *(tree.program("qemu-system-x86_64"), "-M", "q35", "-m", "64M", "-S", "-nodefaults", "-display", "none"),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
            *("-blockdev", f"qcow2,node-name=d0,file.driver=file,file.filename={image}"),
            *("-object", f"dbus-vmstate,{properties}", *more),
        ],
        work / "log",
    )
    try:
        session = Qmp(connect_unix(monitor, 60, lambda: program.process.poll() is None))
        yield session, program
        session.close()
    finally:
        program.kill_all()


def story(work: Path, tree: Sysroot, disks: dict[str, Disk], steps: Callable[[VMStateBus], None]) -> None:
    """Run `steps` on a thread while the services of `disks` answer."""

    async def main() -> None:
        bus = await VMStateBus.start(work, str(tree.program("dbus-daemon")))
        try:
            for ident, disk in disks.items():
                await bus.add(ident, disk)
            await asyncio.to_thread(steps, bus)
        finally:
            await bus.close()

    asyncio.run(main())


def migrated(qmp: Qmp, command: str, uri: str) -> None:
    qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    qmp.execute(command, {"uri": uri})
    while (status := qmp.wait_event("MIGRATION")["data"]["status"]) != "completed":
        assert status != "failed"


def test_savevm_saves_every_device_and_loadvm_loads_each_its_own(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "disk.qcow2")
    disks = {"nvme0": Disk(b"first"), "nvme1": Disk(bytes(range(256)) * 4096)}

    def steps(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            assert qmp.hmp("savevm t1") == ""
            assert [disk.saved for disk in disks.values()] == [1, 1]
            assert qmp.hmp("loadvm t1") == ""
        with qemu(tree, work, image, bus.qemu_object(), "-loadvm", "t1") as (qmp, _):
            assert qmp.status in ("prelaunch", "paused")

    story(work, tree, disks, steps)
    assert [disk.loaded for disk in disks.values()] == [[disk.state] * 2 for disk in disks.values()]


def test_a_refused_load_fails_loadvm_with_our_reason(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "disk.qcow2")
    disk = Disk(b"state")

    def steps(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, program):
            assert qmp.hmp("savevm t1") == ""
            disk.refuses = "nvme.conf_ioqpairs: the state has 64, this device 4"
            said = qmp.hmp("loadvm t1") + program.output
            assert "nvmove: nvme0: nvme.conf_ioqpairs: the state has 64, this device 4" in said
            disk.refuses = ""
            assert qmp.hmp("loadvm t1") == ""

    story(work, tree, {"nvme0": disk}, steps)
    assert disk.loaded == [b"state"]


def test_a_state_with_a_device_is_not_loaded_without_it(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "disk.qcow2")

    def save(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            assert qmp.hmp("savevm t1") == ""

    def load(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, program):
            said = qmp.hmp("loadvm t1") + program.output
            assert "nvme0" in said

    story(work, tree, {"nvme0": Disk(b"state")}, save)
    story(work, tree, {"other": Disk(b"state")}, load)


def test_a_state_of_an_earlier_version_may_lack_an_entry(tree: Sysroot, work: Path) -> None:
    """Snapshots of versions that did not save the VM as a whole go on loading."""
    image = make_image(tree, work / "disk.qcow2")
    disk, whole = Disk(b"state"), Disk(b"run state")

    def save(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            assert qmp.hmp("savevm t1") == ""

    def load(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            assert qmp.hmp("loadvm t1") == ""

    story(work, tree, {"nvme0": disk}, save)
    story(work, tree, {"nvme0": disk, "nvmove-vm": whole}, load)
    assert (disk.loaded, whole.loaded) == ([b"state"], [])


def test_a_migration_file_carries_the_state(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "disk.qcow2")
    disk = Disk(b"the state of nvme0")

    def steps(bus: VMStateBus) -> None:
        with qemu(tree, work, image, bus.qemu_object()) as (qmp, _):
            migrated(qmp, "migrate", f"file:{work}/vm")
        with qemu(tree, work, image, bus.qemu_object(), "-incoming", "defer") as (qmp, _):
            migrated(qmp, "migrate-incoming", f"file:{work}/vm")

    story(work, tree, {"nvme0": disk}, steps)
    assert disk.loaded == [disk.state]
