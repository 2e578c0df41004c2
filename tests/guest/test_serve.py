"""`nvmove serve`: stock QEMUs attached with the very line it prints, one after the other."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvmove.bench.driver import HostDriver, Job
from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.processes import Marked, wait_gone
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import make_image
from tests.waiting import wait

FIO = Fio("v", blocks=1024)
CHECKSUM = "dd if=/dev/nvme0n1 of=/tmp/read bs=1M count=4 iflag=direct 2>/dev/null && md5sum </tmp/read"


@contextmanager
def started(work: Path, name: str, *argv: str) -> Iterator[Marked]:
    """A program that is killed at the end if it still runs."""
    program = Marked.start(argv, work / f"{name}.log")
    try:
        yield program
    finally:
        program.kill_all()


def attach_arguments(serve: Marked) -> list[str]:
    """The QEMU arguments that `serve` prints when it is ready, with the size of RAM put in."""
    deadline = time.monotonic() + 60
    while '"vfio-user-pci"' not in serve.output or not serve.output.endswith("\n"):
        assert serve.process.poll() is None, serve.tail()
        assert time.monotonic() < deadline, serve.tail()
        time.sleep(0.02)
    _, text = serve.output.split("\n", 1)
    return shlex.split(text.replace("\\\n", " ").replace("SIZE", "512M"))


def serve_arguments(work: Path, drive: str) -> list[str]:
    return [
        *(*nvmove_command(), "serve", "--socket", str(work / "nvme"), "--drive", f"id=d0,{drive},format=raw"),
        *("--device", "nvme,serial=S1,drive=d0,addr=7"),
    ]


def assert_ends_on_sigterm(serve: Marked) -> None:
    serve.process.send_signal(signal.SIGTERM)
    assert serve.wait(20) == 0, serve.tail()
    assert wait_gone(serve.mark, 10) == []


def test_a_raw_image_is_served_to_one_qemu_after_the_other(stock: Machine, tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "d0.raw", "64M")
    before = Surroundings.look(work)
    with started(work, "serve", *serve_arguments(work, f"file={image}")) as serve:
        arguments = attach_arguments(serve)
        stock.boot(["-M", "q35", *arguments])
        assert stock.console.check("cat /sys/class/nvme/nvme0/address") == "0000:00:07.0"
        FIO.run(stock.console)
        written = stock.console.check(CHECKSUM)
        assert disk_complaints(stock.console) == []
        assert stock.quit() == 0

        stock.boot(["-M", "q35", *arguments])
        assert stock.console.check(CHECKSUM) == written
        FIO.run(stock.console)
        assert disk_complaints(stock.console) == []
        assert_ends_on_sigterm(serve)  # with the client still there
    stock.kill()
    left = Surroundings.look(work).since(before)
    ours = [line for line in left if str(work) in line]  # other tests may mount and listen meanwhile
    assert [line for line in ours if not line.endswith((".log", "/log", "/qmp", "/runtime"))] == []


def test_qcow2_behind_qemu_nbd_outlives_the_sigkill_of_a_qemu(stock: Machine, tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "d0.qcow2", "64M")
    nbd = [tree.program("qemu-nbd"), "-f", "qcow2", "-k", str(work / "nbd"), "-t", str(image)]
    with started(work, "nbd", *nbd) as server:
        deadline = time.monotonic() + 60
        while not (work / "nbd").is_socket():
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.02)
        drive = f"file=nbd+unix:///?socket={work / 'nbd'}"
        with started(work, "serve", *serve_arguments(work, drive)) as serve:
            arguments = attach_arguments(serve)
            stock.boot(["-M", "q35", *arguments])
            Fio("early", offset=32 << 20, blocks=4096, rate=500).start(stock.console)
            wait_writes(stock.console, 100)
            stock.kill()

            stock.boot(["-M", "q35", *arguments])
            FIO.run(stock.console)
            assert disk_complaints(stock.console) == []
            assert stock.quit() == 0
            assert_ends_on_sigterm(serve)
        assert not (work / "nvme").exists()
        server.process.send_signal(signal.SIGTERM)
        server.wait(20)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_without_a_client_a_signal_ends_it_and_the_socket_is_gone(tree: Sysroot, work: Path, sig: int) -> None:
    image = make_image(tree, work / "d0.raw", "1M")
    with started(work, "serve", *serve_arguments(work, f"file={image}")) as serve:
        attach_arguments(serve)
        assert (work / "nvme").is_socket()
        serve.process.send_signal(sig)
        assert serve.wait(20) == 0
        assert not (work / "nvme").exists()


@pytest.mark.both_engines
def test_a_disk_whose_server_hangs_does_not_keep_it_from_ending(tree: Sysroot, work: Path) -> None:
    image = make_image(tree, work / "d0.raw", "16M")
    nbd = [tree.program("qemu-nbd"), "-f", "raw", "-e", "8", "-k", str(work / "nbd"), "-t", str(image)]
    with started(work, "nbd", *nbd) as server:
        wait((work / "nbd").is_socket, 60)
        arguments = serve_arguments(work, f"file=nbd+unix:///?socket={work / 'nbd'}")
        with started(work, "serve", *arguments) as serve:
            attach_arguments(serve)
            with HostDriver.connect(work / "nvme") as driver:
                driver.make_queues(1)
                driver.run(Job(count=64))
                server.process.send_signal(signal.SIGSTOP)
                reads = time.monotonic() + 0.5  # whatever the device has taken by then is at the server
                driver.abandon(Job(depth=16, count=16), lambda: time.monotonic() > reads)
                serve.process.send_signal(signal.SIGTERM)
                assert serve.wait(60) == 0, serve.tail()
        assert not (work / "nvme").exists()
