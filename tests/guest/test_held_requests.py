"""Requests that are held, as a guest and its driver meet them: all at once, in order, aborted, beyond a time-out."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from nvmove.lab.console import Console
from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image
from tests.guest.failing_disks import cont, fault, finish, held_blocks, held_commands, io_status, wait_hits, wait_pause
from tests.guest.surgery import main_loop_stopped

HOUR = "3600s"
"""A delay that only the removal of its rule ends."""
WRITE = "dd if=/dev/zero of=/dev/nvme0n1 bs=4096 oflag=direct count=1"


def start(console: Console, command: str, name: str) -> None:
    """Run a command in the guest's background; what it says goes to /tmp/NAME, its exit status to /tmp/NAME.status."""
    console.check(f"(({command} >/tmp/{name} 2>&1; echo $? >/tmp/{name}.status) &)")


def ended(console: Console, name: str) -> tuple[int, str]:
    """Wait for the end of what was started; return its exit status and what it said."""
    console.check(f"while [ ! -s /tmp/{name}.status ]; do sleep 0.1; done", timeout=60)
    return int(console.check(f"cat /tmp/{name}.status")), console.check(f"cat /tmp/{name}")


@pytest.mark.both_engines
def test_32_writes_in_flight_fail_and_are_held_by_one_stop_in_the_order_of_their_queues(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    image = make_image(tree, work / "d0.qcow2")
    machine.boot(["-M", "q35", "-smp", "2", *disk(image)])
    console, qmp = machine.console, machine.qmp
    queues = [Fio(f"q{cpu}", blocks=16, iodepth=16, offset=cpu << 20, cpu=cpu) for cpu in (0, 1)]
    late = fault(machine, op="write", errno="ENOSPC", delay=HOUR)
    for fio in queues:
        fio.start(console)
    wait_hits(machine, late, 32)
    qmp.events.clear()
    qmp.execute("nvmove-fault-remove", {"id": late})
    while qmp.status != "io-error":
        time.sleep(0.05)
    held = held_blocks(machine, image, "t0")
    assert Counter(event["event"] for event in qmp.events if event["event"] != "RTC_CHANGE") == {
        "BLOCK_IO_ERROR": 32,
        "STOP": 1,
    }
    assert sorted(len(blocks) for blocks in held.values()) == [16, 16], "each job has a queue of its own"
    assert len({block for blocks in held.values() for block in blocks}) == 32

    # What fails again is held again, in its place: of each queue those that were tried first.
    for again in (21, 10, 4, 1):
        failing = fault(machine, op="write", errno="ENOSPC", delay=HOUR, count=again)
        good = fault(machine, op="write", delay=HOUR)
        tried = sum(len(blocks) for blocks in held.values())
        cont(machine)
        wait_hits(machine, failing, again)
        wait_hits(machine, good, tried - again)
        for rule in (good, failing):
            qmp.execute("nvmove-fault-remove", {"id": rule})
        wait_pause(machine)
        before, held = held, held_blocks(machine, image, f"t{again}")
        assert sum(len(blocks) for blocks in held.values()) == again
        for sqid, blocks in held.items():
            assert blocks == before[sqid][: len(blocks)]
    cont(machine)
    for fio in queues:
        finish(machine, fio)
    assert machine.quit() == 0


@pytest.mark.both_engines
def test_an_abort_of_the_guests_finds_a_held_command_and_the_guest_goes_on(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    image = make_image(tree, work / "d0.qcow2")
    machine.boot(["-M", "q35", *disk(image)])
    console, qmp = machine.console, machine.qmp
    rule = fault(machine, op="write", errno="ENOSPC", delay=HOUR)
    start(console, WRITE, "write")
    wait_hits(machine, rule, 1)
    qmp.execute("nvmove-fault-remove", {"id": rule})
    wait_pause(machine)
    (held,) = held_commands(machine, image, "t0")
    command = int.from_bytes(held.sqe[2:4], "little") << 16 | held.sqid
    abort = f"nvme admin-passthru /dev/nvme0 --opcode=8 --cdw10={command}"

    # A command is held for moments before the VM stops. QEMU's main loop, without which it does not, makes them longer.
    aborts = []  # one that came too late to be seen in its round may be what finds the command in the next
    for seconds in (1, 2, 4, 8, 16):
        aborts.append(f"abort{seconds}")
        rule = fault(machine, op="write", errno="ENOSPC", delay=HOUR)
        cont(machine)
        wait_hits(machine, rule, 1)
        assert console.check(abort).endswith("0x00000001"), "what is at the disk is not aborted"
        # The guest's timers are the main loop's: it counts instead of sleeping.
        start(console, f"i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; {abort}", aborts[-1])
        with main_loop_stopped(machine):
            qmp.execute("nvmove-fault-remove", {"id": rule})
            time.sleep(seconds)
        assert qmp.wait_event("BLOCK_IO_ERROR")["data"]["action"] == "stop"
        assert qmp.wait_event("STOP", "RESUME")["event"] == "STOP"
        assert (qmp.status, io_status(machine)) == ("io-error", "nospace")
        if not held_commands(machine, image, f"t{seconds}"):
            break
    cont(machine)
    answers = [ended(console, name) for name in aborts]
    assert [status for status, _ in answers] == [0] * len(aborts)
    assert [said.split()[-1] for _, said in answers].count("0x00000000") == 1
    assert ended(console, "write")[0] == 0, "Linux tries an aborted write again"
    assert disk_complaints(console) == []
    assert (qmp.status, io_status(machine)) == ("running", "ok")
    Fio("after", blocks=256).run(console)
    assert machine.quit() == 0


def test_a_driver_whose_time_out_comes_before_the_error_sees_a_slow_disk(
    machine: Machine, tree: Sysroot, work: Path
) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.raw"))])
    console, qmp = machine.console, machine.qmp
    console.check("echo 5000 >/sys/block/nvme0n1/queue/io_timeout")
    rule = fault(machine, op="write", errno="ENOSPC", delay=HOUR)
    start(console, WRITE, "write")
    wait_hits(machine, rule, 1)
    console.check("while ! dmesg | grep -q 'Abort status'; do sleep 0.1; done", timeout=60)
    qmp.execute("nvmove-fault-remove", {"id": rule})
    wait_pause(machine)
    time.sleep(10)  # the second time-out would reset the controller
    cont(machine)
    assert ended(console, "write")[0] == 0
    slow, status = disk_complaints(console)
    assert "timeout, aborting" in slow
    assert "Abort status: 0x0" in status
    Fio("after", blocks=256).run(console)
    assert machine.quit() == 0
