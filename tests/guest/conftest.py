"""Fixtures of the guest tests. Each machine must leave nothing: no process, socket, file or mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.processes import Marked, marked, wait_gone
from nvmove.lab.sysroot import Sysroot, find_sysroot
from tests.directories import short_directory
from tests.guest.failing_disks import SmallDisk

MachineFactory = Callable[..., Machine]
Nvmove = Callable[..., Marked]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory boots guests: mark it, and give it minutes; what may take longest begins first."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.guest)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))
    items.sort(key=_patience, reverse=True)  # no worker is left with a long one when the others have ended


def _patience(item: pytest.Item) -> int:
    mark = item.get_closest_marker("timeout")
    return int(mark.args[0]) if mark else 0


@pytest.fixture(scope="session")
def tree() -> Sysroot:
    """The sysroot, by its parts."""
    return find_sysroot()


def front() -> list[str]:
    """What stands before QEMU's command line; NVMOVE_TEST_STOCK=1 runs the stories on QEMU's own nvme, to compare."""
    return [] if os.environ.get("NVMOVE_TEST_STOCK") else [*nvmove_command(), "run"]


@contextmanager
def clean_machine(tree: Sysroot, front: list[str], path: Path, memory: str = "512M") -> Iterator[Machine]:
    """A machine. When the test has left it running it is killed; what it then leaves must be nothing that runs."""
    machine = Machine(path, tree, front, memory)
    try:
        yield machine
    finally:
        machine.kill()
    assert marked(machine.mark) == []


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory for one test."""
    with short_directory() as path:
        yield path


@pytest.fixture
def nvmove(work: Path) -> Iterator[Nvmove]:
    """Start `nvmove WORDS…`, its output in `said`; what is left of it when the test is over is killed."""
    with ExitStack() as cleanup:

        def start(*words: str) -> Marked:
            run = Marked.start([*nvmove_command(), *words], work / "said", environment={"TMPDIR": str(work)})
            cleanup.callback(run.kill_all)
            return run

        yield start


@pytest.fixture(scope="module")
def module_work() -> Iterator[Path]:
    """A directory for one module's shared guest."""
    with short_directory() as path:
        yield path


@pytest.fixture
def stock(tree: Sysroot, work: Path) -> Iterator[Machine]:
    """A machine of QEMU alone: the reference."""
    with clean_machine(tree, [], work) as machine:
        yield machine


@pytest.fixture
def machine(tree: Sysroot, work: Path) -> Iterator[Machine]:
    """A machine behind `nvmove run`."""
    with clean_machine(tree, front(), work) as machine:
        yield machine


@pytest.fixture
def small(work: Path) -> Iterator[SmallDisk]:
    """A filesystem of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small filesystem")
    disk = SmallDisk(work / "small", 4)
    try:
        yield disk
    finally:
        disk.unmount()


@pytest.fixture
def machines(tree: Sysroot, work: Path) -> Iterator[MachineFactory]:
    """A factory of machines behind `nvmove run`, each in its own directory below `work`."""
    with ExitStack() as stack:

        def make(name: str, memory: str = "512M") -> Machine:
            return stack.enter_context(clean_machine(tree, front(), work / name, memory))

        yield make


def make_image(tree: Sysroot, path: Path, size: str = "256M") -> Path:
    """Create an empty image; its suffix says the format (`.qcow2`, else raw)."""
    kind = "qcow2" if path.suffix == ".qcow2" else "raw"
    subprocess.run([tree.program("qemu-img"), "create", "-q", "-f", kind, str(path), size], check=True)
    return path


def disk(path: Path, name: str = "d0", *, drive: str = "", device: str = "") -> list[str]:
    """The arguments of an NVMe disk on an image; `drive` and `device` are more options of each."""
    kind = "qcow2" if path.suffix == ".qcow2" else "raw"
    more = [f",{options}" if options else "" for options in (drive, device)]
    return [
        *("-drive", f"if=none,id={name},file={path},format={kind}{more[0]}"),
        *("-device", f"nvme,serial=S-{name},drive={name}{more[1]}"),
    ]


def savevm(machine: Machine, tag: str) -> None:
    """HMP savevm, which says nothing when it has done it."""
    assert machine.qmp.hmp(f"savevm {tag}") == ""


def loadvm(machine: Machine, tag: str) -> None:
    """HMP loadvm, into the running VM; what was done since is undone, in memory too."""
    machine.console.check("touch /tmp/future")
    assert machine.qmp.hmp(f"loadvm {tag}") == ""
    assert machine.qmp.status == "running"
    assert machine.console.run("[ -e /tmp/future ]").status == 1


def overwrite(machine: Machine, device: str = "/dev/nvme0n1", size: str = "16M") -> None:
    """Write other data over the beginning of a disk."""
    machine.console.check(
        f"fio --name=other --filename={device} --rw=write --bs=64k --size={size} --direct=1"
        " --buffer_pattern=0xdeadbeef --end_fsync=1"
    )


def assert_nothing_left(machine: Machine, before: Surroundings, *, but: tuple[str, ...] = ()) -> None:
    """Fail when a process of `machine` still runs, or anything is there that was not there `before`.

    `but`: ends of names that may be there, such as the log that the harness itself writes.
    """
    assert wait_gone(machine.mark, 10) == []
    left = Surroundings.look(machine.directory).since(before)
    assert [line for line in left if not line.endswith(("/log", "/runtime", *but))] == []


def block_device(machine: Machine, drive: str, nsid: int = 1) -> str:
    """Return the guest's name of a namespace of the device that `disk` made for `drive`: Linux numbers as it finds."""
    listing = machine.console.check(
        "for disk in /sys/block/nvme*; do echo $(basename $disk) $(cat $disk/nsid $disk/device/serial); done"
    )
    (name,) = (words[0] for words in map(str.split, listing.splitlines()) if words[1:] == [str(nsid), f"S-{drive}"])
    return name
