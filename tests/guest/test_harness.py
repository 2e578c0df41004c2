"""The harness itself, on QEMU's own nvme: what it says about nvmove is worth what is shown here."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from nvmove.lab.console import GuestError
from nvmove.lab.fio import Fio, disk_complaints, wait_writes, writes_done
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine
from nvmove.lab.processes import Marked, marked, wait_gone
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import assert_nothing_left, disk, make_image


def test_the_story_on_stock_nvme(stock: Machine, tree: Sysroot, work: Path) -> None:
    """Everything that the harness can do, in one boot."""
    arguments = ["-M", "q35", *disk(make_image(tree, work / "d0.qcow2"))]
    before = Surroundings.look(work)
    stock.boot(arguments)
    console = stock.console

    assert console.run("echo one; echo two >&2; exit 3") == ("one\ntwo", 3)
    assert console.run("printf 'no newline'") == ("no newline", 0)
    assert console.run("cat") == ("", 0)  # commands find an empty stdin, not the next command
    assert len(console.check("seq 20000").splitlines()) == 20000
    with pytest.raises(GuestError, match="status 1"):
        console.check("false")
    with pytest.raises(TimeoutError):
        console.run("sleep 2; echo late", timeout=0.2)
    assert console.check("echo after") == "after"  # the late answer is not taken for this one's

    with pytest.raises(QmpError) as refusal:
        stock.qmp.execute("no-such-command")
    assert refusal.value.error_class == "CommandNotFound"
    assert stock.qmp.status == "running"

    fio = Fio("v", blocks=1024, rate=200)
    fio.start(console)
    wait_writes(console, 100)
    assert stock.qmp.hmp("savevm t1") == ""
    stock.qmp.wait_event("RESUME")
    assert writes_done(console) < 1024 and not fio.finished(console)
    fio.wait(console)
    assert disk_complaints(console) == []

    assert [process.pid for process in stock.kill()] == [stock.started.process.pid]
    stock.start([*stock.linux, *arguments, "-loadvm", "t1"])
    assert not fio.finished(stock.console)
    fio.wait(stock.console)

    stock.console.send("reboot -f\n")
    stock.console.wait_boot()
    assert stock.quit() == 0
    assert_nothing_left(stock, before)


def test_wrong_data_fails_the_verification(stock: Machine, tree: Sysroot, work: Path) -> None:
    """A test that verifies must be able to fail; so must one that reads dmesg."""
    stock.boot(["-M", "q35", *disk(make_image(tree, work / "d0.raw"))])
    fio = Fio("v", blocks=1024, rate=200)
    fio.start(stock.console)
    wait_writes(stock.console, 100)
    with (work / "d0.raw").open("r+b") as image:
        while not stock.console.run("cat /tmp/fio.v.status").output.strip().isdigit():
            image.write(b"x" * 2048)  # over and over: whatever fio writes there, this comes after
            image.seek(0)
            time.sleep(0.1)
    with pytest.raises(GuestError, match="verify"):
        fio.finished(stock.console)

    assert disk_complaints(stock.console) == []
    stock.console.check("echo 'nvme nvme0: I/O tag 3 (1003) QID 1 timeout, aborting' >/dev/kmsg")
    assert len(disk_complaints(stock.console)) == 1


def test_a_vm_that_does_not_start_says_why(stock: Machine) -> None:
    with pytest.raises(GuestError, match="no-such-device"):
        stock.start(["-device", "no-such-device"])


def test_a_kernel_that_dies_is_not_waited_for(stock: Machine) -> None:
    stock.boot(["-M", "q35", "-no-reboot"])
    with pytest.raises(GuestError):
        stock.console.run("echo c >/proc/sysrq-trigger")


def test_no_process_escapes_its_mark(work: Path) -> None:
    """Not one that left its session and its parent either."""
    program = Marked.start(["sh", "-c", "(setsid sleep 1000 &); exec sleep 1000"], work / "log")
    deadline = time.monotonic() + 20
    while len(marked(program.mark)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(wait_gone(program.mark, 0)) == 2
    assert len(program.kill_all()) == 2
    assert marked(program.mark) == []


def test_leftovers_are_seen(work: Path) -> None:
    before = Surroundings.look(work)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(work / "s"))
        assert Surroundings.look(work).since(before) == [f"socket {work / 's'}", f"file {work / 's'}"]
    assert Surroundings.look(work).since(before) == [f"file {work / 's'}"]
