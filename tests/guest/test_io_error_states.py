"""A VM in io-error is saved and loaded by jobs; one disk of several fails; policies change while requests are held."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import block_device, disk, make_image, overwrite
from tests.guest.failing_disks import cont, fault, finish, io_status, wait_pause
from tests.guest.test_jobs import WELL, job

FIO = Fio("held", blocks=1024, iodepth=32)


def remove(machine: Machine, rule: int) -> None:
    machine.qmp.execute("nvmove-fault-remove", {"id": rule})


def test_jobs_save_a_vm_in_io_error_and_load_it_with_what_it_held(machine: Machine, tree: Sysroot, work: Path) -> None:
    arguments = ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))]
    machine.boot(arguments)
    rule = fault(machine, op="write", errno="ENOSPC")
    FIO.start(machine.console)
    wait_pause(machine)
    assert job(machine, "snapshot-save", "t1", "j0") == (WELL, "io-error", None)
    assert io_status(machine) == "nospace"
    remove(machine, rule)
    cont(machine)
    finish(machine, FIO)

    overwrite(machine)
    assert job(machine, "snapshot-load", "t1", "j0") == (WELL, "running", None)
    finish(machine, FIO)

    overwrite(machine)
    rule = fault(machine, op="write", errno="ENOSPC")
    assert job(machine, "snapshot-load", "t1", "j0")[2] is None
    while machine.qmp.status != "io-error":  # what was held is tried again at once
        time.sleep(0.05)
    assert io_status(machine) == "nospace"
    assert job(machine, "snapshot-load", "t1", "j0") == (WELL, "io-error", None), "a VM that was stopped stays so"
    remove(machine, rule)
    machine.qmp.events.clear()
    cont(machine)
    finish(machine, FIO)

    overwrite(machine)
    machine.kill()
    machine.start([*machine.linux, *arguments, "-loadvm", "t1"])
    finish(machine, FIO)
    assert machine.quit() == 0


def test_one_disk_of_two_fails_and_both_go_on(machine: Machine, tree: Sysroot, work: Path) -> None:
    disks = [*disk(make_image(tree, work / "d0.qcow2")), *disk(make_image(tree, work / "d1.raw"), "d1")]
    machine.boot(["-M", "q35", *disks])
    held, other = block_device(machine, "d0"), block_device(machine, "d1")
    bad = replace(FIO, device=f"/dev/{held}")
    good = Fio("good", device=f"/dev/{other}", blocks=1500, rate=250)
    good.start(machine.console)
    wait_writes(machine.console, 50, other)
    rule = fault(machine, op="write", drive="d0", errno="ENOSPC")
    bad.start(machine.console)
    for _ in range(2):
        assert wait_pause(machine)["device"] == "d0"
        assert [io_status(machine, name) for name in ("d0", "d1")] == ["nospace", "ok"]
        cont(machine)
    wait_pause(machine)
    remove(machine, rule)
    cont(machine)
    finish(machine, bad)
    finish(machine, good)
    assert machine.quit() == 0


def test_policies_of_two_namespaces_of_one_controller_are_each_their_own(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    drives = [
        word
        for name, werror in (("d0", "stop"), ("d1", "ignore"))
        for word in (
            *("-drive", f"if=none,id={name},file={make_image(tree, work / f'{name}.raw')},format=raw,werror={werror}"),
            *("-device", f"nvme-ns,drive={name}"),
        )
    ]
    machine.boot(["-M", "q35", "-device", "nvme,id=n0,serial=S-0", *drives])
    console, qmp = machine.console, machine.qmp
    writes = {
        nsid: f"dd if=/dev/zero of=/dev/{block_device(machine, '0', nsid)} bs=4096 oflag=direct count=1"
        for nsid in (1, 2)
    }
    rule = fault(machine, op="write", errno="EIO")
    assert console.run(writes[2]).status == 0
    error = qmp.wait_event("BLOCK_IO_ERROR")["data"]
    assert (error["device"], error["action"]) == ("d1", "ignore")
    console.send(f"({writes[1]}; echo $? >/tmp/w) >/dev/null 2>&1 &\n")
    error = wait_pause(machine)
    assert (error["device"], io_status(machine)) == ("d0", "failed")

    # Changed while it is held: the retry follows the new policy.
    qmp.execute("nvmove-set-error-policy", {"device": "d0", "werror": "ignore"})
    cont(machine)
    console.check("while [ ! -s /tmp/w ]; do sleep 0.1; done", timeout=60)
    assert console.check("cat /tmp/w") == "0"
    assert qmp.status == "running"
    remove(machine, rule)
    assert disk_complaints(console) == []
    assert machine.quit() == 0
