"""`nvmove demo`: what nvmove is for, shown on a real Linux guest on this machine.

fio writes blocks that carry checksums. In the midst of it the VM is saved; then the disk is overwritten and the VM
reverted in place; then everything is killed and the VM loaded by new processes; then the disk is full, the VM pauses
and goes on when there is room; then the VM moves to another QEMU while fio writes, and once more, paused, with the
writes that a full disk refused. Each time fio goes on where it was and verifies every block. Every step is checked; the
exit status is 0 only when all of them held.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as Screen
from rich.markup import escape
from rich.table import Table

from nvmove.lab.console import GuestError
from nvmove.lab.fio import Fio, disk_complaints, wait_writes, writes_done
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine, nvmove_command
from nvmove.lab.migration import Traveller
from nvmove.lab.processes import wait_gone
from nvmove.lab.qmp import QmpClosed, QmpError
from nvmove.lab.scratch import terminate_as_interrupt, working_directory
from nvmove.lab.sysroot import Sysroot, find_sysroot

_FAILURES = (GuestError, TimeoutError, QmpError, QmpClosed)
_PREFIX = "nvmove-demo-"
_FIO = Fio("demo", blocks=2000, rate=200)
_FIO_FULL = Fio("full", blocks=2000, iodepth=32)
_FIO_MOVED = Fio("moved", blocks=1200, rate=200, iodepth=32)
_FIO_HELD = Fio("held", blocks=2000, iodepth=32)
_SAVE_AFTER = 500
_TAG = "t1"
_FUTURE = "/tmp/after-savevm"
"""A file in the guest's memory that must not be there in the past."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the story: what happens, and the function that does it and returns what it found."""

    title: str
    act: Callable[[], str]


class Story:
    """The steps, in order, and what they hand on to each other."""

    def __init__(self, directory: Path, sysroot: Sysroot, front: Sequence[str]) -> None:
        self.directory = directory
        self.sysroot = sysroot
        self.image = directory / "disk.qcow2"
        self.front = front
        self.machines: list[Machine] = []
        self.vm = Traveller(self._machine("vm"), self.arguments, self._machine)
        self.rule = 0
        """The id of the fault that makes the disk full."""
        self.seen = 0
        """How many requests it has met so far."""
        self.steps = [
            Step("boot Linux with an NVMe disk on a qcow2 image", self.boot),
            Step("start fio in the guest: random writes, a checksum in every block", self.start_fio),
            Step(f"savevm {_TAG}, in the midst of the writes", self.save),
            Step("fio goes on, ends and verifies", self.verify),
            Step("overwrite what fio wrote", self.overwrite),
            Step(f"loadvm {_TAG} into the running VM", self.revert),
            Step("fio, back in the midst of its writes, ends and verifies", self.verify),
            Step("overwrite it again, then SIGKILL every process", self.kill),
            Step(f"start new processes with -loadvm {_TAG}", self.load),
            Step("fio, in a new QEMU on a new device, ends and verifies", self.verify),
            Step("the disk is full: fio writes, the VM pauses", self.fill),
            Step("cont without room: it pauses again", self.try_again),
            Step("there is room: cont", self.make_room),
            Step("fio has seen a slow disk only, ends and verifies", self.verify_full),
            Step("fio once more; migrate to another QEMU, in the midst of the writes", self.migrate),
            Step("fio, on the other side, ends and verifies", self.verify_moved),
            Step("the disk is full again: the VM pauses", self.fill_again),
            Step("migrate the paused VM and the writes that it holds", self.migrate_held),
            Step("there is room on this side: cont", self.cont),
            Step("fio ends and verifies", self.verify_held),
            Step("nothing is left running or lying about", self.leave),
        ]

    def _machine(self, name: str) -> Machine:
        self.machines.append(Machine(self.directory / name, self.sysroot, self.front))
        return self.machines[-1]

    @property
    def machine(self) -> Machine:
        """Where the guest is."""
        return self.vm.machine

    @property
    def arguments(self) -> list[str]:
        """QEMU's arguments for the disk."""
        drive = f"if=none,id=d0,file={self.image},format=qcow2"
        return ["-M", "q35", "-drive", drive, "-device", "nvme,serial=S1,drive=d0"]

    def boot(self) -> str:
        """Make the image and boot."""
        qemu_img = [self.sysroot.program("qemu-img"), "create", "-q", "-f", "qcow2", str(self.image), "256M"]
        subprocess.run(qemu_img, check=True)
        self.vm.boot()
        return f"Linux {self.machine.console.check('uname -r')} on {self.sysroot.qemu_version.split('(')[0].strip()}"

    def start_fio(self) -> str:
        """Start the writes and wait until they are well under way."""
        _FIO.start(self.machine.console)
        wait_writes(self.machine.console, _SAVE_AFTER)
        return f"{_SAVE_AFTER} of {_FIO.blocks} blocks are written"

    def save(self) -> str:
        """Save the VM while fio writes."""
        if said := self.machine.qmp.hmp(f"savevm {_TAG}").strip():
            raise GuestError(f"savevm said: {said}")
        if _FIO.finished(self.machine.console):
            raise GuestError("fio had ended before the VM was saved: this shows nothing")
        listing = self.machine.qmp.hmp("info snapshots")
        row = re.search(rf"^\S+\s+{_TAG}\s+([\d.]+ \S+)", listing, re.MULTILINE)
        if row is None:
            raise GuestError(f"there is no snapshot {_TAG} afterwards: {listing.strip()}")
        return f"{row[1]} of VM state in {self.image.name}; the VM runs on"

    def verify(self) -> str:
        """Wait for fio, which fails on one wrong byte, and look for complaints in the guest's log."""
        return self._verify(_FIO)

    def _verify(self, fio: Fio) -> str:
        fio.wait(self.machine.console)
        if complaints := disk_complaints(self.machine.console):
            raise GuestError(f"the guest's kernel complains: {complaints[0]}")
        return f"{fio.blocks} checksums are right; the kernel has no complaint"

    def overwrite(self) -> str:
        """Write other data over all that fio wrote."""
        size = _FIO.blocks * _FIO.block_size
        self.machine.console.check(f"touch {_FUTURE}")
        self.machine.console.check(
            f"fio --name=other --filename={_FIO.device} --rw=write --bs=64k --size={size} --direct=1"
            " --buffer_pattern=0xdeadbeef --end_fsync=1"
        )
        return f"{size >> 10} KiB of 0xdeadbeef"

    def revert(self) -> str:
        """Load the snapshot into the running VM."""
        if said := self.machine.qmp.hmp(f"loadvm {_TAG}").strip():
            raise GuestError(f"loadvm said: {said}")
        return self._in_the_midst()

    def kill(self) -> str:
        """Overwrite, and take everything away without a warning."""
        self.overwrite()
        return f"{len(self.machine.kill())} processes killed"

    def load(self) -> str:
        """Start the VM from the snapshot."""
        self.machine.start([*self.machine.linux, *self.arguments, "-loadvm", _TAG])
        return self._in_the_midst()

    def _in_the_midst(self) -> str:
        console = self.machine.console
        if not console.run(f"[ -e {_FUTURE} ]").status:
            raise GuestError("what was done after savevm is still there: this is not the moment that was saved")
        return "the guest is where it was, and fio goes on"

    def fill(self) -> str:
        """Write on a full disk."""
        return self._fill(_FIO_FULL)

    def _fill(self, fio: Fio) -> str:
        """Let every write fail as on a full filesystem, which a demo without root cannot have, and write."""
        self.rule = self.machine.qmp.execute("nvmove-fault-add", {"op": "write", "errno": "ENOSPC"})["id"]
        fio.start(self.machine.console)
        return self._wait_pause()

    def try_again(self) -> str:
        """Let the VM run on: what is held fails again, and is held again."""
        self.machine.qmp.execute("cont")
        return self._wait_pause()

    def _wait_pause(self) -> str:
        qmp = self.machine.qmp
        error = qmp.wait_event("BLOCK_IO_ERROR")["data"]
        qmp.wait_event("STOP")
        if qmp.status != "io-error":
            raise GuestError(f"the VM is '{qmp.status}' and not in io-error")
        held = sum(rule["hits"] for rule in qmp.execute("nvmove-fault-list")) - self.seen
        self.seen += held
        return f"{error['reason']}: {held} writes failed and are held; the run state is io-error"

    def make_room(self) -> str:
        """Let writes succeed again, and the VM run on."""
        self.machine.qmp.execute("nvmove-fault-remove", {"id": self.rule})
        self.machine.qmp.execute("cont")
        if self.machine.qmp.status != "running":
            raise GuestError(f"the VM is '{self.machine.qmp.status}' and does not run")
        return "what was held is written now, and the guest goes on"

    def verify_full(self) -> str:
        """Wait for the fio that met the full disk."""
        return self._verify(_FIO_FULL)

    def migrate(self) -> str:
        """Move the running VM while fio writes."""
        _FIO_MOVED.start(self.machine.console)
        done = writes_done(self.machine.console)
        wait_writes(self.machine.console, done + 200)
        answer = self.vm.hop()
        if self.machine.qmp.status != "running":
            raise GuestError(f"the VM is '{self.machine.qmp.status}' on the other side and does not run")
        if _FIO_MOVED.finished(self.machine.console):
            raise GuestError("fio had ended before the VM moved: this shows nothing")
        return f"{_moved(answer)}; the VM runs there, and stood still for {answer['downtime']} ms"

    def verify_moved(self) -> str:
        """Wait for the fio that moved."""
        return self._verify(_FIO_MOVED)

    def fill_again(self) -> str:
        """Write on a full disk once more, for what is held to move."""
        self.seen = 0
        return self._fill(_FIO_HELD)

    def migrate_held(self) -> str:
        """Move the VM that is paused for an error."""
        answer = self.vm.hop()
        if self.machine.qmp.status != "io-error":
            raise GuestError(f"the VM is '{self.machine.qmp.status}' on the other side and not in io-error")
        return f"{_moved(answer)}; the VM is in io-error there too"

    def cont(self) -> str:
        """Let the VM run on where nothing fails."""
        self.machine.qmp.execute("cont")
        return "what was held over there is written here"

    def verify_held(self) -> str:
        """Wait for the fio whose writes moved while they were held."""
        return self._verify(_FIO_HELD)

    def leave(self) -> str:
        """End the VM and look for what it and those that it left have left."""
        status = self.machine.quit()
        if status:
            raise GuestError(f"the VM ended with status {status}; {self.machine.started.tail()}")
        now = Surroundings.look(self.directory)
        for machine in self.machines:
            if left := wait_gone(machine.mark, 10):
                raise GuestError(f"still running: {left[0].command} (pid {left[0].pid})")
            files = [path for path in machine.directory.rglob("*") if path.name != "log" and not path.is_dir()]
            if left_over := [*sorted(now.sockets), *sorted(map(str, files)), *sorted(now.shared_memory)]:
                raise GuestError(f"left behind: {', '.join(left_over)}")
        return "no process, no socket, no file"

    def kill_all(self) -> None:
        """End whatever still runs."""
        for machine in self.machines:
            machine.kill()


def _moved(answer: Mapping[str, Any]) -> str:
    return f"{answer['ram']['transferred'] >> 20} MiB sent in {answer['total-time'] / 1000:.1f} s"


def _last_words(machine: Machine) -> str:
    """Return why the VM is not there any more, when it is not."""
    if machine.process_ended(within=2):
        return f" (the VM ended with status {machine.started.wait(1)}; {machine.started.tail(4)})"
    return ""


def _tell(screen: Screen, story: Story) -> list[tuple[str, str, float]]:
    """Do the steps until one fails; return the verdict, finding and duration in seconds of those that were done."""
    done: list[tuple[str, str, float]] = []
    steps = story.steps
    for number, step in enumerate(steps, 1):
        start = time.monotonic()
        verdict = "held"
        with screen.status(f"{number}/{len(steps)} {step.title}…"):
            try:
                finding = step.act()
            except _FAILURES as error:
                verdict, finding = "failed", f"{error}{_last_words(story.machine)}"
        seconds = time.monotonic() - start
        sign = "[green]✓[/]" if verdict == "held" else "[red]✗[/]"
        screen.print(f"{sign} {number:2}/{len(steps)} {step.title} [dim]({seconds:.1f} s)[/]")
        screen.print(f"        {escape(finding)}", style="" if verdict == "failed" else "dim", highlight=False)
        done.append((verdict, finding, seconds))
        if verdict == "failed":
            break
    return done


def _table(steps: Sequence[Step], done: Sequence[tuple[str, str, float]]) -> Table:
    table = Table(title="nvmove demo", caption=f"{sum(seconds for _, _, seconds in done):.0f} s in all")
    table.add_column("step", justify="right")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("result")
    for number, step in enumerate(steps, 1):
        verdict, seconds = (
            ("not reached", "") if number > len(done) else (done[number - 1][0], f"{done[number - 1][2]:.1f}")
        )
        style = {"held": "green", "failed": "bold red"}.get(verdict, "dim")
        table.add_row(str(number), step.title, seconds, f"[{style}]{verdict}[/]")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nvmove demo`."""
    parser.add_argument(
        "--qemu-nvme",
        action="store_true",
        help="tell the same story on QEMU's own nvme device instead, to see the difference",
    )


def run(args: argparse.Namespace) -> int:
    """Tell the story; return 0 when every step held, 1 when one did not, 130 after Ctrl-C. Raise SysrootError."""
    screen = Screen()
    sysroot = find_sysroot()
    front = [] if args.qemu_nvme else [*nvmove_command(), "run"]
    try:
        with terminate_as_interrupt(), working_directory(_PREFIX) as directory:
            story = Story(directory, sysroot, front)
            try:
                done = _tell(screen, story)
            finally:
                story.kill_all()
    except KeyboardInterrupt:
        screen.print("interrupted; nothing is left")
        return 130
    screen.print(_table(story.steps, done))
    return 0 if len(done) == len(story.steps) and all(verdict == "held" for verdict, _, _ in done) else 1
