"""A disk that fills up or breaks pauses the VM; when it is mended the guest goes on, and has seen a slow disk only."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import (
    MachineFactory,
    assert_nothing_left,
    block_device,
    clean_machine,
    disk,
    make_image,
    savevm,
)
from tests.guest.failing_disks import FIO, SmallDisk, cont, fault, finish, io_status, wait_full, wait_pause


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_full_disk_pauses_the_vm_and_room_lets_it_go_on(
    machine: Machine, tree: Sysroot, work: Path, small: SmallDisk, kind: str
) -> None:
    image = make_image(tree, small.path / f"d0.{kind}")
    before = Surroundings.look(work)
    machine.boot(["-M", "q35", *disk(image)])
    assert io_status(machine) == "ok"
    FIO.start(machine.console)
    wait_full(machine)
    assert "I/O status:       nospace" in machine.qmp.hmp("info block d0")
    assert machine.qmp.hmp("info status") == "VM status: paused (io-error)\n"

    cont(machine)  # without room: held again, paused again
    wait_full(machine)
    machine.qmp.execute("stop")
    assert machine.qmp.status == "io-error"

    small.make_room(64)
    cont(machine)
    finish(machine)
    assert "I/O status" not in machine.qmp.hmp("info block d0")
    assert machine.quit() == 0
    assert_nothing_left(machine, before, but=("size=65536k 0 0",))  # the mount is ours


def test_ten_pauses_in_a_row_lose_nothing(machine: Machine, tree: Sysroot, small: SmallDisk) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, small.path / "d0.raw"), drive="werror=stop")])
    FIO.start(machine.console)
    for pause in range(1, 11):
        wait_full(machine)
        small.make_room(4 + pause / 4 if pause < 10 else 64)
        cont(machine)
    finish(machine)
    assert machine.quit() == 0


@pytest.mark.timeout(900)
def test_after_a_pause_of_a_minute_the_guest_has_no_timeout(machine: Machine, tree: Sysroot, small: SmallDisk) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, small.path / "d0.raw"))])
    FIO.start(machine.console)
    wait_full(machine)
    time.sleep(60)  # longer than the 30 s that Linux gives a command
    small.make_room(64)
    cont(machine)
    finish(machine)
    assert machine.quit() == 0


def test_a_vm_saved_while_its_disk_is_full_goes_on_elsewhere(
    machines: MachineFactory, tree: Sysroot, small: SmallDisk
) -> None:
    # The state goes to a disk that has room: QEMU puts it into the first one that can have it.
    state = make_image(tree, small.path.parent / "state.qcow2")
    image = make_image(tree, small.path / "d0.qcow2")
    arguments = ["-M", "q35", *disk(state, "s0"), *disk(image)]
    first = machines("first")
    first.boot(arguments)
    fio = Fio("full", device=f"/dev/{block_device(first, 'd0')}", blocks=2048, iodepth=32)
    fio.start(first.console)
    wait_full(first)
    small.make_room(4.25)  # the snapshot's own metadata
    savevm(first, "t1")
    assert first.qmp.execute("query-status") == {"status": "io-error", "running": False}
    assert io_status(first) == "nospace"
    first.kill()

    second = machines("second")
    second.start([*arguments, "-S", "-loadvm", "t1"])
    assert second.qmp.execute("query-status")["running"] is False
    small.make_room(64)
    cont(second)
    finish(second, fio)
    assert second.quit() == 0


def test_a_loadvm_tries_held_requests_again_at_once_as_qemu_does(
    machines: MachineFactory, tree: Sysroot, small: SmallDisk
) -> None:
    state = make_image(tree, small.path.parent / "state.qcow2")
    arguments = ["-M", "q35", *disk(state, "s0"), *disk(make_image(tree, small.path / "d0.qcow2"))]
    first = machines("first")
    first.boot(arguments)
    fio = Fio("full", device=f"/dev/{block_device(first, 'd0')}", blocks=2048, iodepth=32)
    fio.start(first.console)
    wait_full(first)
    small.make_room(4.25)
    savevm(first, "t1")
    assert first.qmp.hmp("loadvm t1") == ""
    assert first.qmp.status == "io-error", "a VM that was stopped stays so"
    first.kill()

    second = machines("second")
    second.start([*arguments, "-loadvm", "t1"])
    deadline = time.monotonic() + 60
    while second.qmp.status != "io-error":
        assert time.monotonic() < deadline
    second.qmp.events.clear()
    small.make_room(64)
    cont(second)
    finish(second, fio)
    assert second.quit() == 0


def test_system_reset_while_requests_are_held_drops_them_and_the_guest_boots(
    machine: Machine, tree: Sysroot, small: SmallDisk
) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, small.path / "d0.raw"))])
    FIO.start(machine.console)
    wait_full(machine)
    machine.qmp.execute("system_reset")
    cont(machine)
    machine.console.wait_boot()
    assert (machine.qmp.status, io_status(machine)) == ("running", "ok")
    small.make_room(64)
    FIO.run(machine.console)
    finish(machine)
    assert machine.quit() == 0


def test_a_read_error_pauses_where_rerror_says_so(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"), device="rerror=stop")])
    rule = fault(machine, op="read", lba=1000, errno="EIO")
    out = "/tmp/read"
    read = f"dd if=/dev/nvme0n1 of={out} bs=512 iflag=direct skip=1000 count=1"
    # not `check`: the VM may stop before the shell answers
    machine.console.send(f"({read}; echo $? >{out}.status) >/dev/null 2>&1 &\n")
    error = wait_pause(machine)
    assert (error["operation"], error["nospace"], error["reason"]) == ("read", False, "Input/output error")
    assert io_status(machine) == "failed"
    machine.qmp.execute("nvmove-fault-remove", {"id": rule})
    cont(machine)
    machine.console.check(f"while [ ! -s {out}.status ]; do sleep 0.1; done", timeout=60)
    assert machine.console.check(f"cat {out}.status") == "0"
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def what_a_user_sees(machine: Machine, arguments: list[str]) -> list[Any]:
    """Let the firmware read a disk whose reads fail, twice; return all that QMP shows of it."""
    machine.start(["-M", "q35", "-S", *arguments])
    qmp = machine.qmp
    seen: list[Any] = []
    for _ in range(2):
        qmp.execute("cont")
        events = [qmp.wait_event("RESUME"), qmp.wait_event("BLOCK_IO_ERROR"), qmp.wait_event("STOP")]
        for event in events:
            data = event.get("data", {})
            data.update({"qom-path": data["qom-path"].removesuffix("/virtio-backend")} if data else {})
            seen.append((list(event), event["event"], list(data.items())))
        status = list(qmp.execute("query-status").items())
        (block,) = (info for info in qmp.execute("query-block") if info["device"] == "d0")
        seen += [status, qmp.hmp("info status"), next(iter(block.items())), "failed" in qmp.hmp("info block d0")]
        qmp.execute("stop")
        seen.append(qmp.status)
    machine.quit()
    return seen


def test_a_read_error_looks_as_it_does_with_qemus_virtio_blk(tree: Sysroot, work: Path, stock: Machine) -> None:
    bad = (
        "file.driver=blkdebug,file.image.driver=null-co,file.image.size=64M,file.image.read-zeroes=on,"
        "file.inject-error.0.event=read_aio,file.inject-error.0.errno=5,driver=raw"
    )
    common, device = "if=none,id=d0,node-name=n0,rerror=stop", "id=nv0,drive=d0,bootindex=0"
    virtio = ["-drive", f"{common},{bad}", "-device", f"virtio-blk-pci,{device}"]
    expected = what_a_user_sees(stock, virtio)

    image = make_image(tree, work / "d0.raw", "64M")
    nvme = ["-drive", f"{common},file={image},format=raw", "-device", f"nvme,serial=S1,{device}"]
    front = [*nvmove_command(), "run", "--fault", "op=read,errno=EIO"]
    with clean_machine(tree, front, work / "ours") as machine:
        assert what_a_user_sees(machine, nvme) == expected
    assert expected[1][1] == "BLOCK_IO_ERROR"


def test_cont_in_quick_succession_loses_nothing(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.raw"), drive="werror=stop")])
    qmp = machine.qmp
    fault(machine, op="write", errno="EIO", count=300)
    FIO.start(machine.console)
    wait_pause(machine)
    assert io_status(machine) == "failed"
    deadline = time.monotonic() + 120
    while qmp.execute("nvmove-fault-list")[0]["hits"] < 300:
        qmp.hmp("cont")
        assert time.monotonic() < deadline
    # The stop for the last failures may be under way still, with the VM running: this one comes after it.
    qmp.execute("stop")
    qmp.execute("cont")
    finish(machine)
    assert machine.quit() == 0


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
def test_a_vm_with_held_requests_ends_as_any_other(
    machine: Machine, tree: Sysroot, work: Path, small: SmallDisk, how: str
) -> None:
    image = make_image(tree, small.path / "d0.qcow2")
    before = Surroundings.look(work)
    machine.boot(["-M", "q35", *disk(image)])
    FIO.start(machine.console)
    wait_full(machine)
    if how == "quit":
        assert machine.quit() == 0
    else:
        machine.started.process.send_signal(signal.SIGTERM)
        assert machine.started.wait(60) == 0
        machine.hang_up()
    assert_nothing_left(machine, before)


def test_policies_change_while_the_vm_runs(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.raw"), drive="werror=report")])
    console, qmp = machine.console, machine.qmp
    write = "dd if=/dev/zero of=/dev/nvme0n1 bs=4096 oflag=direct count=1"
    rule = fault(machine, op="write", errno="ENOSPC")

    assert console.run(write).status != 0
    error = qmp.wait_event("BLOCK_IO_ERROR")["data"]
    assert (error["action"], "nospace" in error) == ("report", False)
    assert (qmp.status, disk_complaints(console) != []) == ("running", True)
    (info,) = qmp.execute("query-block")
    assert "io-status" not in info

    assert qmp.execute("nvmove-set-error-policy", {"device": "d0", "werror": "ignore"}) == {}
    assert console.run(write).status == 0
    assert qmp.wait_event("BLOCK_IO_ERROR")["data"]["action"] in {"report", "ignore"}
    assert qmp.status == "running"

    assert qmp.execute("nvmove-set-error-policy", {"device": "d0", "werror": "stop"}) == {}
    console.send(f"({write}; echo $? >/tmp/w.status) >/dev/null 2>&1 &\n")  # the VM may stop before the shell answers
    while qmp.status == "running":
        time.sleep(0.05)
    assert (qmp.status, io_status(machine)) == ("io-error", "nospace")
    # what is held is tried again by the policy of then
    assert qmp.execute("nvmove-set-error-policy", {"device": "d0", "werror": "report"}) == {}
    qmp.execute("cont")
    console.check("while [ ! -s /tmp/w.status ]; do sleep 0.1; done", timeout=60)
    assert console.check("cat /tmp/w.status") != "0"
    assert qmp.status == "running"

    with pytest.raises(QmpError, match="nvmove serves no drive 'd9'"):
        qmp.execute("nvmove-set-error-policy", {"device": "d9", "werror": "stop"})
    qmp.execute("nvmove-fault-remove", {"id": rule})
    assert console.run(write).status == 0
    assert machine.quit() == 0
