"""Faults on purpose, as a guest meets them."""

from __future__ import annotations

from pathlib import Path

from nvmove.lab.console import Console
from nvmove.lab.fio import disk_complaints
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import assert_nothing_left, clean_machine, disk, make_image

BAD = 1000


def reads(console: Console, lba: int, count: int = 1) -> bool:
    """Whether blocks can be read, past the page cache."""
    command = f"dd if=/dev/nvme0n1 of=/dev/null bs=512 iflag=direct skip={lba} count={count}"
    output, status = console.run(command)
    assert (status == 0) == (f"{count}+0 records in" in output)
    assert status == 0 or "No data available" in output  # what Linux calls a medium error
    return status == 0


def test_exactly_the_bad_block_cannot_be_read_until_the_rule_is_removed(tree: Sysroot, work: Path) -> None:
    front = [*nvmove_command(), "run", "--fault", f"op=read,lba={BAD},errno=EIO"]
    image = make_image(tree, work / "d0.qcow2", "16M")
    before = Surroundings.look(work)
    with clean_machine(tree, front, work) as machine:
        machine.boot(["-M", "q35", *disk(image)])
        console, qmp = machine.console, machine.qmp
        (rule,) = qmp.execute("nvmove-fault-list")
        assert (rule["id"], rule["lba"], rule["errno"], rule["op"]) == (1, f"{BAD}-{BAD}", "EIO", "read")

        assert not reads(console, BAD)
        assert reads(console, BAD - 64, 64)
        assert reads(console, BAD + 1, 64)
        console.check(f"dd if=/dev/zero of=/dev/nvme0n1 bs=512 oflag=direct seek={BAD} count=1")
        assert qmp.status == "running"
        (rule,) = qmp.execute("nvmove-fault-list")
        assert rule["hits"] > 0
        bad = [line for line in disk_complaints(console) if "medium error" in line]
        assert bad and all(f"sector {BAD} " in line for line in bad)

        assert qmp.execute("nvmove-fault-remove", {"id": 1}) == {}
        assert reads(console, BAD - 64, 128)
        assert qmp.execute("nvmove-fault-list") == []

        added = qmp.execute("nvmove-fault-add", {"op": "write", "lba": 7, "errno": "EIO", "drive": "d0"})
        assert added == {"id": 2}
        write = "dd if=/dev/zero of=/dev/nvme0n1 bs=512 oflag=direct count=1 seek="
        assert console.run(f"{write}7").status != 0
        assert console.run(f"{write}8").status == 0
        assert machine.quit() == 0
        assert_nothing_left(machine, before)


def test_a_delay_is_seen_by_the_guest_and_held_requests_go_on(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.raw", "16M"))])
    console, qmp = machine.console, machine.qmp
    held = qmp.execute("nvmove-fault-add", {"op": "read", "lba": BAD, "delay": "3600s"})["id"]
    out = "/tmp/held"
    console.check(
        f"((dd if=/dev/nvme0n1 of={out} bs=512 iflag=direct skip={BAD} count=1; echo done >{out}.end) 2>&1 &)"
    )
    assert reads(console, BAD + 1), "the queue is not held up"
    assert console.run(f"cat {out}.end").status != 0
    qmp.execute("nvmove-fault-remove", {"id": held})
    console.check(f"while [ ! -s {out}.end ]; do sleep 0.1; done", timeout=60)
    assert disk_complaints(console) == []
    assert machine.quit() == 0
