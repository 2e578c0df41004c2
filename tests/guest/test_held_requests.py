"""Requests that are held, as a guest and its driver meet them: all at once, in order, aborted, beyond a time-out."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from nvmove.lab.fio import Fio
from nvmove.lab.machine import Machine
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image
from tests.guest.failing_disks import cont, fault, finish, held_requests, wait_hits, wait_pause

HOUR = "3600s"
"""A delay that only the removal of its rule ends."""


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
    held = held_requests(machine, image, "t0")
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
        before, held = held, held_requests(machine, image, f"t{again}")
        assert sum(len(blocks) for blocks in held.values()) == again
        for sqid, blocks in held.items():
            assert blocks == before[sqid][: len(blocks)]
    cont(machine)
    for fio in queues:
        finish(machine, fio)
    assert machine.quit() == 0
