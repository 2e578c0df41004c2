"""A disk that does not answer for longer than a guest's driver would wait: the guest sees a slow disk, and no more."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import QUICK, Machine
from nvmove.lab.processes import marked
from nvmove.lab.qmp import Qmp, connect_unix
from nvmove.lab.sysroot import Sysroot
from tests.block_helpers import MIB
from tests.guest.conftest import disk, make_image, overwrite
from tests.guest.failing_disks import fault, wait_hits
from tests.waiting import wait

IMPATIENT = f"{QUICK} nvme_core.io_timeout=5 nvme_core.admin_timeout=5"
"""Linux's driver aborts after 5 s, resets after 10, and waits 7.5 for RDY."""


@pytest.mark.both_engines
@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_an_impatient_driver_waits_for_a_disk_that_stalls(
    machine: Machine, tree: Sysroot, work: Path, suffix: str
) -> None:
    """The VM stands still when the driver aborts, and at whatever it does next, until the disk answers."""
    machine.append = IMPATIENT
    machine.boot(["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))])
    qmp, console = machine.qmp, machine.console
    fio = Fio("v", blocks=800, rate=200)
    fio.start(console)
    wait_writes(console, 100)
    rule = fault(machine, op="write", delay="3600s")
    wait_hits(machine, rule, 1)
    stalled = qmp.wait_event("NVMOVE_DISK_STALLED")["data"]
    assert stalled == {"qom-path": "/machine/peripheral/nvmove0", "stalled": True}
    wait(lambda: qmp.status == "paused")
    qmp.events.clear()
    qmp.execute("nvmove-fault-remove", {"id": rule})
    qmp.wait_event("RESUME")
    fio.wait(console)
    assert qmp.status == "running"
    expected = "timeout, aborting|Abort status|ommand line: "
    assert [line for line in disk_complaints(console) if not re.search(expected, line)] == []
    assert machine.quit() == 0


READS = "fio --name=r --filename=/dev/nvme0n1 --rw=read --bs=1M --size=16M --iodepth=16 --ioengine=libaio --direct=1"


def begin_reads(machine: Machine) -> int:
    """Have reads of 8 MiB and more under way, of which the disk is silent as long as there is the fault returned."""
    rule = fault(machine, op="read", delay="3600s")
    machine.console.check(f"({READS} >/dev/null 2>&1 &)")
    wait_hits(machine, rule, 16)
    return rule


@pytest.mark.both_engines
@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_a_function_level_reset_waits_for_reads_at_a_disk_that_stalls(
    machine: Machine, tree: Sysroot, work: Path, suffix: str
) -> None:
    """The guest's write of the bit takes as long; its driver, which knows nothing of it, makes the disk work again."""
    machine.boot(["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}"))])
    console = machine.console
    rule = begin_reads(machine)
    function = "/sys/bus/pci/devices/" + console.check("basename $(readlink /sys/class/nvme/nvme0/device)")
    console.send(
        f"printf '\\200' | dd of={function}/config bs=1 seek={0x89} conv=notrunc 2>/dev/null; echo is-'reset'\n"
    )
    with pytest.raises(TimeoutError):
        console.read_until("is-reset", 1)
    machine.qmp.execute("nvmove-fault-remove", {"id": rule})
    console.read_until("is-reset", 120)
    console.check(f"echo 1 >{function}/reset", 120)
    console.check("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct", 120)
    Fio("after", blocks=256).run(console)
    assert machine.quit() == 0
    assert machine.started.output == ""


@pytest.mark.both_engines
@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_after_a_system_reset_no_read_of_before_reaches_memory(
    machine: Machine, tree: Sysroot, work: Path, suffix: str
) -> None:
    """All of the guest's memory is looked at, from when QEMU has reset the VM, whose CPUs stand still."""
    monitors = [work / "stop", work / "reset"]
    more = [word for path in monitors for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    machine.boot(["-M", "q35", *disk(make_image(tree, work / f"d0.{suffix}")), *more])
    qmp = machine.qmp
    overwrite(machine)
    rule = begin_reads(machine)
    with contextlib.ExitStack() as cleanup:
        stop, reset = (cleanup.enter_context(waiting(machine, path)) for path in monitors)
        stop("stop")
        qmp.wait_event("STOP")
        before = memory(machine)
        reset("system_reset")
        with contextlib.suppress(TimeoutError):  # as it should be; QEMU's own patience is 5 s
            qmp.wait_event("RESET", timeout=6)
            before = []
        if before:
            qmp.execute("nvmove-fault-remove", {"id": rule})
            qmp.wait_event("RESET")
        after = memory(machine)
        if not before:
            qmp.execute("nvmove-fault-remove", {"id": rule})
    late = changed(after, memory(machine))
    assert before, f"QEMU did not wait for the disk; what it answered then came into these MiB of memory: {late}"
    assert len(changed(before, after)) >= 8
    assert late == []
    qmp.execute("cont")
    machine.console.wait_boot()
    Fio("after", blocks=256).run(machine.console)
    assert machine.quit() == 0
    assert machine.started.output == ""


@contextlib.contextmanager
def waiting(machine: Machine, path: Path) -> Iterator[Callable[[str], None]]:
    """A monitor for one command that is answered some time; it is at the end of the block."""
    with contextlib.closing(Qmp(connect_unix(path, 20, lambda: machine.alive))) as qmp, ThreadPoolExecutor(1) as pool:
        commands = []
        yield lambda name: commands.append(pool.submit(qmp.execute, name))
        for command in commands:
            command.result(60)


def memory(machine: Machine) -> list[int]:
    """Return a checksum of each MiB of the guest's memory: what QEMU's memfd of that name has."""
    links = [path for process in marked(machine.mark) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    (path,) = {
        os.stat(link).st_ino: link for link in links if os.readlink(link).startswith("/memfd:memory-backend-memfd")
    }.values()
    with path.open("rb", buffering=0) as ram:
        return [zlib.crc32(piece) for piece in iter(lambda: ram.read(MIB), b"")]


def changed(before: list[int], after: list[int]) -> list[int]:
    """Return which MiB of memory are not what they were."""
    return [at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
