"""nvmove loses its connection to QEMU's NBD export under a guest's I/O."""

from __future__ import annotations

from pathlib import Path

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image
from tests.guest.failing_disks import cont, finish, io_status, wait_pause
from tests.guest.surgery import cut_connections

FIO = Fio("lost", blocks=1500, iodepth=32, rate=300)


def cut(machine: Machine) -> None:
    assert cut_connections(machine, "nbd") >= 1  # and those that queues have borrowed


def test_it_pauses_the_vm_and_cont_connects_anew(machine: Machine, tree: Sysroot, work: Path) -> None:
    policies = "werror=stop,rerror=stop"
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"), drive=policies)])
    FIO.start(machine.console)
    for writes in (100, 400):
        wait_writes(machine.console, writes)
        cut(machine)
        error = wait_pause(machine)
        assert (error["action"], error["nospace"]) == ("stop", False)
        assert error["reason"] == "Transport endpoint is not connected"
        assert io_status(machine) == "failed"
        cont(machine)
    wait_writes(machine.console, 600)
    machine.qmp.execute("stop")
    cut(machine)  # while the VM is stopped: nobody has failed
    cont(machine)
    finish(machine, FIO)
    assert "BLOCK_IO_ERROR" not in {event["event"] for event in machine.qmp.events}
    assert machine.quit() == 0


def test_reported_it_is_a_moment_of_errors_that_linux_tries_again(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))])
    FIO.start(machine.console)
    wait_writes(machine.console, 300)
    cut(machine)
    error = machine.qmp.wait_event("BLOCK_IO_ERROR")["data"]
    assert error["action"] == "report"
    FIO.wait(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.qmp.status == "running"
    assert machine.quit() == 0
