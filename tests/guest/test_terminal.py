"""nvmove on a person's terminal: Ctrl-C, Ctrl-a, and how a VM that ends by itself ends nvmove."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image

Terminal = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def terminal(tree: Sysroot, work: Path) -> Iterator[Terminal]:
    """A factory of `nvmove run` on a terminal; what it started is gone in the end."""
    opened: list[pexpect.spawn[str]] = []
    image = make_image(tree, work / "d0.qcow2", "16M")

    def open_one(*arguments: str, linux: bool = False) -> pexpect.spawn[str]:
        kernel = Machine(work, tree, []).linux if linux else []
        command = [*nvmove_command(), "run", tree.program("qemu-system-x86_64"), "-M", "q35", "-m", "512M"]
        command += [*disk(image), *kernel, *arguments]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(work)}
        child = pexpect.spawn(command[0], command[1:], env=environment, timeout=90, encoding="utf-8")
        opened.append(child)
        return child

    yield open_one
    for child in opened:
        child.close(force=True)
    assert [path.name for path in work.glob("nvmove-*")] == []


BARE = ("-nodefaults", "-display", "none")


def status(child: pexpect.spawn[str]) -> int | None:
    child.expect(pexpect.EOF)
    child.wait()
    return child.exitstatus


def to_monitor_and_back(child: pexpect.spawn[str]) -> None:
    """Ctrl-C is the guest's, Ctrl-a c the monitor, Ctrl-a x the end."""
    child.expect_exact("guest# ")
    child.sendintr()
    child.expect_exact("guest# ")
    child.send("\x01c")
    child.expect_exact("(qemu) ")
    child.send("info status\r")
    child.expect_exact("VM status: running")
    child.send("\x01c")
    child.send("echo a''b\r")
    child.expect_exact("ab")
    child.send("\x01x")
    assert status(child) == 0


def test_ctrl_c_at_the_monitor_ends_the_vm(terminal: Terminal) -> None:
    child = terminal(*BARE, "-monitor", "stdio")
    child.expect_exact("(qemu) ")
    child.sendintr()
    assert status(child) == 0


def test_quit_at_the_monitor(terminal: Terminal) -> None:
    child = terminal(*BARE, "-monitor", "stdio")
    child.expect_exact("(qemu) ")
    child.send("quit\r")
    assert status(child) == 0


def test_the_guest_and_the_monitor_share_a_serial_port(terminal: Terminal) -> None:
    to_monitor_and_back(terminal(*BARE, "-serial", "mon:stdio", linux=True))


def test_nographic(terminal: Terminal) -> None:
    to_monitor_and_back(terminal("-nographic", "-nic", "none", linux=True))


def test_a_guests_reboot_ends_a_vm_with_no_reboot(terminal: Terminal) -> None:
    child = terminal(*BARE, "-serial", "stdio", "-no-reboot", linux=True)
    child.expect_exact("guest# ")
    child.send("reboot -f\r")
    assert status(child) == 0
