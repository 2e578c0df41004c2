"""A newcomer's mistakes: each is one clear line and an exit status; nothing is started, nothing is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.processes import Marked, marked
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import disk, make_image, savevm
from tests.waiting import wait

LIMIT = 60


def refused(
    work: Path, tree: Sysroot, arguments: Sequence[str], *, qemu: str | None = None, path: str | None = None
) -> str:
    """Run `nvmove run QEMU ARGUMENTS`, which must fail with one line; return the line."""
    runtime = work / "rt"
    runtime.mkdir(mode=0o700, exist_ok=True)
    before = Surroundings.look(work)
    log = work / "said"
    environment = {"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(runtime)}
    if path is not None:
        environment["PATH"] = path
    program = qemu or tree.program("qemu-system-x86_64")
    started = Marked.start(
        [*nvmove_command(), "run", program, "-nodefaults", "-display", "none", *arguments],
        log,
        environment=environment,
    )
    try:
        status = started.wait(LIMIT)
    finally:
        started.kill_all()
    said = started.output
    log.unlink()
    assert status == 1, said
    lines = said.splitlines()
    if lines[1:] and lines[1].startswith("Is another process using the image"):
        del lines[1]  # QEMU's own hint, with its own message
    assert len(lines) == 1, said
    assert lines[0].startswith("nvmove: ") or "qemu-system" in lines[0], said
    assert "Traceback" not in said
    assert marked(started.mark) == []
    assert Surroundings.look(work).since(before) == []
    return said


@pytest.fixture
def image(tree: Sysroot, work: Path) -> Path:
    return make_image(tree, work / "d0.qcow2", "16M")


def drive(options: str) -> list[str]:
    return ["-drive", f"if=none,id=d0,{options}"]


NVME = ["-device", "nvme,serial=S1,drive=d0"]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_missing_image(work: Path, tree: Sysroot, kind: str) -> None:
    said = refused(work, tree, [*drive(f"file={work}/absent.{kind},format={kind}"), *NVME])
    assert f"{work}/absent.{kind}" in said and "No such file or directory" in said


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_image_in_use_by_another_vm(machine: Machine, work: Path, tree: Sysroot, kind: str) -> None:
    used = disk(make_image(tree, work / f"used.{kind}", "16M"))
    machine.start(["-M", "q35", *used])
    said = refused(work, tree, ["-M", "q35", *used])
    assert "lock" in said and f"{work}/used.{kind}" in said
    assert machine.qmp.status == "running"


def test_unknown_format(work: Path, tree: Sysroot, image: Path) -> None:
    assert "Unknown driver 'qcow7'" in refused(work, tree, [*drive(f"file={image},format=qcow7"), *NVME])


def test_wrong_format(work: Path, tree: Sysroot) -> None:
    raw = make_image(tree, work / "d.raw", "16M")
    assert "not in qcow2 format" in refused(work, tree, [*drive(f"file={raw},format=qcow2"), *NVME])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nvme,serial=S1,drive=d0,sreial=x", "'nvme.sreial' not found"),
        ("nvme,drive=d0", "serial property not set"),
        ("nvme,serial=S1,drive=d7", "can't find value 'd7'"),
        ("nvme,serial=S1,drive=d0,max_ioqpairs=many", "max_ioqpairs"),
        ("nvme,serial=S1,drive=d0,cmb_size_mb=16", "cmb_size_mb"),
    ],
)
def test_wrong_properties(work: Path, tree: Sysroot, image: Path, device: str, message: str) -> None:
    assert message in refused(work, tree, [*drive(f"file={image},format=qcow2"), "-device", device])


@pytest.mark.parametrize("option", ["rerror=enospc", "werror=pause"])
def test_policies_that_there_are_not(work: Path, tree: Sysroot, image: Path, option: str) -> None:
    said = refused(work, tree, [*drive(f"file={image},format=qcow2,{option}"), *NVME])
    assert f"'{option.split('=')[1]}' invalid {'read' if option.startswith('r') else 'write'} error action" in said


def test_a_memory_backend_that_is_not_shared(work: Path, tree: Sysroot, image: Path) -> None:
    memory = ["-m", "256M", "-object", "memory-backend-ram,id=m,size=256M", "-machine", "q35,memory-backend=m"]
    assert "share=on" in refused(work, tree, [*memory, *drive(f"file={image},format=qcow2"), *NVME])


def test_no_qemu(work: Path, tree: Sysroot, image: Path) -> None:
    said = refused(work, tree, [*drive(f"file={image},format=qcow2"), *NVME], qemu="qemu-system-none")
    assert "qemu-system-none" in said and "10.1" in said


def test_qemu_too_old(work: Path, tree: Sysroot, image: Path) -> None:
    old = work / "qemu-old"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)'\n")
    old.chmod(0o755)
    said = refused(work, tree, [*drive(f"file={image},format=qcow2"), *NVME], qemu=str(old))
    assert "10.1" in said and "7.2.22" in said


def test_no_dbus_daemon(work: Path, tree: Sysroot, image: Path) -> None:
    tools = work / "tools"
    tools.mkdir()
    for tool in ("sh", "env", "readlink"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    said = refused(work, tree, [*drive(f"file={image},format=qcow2"), *NVME], path=str(tools))
    assert "dbus-daemon" in said


def test_socket_path_too_long(work: Path, tree: Sysroot, image: Path) -> None:
    monitor = ["-qmp", f"unix:{work}/{'x' * 120},server=on,wait=off"]
    assert "too long" in refused(work, tree, [*monitor, *drive(f"file={image},format=qcow2"), *NVME])


def test_monitor_socket_in_a_directory_that_is_not_there(work: Path, tree: Sysroot, image: Path) -> None:
    monitor = ["-qmp", f"unix:{work}/none/qmp,server=on,wait=off"]
    assert "No such file or directory" in refused(work, tree, [*monitor, *drive(f"file={image},format=qcow2"), *NVME])


def test_loadvm_of_a_snapshot_that_does_not_exist(work: Path, tree: Sysroot, image: Path) -> None:
    said = refused(work, tree, ["-M", "q35", *drive(f"file={image},format=qcow2"), *NVME, "-loadvm", "absent"])
    assert "absent" in said


def test_a_manager_finds_the_line_when_its_monitor_is_closed(work: Path, tree: Sysroot, image: Path) -> None:
    words = ["-nodefaults", "-display", "none", "-M", "q35", *disk(image), "-loadvm", "absent"]
    monitor = ["-qmp", f"unix:{work}/qmp,server=on,wait=off"]
    started = Marked.start(
        [*nvmove_command(), "run", tree.program("qemu-system-x86_64"), *words, *monitor],
        work / "said",
        environment={"XDG_RUNTIME_DIR": str(work)},
    )
    try:
        with socket.socket(socket.AF_UNIX) as manager:
            wait(lambda: manager.connect_ex(f"{work}/qmp") == 0)
            manager.settimeout(LIMIT)
            with contextlib.suppress(ConnectionResetError):
                while manager.recv(4096):
                    pass
            assert "absent" in started.output
        assert started.wait(LIMIT) == 1
    finally:
        started.kill_all()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("usb-storage,drive=d1", "No 'usb-bus' bus found for device 'usb-storage'"),
        ("nvme,serial=S2,drive=d1,bus=none.0", "Bus 'none.0' not found"),
        ("nvme,serial=S2,drive=d1,addr=1f", "PCI: slot 31 function 0 not available for nvme"),
    ],
)
def test_qemus_own_messages_name_what_was_typed(
    work: Path, tree: Sysroot, image: Path, device: str, message: str
) -> None:
    second = ["-drive", "if=none,id=d1,driver=null-co,size=1M"]
    said = refused(work, tree, ["-M", "q35", *drive(f"file={image},format=qcow2"), *NVME, *second, "-device", device])
    assert f": -device {device}: {message}" in said


def test_more_memory_than_there_is(work: Path, tree: Sysroot, image: Path) -> None:
    said = refused(work, tree, ["-m", "512T", *drive(f"file={image},format=qcow2"), *NVME])
    assert "cannot set up guest memory" in said and "Cannot allocate memory" in said


def test_snapshot_names_in_the_running_vm(machine: Machine, image: Path) -> None:
    machine.start(["-M", "q35", *disk(image)])
    assert "absent" in machine.qmp.hmp("loadvm absent")
    assert machine.qmp.status == "running"
    assert machine.quit() == 0


def test_snapshot_of_another_device_configuration(machine: Machine, work: Path, tree: Sysroot, image: Path) -> None:
    machine.start(["-M", "q35", *disk(image)])
    savevm(machine, "t1")
    assert machine.quit() == 0
    other = disk(image, device="max_ioqpairs=7")
    said = refused(work, tree, ["-M", "q35", "-m", machine.memory, *other, "-loadvm", "t1"])
    assert "max_ioqpairs" in said or "configuration" in said


def test_wrong_usage_is_status_2(work: Path) -> None:
    for arguments in (["run"], ["no-such-command"], ["serve"], ["inspect"]):
        started = Marked.start([*nvmove_command(), *arguments], work / "said", environment={"PATH": os.defpath})
        assert started.wait(LIMIT) == 2
    assert "Traceback" not in (work / "said").read_text()


def test_demo_without_a_sysroot_says_what_to_do(work: Path) -> None:
    started = Marked.start([*nvmove_command(), "demo"], work / "said", environment={"XDG_CACHE_HOME": str(work)})
    assert started.wait(LIMIT) == 1
    assert "make sysroot" in started.output and len(started.output.splitlines()) == 1
