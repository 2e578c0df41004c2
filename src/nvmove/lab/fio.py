"""fio in the guest: writes that carry checksums, and their verification."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvmove.lab.console import Console, GuestError


@dataclass(frozen=True, slots=True)
class Fio:
    """A run of random writes with a crc32c in every block, then a read that checks them all."""

    name: str
    device: str = "/dev/nvme0n1"
    blocks: int = 2048
    block_size: int = 4096
    offset: int = 0
    """Where on the device the run begins, in bytes; it covers `blocks` × `block_size` from there."""
    iodepth: int = 16
    rate: int = 0
    """Writes per second at most; 0: as fast as it goes."""
    cpu: int | None = None
    """The guest's CPU it runs on: Linux gives each its own queue."""

    def command(self) -> str:
        """fio's command line."""
        more = f" --rate_iops={self.rate * 100},{self.rate}" if self.rate else ""
        more += f" --cpus_allowed={self.cpu}" if self.cpu is not None else ""
        return (
            f"fio --name={self.name} --filename={self.device} --rw=randwrite --bs={self.block_size}"
            f" --offset={self.offset} --size={self.blocks * self.block_size} --ioengine=libaio"
            f" --iodepth={self.iodepth} --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1{more}"
        )

    def start(self, console: Console) -> None:
        """Start it in the guest's background."""
        out = f"/tmp/fio.{self.name}"
        console.check(f"rm -f {out} {out}.status; (({self.command()} >{out} 2>&1; echo $? >{out}.status) &)")

    def finished(self, console: Console) -> bool:
        """Return whether it has ended well; raise GuestError with fio's words when it ended badly."""
        status = console.run(f"cat /tmp/fio.{self.name}.status")
        if status.status or not status.output.strip():  # the shell makes the file before it writes into it
            return False
        said = console.check(f"cat /tmp/fio.{self.name}")
        if status.output.strip() != "0" or "err= 0" not in said:
            raise GuestError(f"fio {self.name} ended with status {status.output.strip()}: {said[:1000]}")
        return True

    def wait(self, console: Console, timeout: float = 600, tick: Callable[[], None] = lambda: None) -> None:
        """Wait for its end; raise GuestError when it failed, TimeoutError when it takes too long."""
        deadline = time.monotonic() + timeout
        while not self.finished(console):
            if time.monotonic() > deadline:
                said = console.run(f"cat /tmp/fio.{self.name}; dmesg | tail -5")
                raise TimeoutError(f"fio {self.name} has not ended after {timeout:.0f} s: {said.output[-1000:]}")
            tick()
            time.sleep(0.5)

    def run(self, console: Console, timeout: float = 600) -> None:
        """Start it and wait for its end."""
        self.start(console)
        self.wait(console, timeout)


def writes_done(console: Console, device: str = "nvme0n1") -> int:
    """Return how many writes the guest's kernel has completed on a disk (5th field of its `stat`)."""
    return int(console.check(f"cat /sys/block/{device}/stat").split()[4])


def wait_writes(console: Console, count: int, device: str = "nvme0n1", timeout: float = 120) -> int:
    """Wait until at least `count` writes were completed on a disk; return how many."""
    deadline = time.monotonic() + timeout
    while (done := writes_done(console, device)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{done} writes on {device} after {timeout:.0f} s; {count} were expected")
        time.sleep(0.1)
    return done


_COMPLAINTS = re.compile(
    r"nvme.*(timeout|abort|reset|I/O Cmd|I/O error|failed|controller is down|frozen|no response|removing|disabl"
    r"|invalid|spurious|unable|corrupt|mismatch|not ready)"
    r"|Buffer I/O error|I/O error, dev|critical (medium|target|space allocation) error|BUG:|Oops|WARNING:"
    r"|irq \d+: nobody cared|blocked for more than",
    re.IGNORECASE,
)
_SLOW_HOST = re.compile(r"calibrate_delay|8254 timer not connected|soft lockup")
"""What Linux says where emulation stands still for seconds, and where its clock jumps in a load."""


def disk_complaints(console: Console) -> list[str]:
    """Return the lines of the guest's dmesg that speak of trouble with the disk, or of a broken kernel."""
    lines = console.check("dmesg").splitlines()
    return [line for line in lines if _COMPLAINTS.search(line) and not _SLOW_HOST.search(line)]
