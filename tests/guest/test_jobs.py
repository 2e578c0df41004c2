"""QMP's snapshot jobs on a real guest under I/O: their events, their errors, and the VM's state when they conclude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvmove.lab.console import GuestError
from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image

WELL = ["created", "running", "waiting", "pending", "concluded"]


def node_of(machine: Machine, device: str = "d0") -> str:
    (info,) = (info for info in machine.qmp.execute("query-block") if info["device"] == device)
    return str(info["inserted"]["node-name"])


def job(machine: Machine, kind: str, tag: str, ident: str, **more: Any) -> tuple[list[str], str, str | None]:
    """Run a job to its end and dismiss it.

    Returns the statuses its events told, the VM's run state as seen once the last had come, and the job's error.
    """
    node = node_of(machine)
    arguments: dict[str, Any] = {"job-id": ident, "tag": tag, "devices": [node], **more}
    if kind != "snapshot-delete":
        arguments.setdefault("vmstate", node)
    machine.qmp.events.clear()
    assert machine.qmp.execute(kind, arguments) == {}
    statuses: list[str] = []
    while not statuses or statuses[-1] != "concluded":
        event = machine.qmp.wait_event("JOB_STATUS_CHANGE")
        assert event["data"]["id"] == ident
        statuses.append(event["data"]["status"])
    state = machine.qmp.status
    (found,) = (found for found in machine.qmp.execute("query-jobs") if found["id"] == ident)
    machine.qmp.execute("job-dismiss", {"id": ident})
    return statuses, state, found.get("error")


def test_save_load_and_delete_under_io(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))])
    fio = Fio("v", blocks=1500, rate=250)
    fio.start(machine.console)
    wait_writes(machine.console, 150)
    assert job(machine, "snapshot-save", "t1", "j0") == (WELL, "running", None)
    machine.console.check("touch /tmp/future")
    wait_writes(machine.console, 400)
    assert job(machine, "snapshot-load", "t1", "j0") == (WELL, "running", None)
    assert machine.console.run("[ -e /tmp/future ]").status == 1
    fio.wait(machine.console)
    assert job(machine, "snapshot-delete", "t1", "j0") == (WELL, "running", None)
    assert "There is no snapshot available" in machine.qmp.hmp("info snapshots")
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_a_job_on_a_stopped_vm_leaves_it_stopped(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.start(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "16M"))])
    machine.qmp.execute("stop")
    for kind in ("snapshot-save", "snapshot-load"):
        assert job(machine, kind, "t1", "j0") == (WELL, "paused", None)
    machine.qmp.execute("cont")
    assert machine.qmp.status == "running"
    assert machine.quit() == 0


def test_errors_name_what_is_wrong_and_the_vm_runs_on(machine: Machine, tree: Sysroot, work: Path) -> None:
    qcow2, raw = (make_image(tree, work / name, "16M") for name in ("d0.qcow2", "d1.raw"))
    machine.start(["-M", "q35", *disk(qcow2), *disk(raw, "d1")])
    statuses, state, error = job(machine, "snapshot-load", "absent", "j0")
    assert (statuses[-2:], state) == (["aborting", "concluded"], "running")
    assert error is not None and "absent" in error
    statuses, state, error = job(machine, "snapshot-save", "t1", "j0", devices=["no-such-node"])
    assert (statuses[-1], state) == ("concluded", "running")
    assert error is not None and "no-such-node" in error
    raw_node = node_of(machine, "d1")
    with pytest.raises(QmpError, match="is writable but does not support snapshots"):
        job(machine, "snapshot-save", "t1", "j0", devices=[node_of(machine), raw_node])
    with pytest.raises(QmpError, match="'tag' is missing"):
        machine.qmp.execute("snapshot-save", {"job-id": "j1", "vmstate": "x", "devices": []})
    assert machine.qmp.status == "running"
    assert machine.qmp.execute("query-jobs") == []
    assert machine.quit() == 0


def test_a_second_savevm_of_a_tag_replaces_the_first_and_delvm_removes_it(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "64M"))])
    for moment in ("first", "second"):
        machine.console.check(f"touch /tmp/{moment}")
        assert machine.qmp.hmp("savevm t1") == ""
    machine.console.check("touch /tmp/future")
    assert machine.qmp.hmp("info snapshots").count("t1") == 1
    assert machine.qmp.hmp("loadvm t1") == ""
    assert machine.console.run("[ -e /tmp/first -a -e /tmp/second ]").status == 0
    assert machine.console.run("[ -e /tmp/future ]").status == 1
    assert machine.qmp.hmp("delvm t1") == ""
    assert "There is no snapshot available" in machine.qmp.hmp("info snapshots")
    assert machine.qmp.hmp("delvm t1") == ""  # as QEMU: nothing to delete is no error
    assert "t1" in machine.qmp.hmp("loadvm t1")
    assert machine.qmp.status == "running"
    assert machine.quit() == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("serial=OTHER", "serial is 'OTHER' here, and was 'S1' when saved"),
        ("serial=S1,max_ioqpairs=7", "max_ioqpairs is 7 here, and was 64 when saved"),
        ("serial=S1,mdts=4", "mdts is 4 here, and was 7 when saved"),
    ],
)
def test_a_snapshot_of_another_device_says_the_difference_once(
    machine: Machine, tree: Sysroot, work: Path, change: str, reason: str
) -> None:
    image = make_image(tree, work / "d0.qcow2", "16M")
    drive = ["-M", "q35", "-drive", f"if=none,id=d0,file={image},format=qcow2", "-device"]
    machine.start([*drive, "nvme,drive=d0,serial=S1"])
    assert machine.qmp.hmp("savevm t1") == ""
    assert machine.quit() == 0
    machine.start([*drive, f"nvme,drive=d0,{change}"])
    said = machine.qmp.hmp("loadvm t1")
    assert len(said.splitlines()) == 1 and reason in said
    assert machine.qmp.status == "restore-vm"  # as stock QEMU after a loadvm that failed half-way
    assert machine.qmp.execute("query-block") != []
    statuses, _state, error = job(machine, "snapshot-load", "t1", "j0")
    assert (statuses[-1], f"Error: {error}\n") == ("concluded", said)
    assert machine.quit() == 0


@pytest.mark.parametrize(
    ("saved", "here", "reason"),
    [
        (["n0", "n1"], ["n0"], "The snapshot holds the state of the nvmove device 'n1', which this VM does not have"),
        (["n0"], ["n0", "n1"], "nvme devices are n0, n1 here, and were n0"),
    ],
)
def test_a_snapshot_of_other_devices_names_the_one_in_one_line(
    machine: Machine, tree: Sysroot, work: Path, saved: list[str], here: list[str], reason: str
) -> None:
    drive = ["-M", "q35", "-drive", f"if=none,id=d0,file={make_image(tree, work / 'd0.qcow2', '16M')},format=qcow2"]
    devices = {"n0": ["-device", "nvme,id=n0,serial=S0,drive=d0"], "n1": ["-device", "nvme,id=n1,serial=S1"]}

    def arguments(names: list[str]) -> list[str]:
        return [*drive, *(word for name in names for word in devices[name])]

    machine.start(arguments(saved))
    assert machine.qmp.hmp("savevm t1") == ""
    assert machine.quit() == 0
    machine.start(arguments(here))
    assert machine.qmp.hmp("loadvm t1") == f"Error: {reason}\n"
    assert machine.qmp.status == "restore-vm"
    _statuses, state, error = job(machine, "snapshot-load", "t1", "j0")
    assert state == "restore-vm"
    # Which device that is, QEMU says only on its stderr then.
    assert error is not None and error.startswith(reason.partition(" of ")[0])
    assert machine.quit() == 0
    before = machine.started.output
    with pytest.raises(GuestError, match="has no monitor"):
        machine.start([*arguments(here), "-loadvm", "t1"])
    assert machine.started.wait(60) == 1
    assert machine.started.output.removeprefix(before) == f"nvmove: {reason}\n"
