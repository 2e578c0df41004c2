"""The main job: a guest under fio is saved, reverted in place, killed and loaded again; not one byte is wrong."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes, writes_done
from nvmove.lab.machine import Machine
from nvmove.lab.qmp import QmpClosed
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, loadvm, make_image, overwrite, savevm
from tests.waiting import wait

FIO = Fio("v", blocks=1200, rate=200)


@pytest.fixture
def arguments(tree: Sysroot, work: Path) -> list[str]:
    return ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))]


def saved_under_fio(machine: Machine, arguments: list[str], tag: str = "t1") -> None:
    """Boot, and save while fio writes."""
    machine.boot(arguments)
    FIO.start(machine.console)
    wait_writes(machine.console, 300)
    savevm(machine, tag)
    assert not FIO.finished(machine.console)


def assert_verifies(machine: Machine) -> None:
    FIO.wait(machine.console)
    assert disk_complaints(machine.console) == []


def test_fio_verifies_across_savevm_and_cont(machine: Machine, arguments: list[str]) -> None:
    """Saved while running (which goes on by itself), and saved while stopped (which stays stopped)."""
    saved_under_fio(machine, arguments)
    assert machine.qmp.status == "running"
    machine.qmp.hmp("stop")
    savevm(machine, "t2")
    assert machine.qmp.status == "paused"
    machine.qmp.hmp("cont")
    assert_verifies(machine)
    assert re.findall(r"^\S+\s+(t\d)\s", machine.qmp.hmp("info snapshots"), re.MULTILINE) == ["t1", "t2"]
    machine.qmp.hmp("delvm t1")
    assert re.findall(r"^\S+\s+(t\d)\s", machine.qmp.hmp("info snapshots"), re.MULTILINE) == ["t2"]
    assert machine.quit() == 0


def test_loadvm_in_place_twice(machine: Machine, arguments: list[str]) -> None:
    saved_under_fio(machine, arguments)
    assert_verifies(machine)
    for _ in range(2):
        overwrite(machine)
        loadvm(machine, "t1")
        assert_verifies(machine)
    assert machine.quit() == 0


def test_loadvm_in_the_midst_of_other_io(machine: Machine, arguments: list[str]) -> None:
    """What was in flight belongs to a past that did not happen."""
    saved_under_fio(machine, arguments)
    assert_verifies(machine)
    other = Fio("other", blocks=4000, offset=64 << 20)
    for _ in range(3):
        done = writes_done(machine.console)
        other.start(machine.console)
        wait_writes(machine.console, done + 50)
        loadvm(machine, "t1")
    assert_verifies(machine)


@pytest.mark.both_engines
def test_killed_and_loaded_by_new_processes(machine: Machine, arguments: list[str]) -> None:
    """Three generations of processes; the third is loaded from what the second saved."""
    saved_under_fio(machine, arguments)
    overwrite(machine)
    assert machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t1"])
    assert not FIO.finished(machine.console)
    savevm(machine, "t2")
    overwrite(machine)
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t2"])
    assert_verifies(machine)
    assert machine.quit() == 0


def test_loadvm_with_S_waits_for_cont(machine: Machine, arguments: list[str]) -> None:
    saved_under_fio(machine, arguments)
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t1", "-S"])
    assert machine.qmp.status in {"prelaunch", "paused"}
    machine.qmp.hmp("cont")
    assert_verifies(machine)


@pytest.mark.parametrize("machine_type", ["pc", "q35-root-port"])
def test_saved_and_loaded_elsewhere_on_the_bus(machine: Machine, tree: Sysroot, work: Path, machine_type: str) -> None:
    """On i440fx, where the device is no PCI Express device; on q35 behind a root port, on a bus the guest numbers."""
    image = make_image(tree, work / "d0.qcow2")
    if machine_type == "pc":
        arguments = ["-M", "pc", *disk(image)]
    else:
        port = ["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"]
        arguments = ["-M", "q35", *port, *disk(image, device="bus=rp0")]
    saved_under_fio(machine, arguments)
    loadvm(machine, "t1")
    assert_verifies(machine)
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t1"])
    assert_verifies(machine)


def test_the_qmp_snapshot_jobs(machine: Machine, arguments: list[str]) -> None:
    """snapshot-save, snapshot-load and snapshot-delete: jobs, as in QEMU."""
    machine.boot(arguments)
    node = machine.qmp.execute("query-block")[0]["inserted"]["node-name"]

    def job(command: str, **more: object) -> None:
        machine.qmp.execute(command, {"job-id": command, "tag": "q1", "devices": [node], **more})
        while True:
            event = machine.qmp.wait_event("JOB_STATUS_CHANGE")
            if event["data"] == {"id": command, "status": "concluded"}:
                break
        jobs = {entry["id"]: entry for entry in machine.qmp.execute("query-jobs")}
        assert "error" not in jobs[command]
        machine.qmp.execute("job-dismiss", {"id": command})

    FIO.start(machine.console)
    wait_writes(machine.console, 300)
    job("snapshot-save", vmstate=node)
    assert_verifies(machine)
    overwrite(machine)
    job("snapshot-load", vmstate=node)
    if machine.qmp.status != "running":
        machine.qmp.execute("cont")
    assert_verifies(machine)
    job("snapshot-delete")
    assert "q1" not in machine.qmp.hmp("info snapshots")


@pytest.mark.timeout(900)
def test_idle_for_70_seconds_after_loadvm_and_then_io(machine: Machine, arguments: list[str]) -> None:
    """Two of Linux's 30 s time-outs: a completion, an interrupt or an event that was lost would show in dmesg."""
    saved_under_fio(machine, arguments)
    assert_verifies(machine)
    savevm(machine, "idle")
    loadvm(machine, "idle")
    machine.console.check("sleep 70", timeout=400)
    assert disk_complaints(machine.console) == []
    Fio("after").run(machine.console)
    assert disk_complaints(machine.console) == []


def test_signals_in_the_midst_of_savevm_wait_for_it(machine: Machine, tree: Sysroot, work: Path) -> None:
    """The disk takes longer than the ten seconds after which QEMU was killed once; no guest runs."""
    image = make_image(tree, work / "d0.qcow2", "16M")
    slow = ["-object", "throttle-group,id=slow,x-bps-write=80000"]
    file = f"file.driver=throttle,file.throttle-group=slow,file.file.driver=file,file.file.filename={image}"
    disk = ["-blockdev", f"driver=qcow2,node-name=n0,{file}", "-device", "nvme,serial=S1,drive=n0"]
    machine.memory = "64M"
    machine.start(["-M", "q35", "-S", *slow, *disk])
    size = image.stat().st_size

    def save() -> None:
        with contextlib.suppress(QmpClosed):  # or it is answered before QEMU ends
            machine.qmp.hmp("savevm t1")

    saving = threading.Thread(target=save)
    saving.start()
    wait(lambda: image.stat().st_size > size, 60)
    for impatience in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        machine.started.process.send_signal(impatience)
    assert machine.started.wait(120) == 0
    saving.join(60)
    listing = subprocess.run(
        [tree.program("qemu-img"), "snapshot", "-l", str(image)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "t1" in listing
    subprocess.run([tree.program("qemu-img"), "check", "-q", str(image)], check=True, timeout=60)
