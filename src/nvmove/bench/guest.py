"""The guest benchmark: fio in the same stock Linux, on nvmove and on QEMU's own nvme, turn and turn about.

Both guests are booted at the start; the one that is not measured is stopped, and costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvmove.bench.measure import Settings, make_image, marked_cpu_seconds, median
from nvmove.bench.report import Section
from nvmove.lab.console import Console, GuestError
from nvmove.lab.machine import Machine, nvmove_command

FRONTS = {"nvmove": [*nvmove_command(), "run"], "qemu": []}
"""What stands before QEMU's command line."""
DEPTHS = (1, 32)
_WRITE_FIELDS = 41
"""fio's terse format, version 3: the fields of writes come so many after those of reads (fio(1), TERSE OUTPUT)."""
_KIB, _IOPS, _PERCENTILES = 5, 7, slice(17, 37)


@dataclasses.dataclass(frozen=True, slots=True)
class GuestFio:
    """A time of random reads or writes of 4 KiB in a guest."""

    rw: str
    depth: int
    seconds: float
    device: str = "/dev/nvme0n1"

    @property
    def command(self) -> str:
        """fio's command line; without `seconds` it does one command and ends."""
        length = f"--time_based --runtime={max(1, round(self.seconds * 1000))}ms" if self.seconds else "--number_ios=1"
        return (
            f"fio --name=bench --filename={self.device} --rw=rand{self.rw} --bs=4k --ioengine=libaio"
            f" --iodepth={self.depth} --direct=1 {length} --norandommap --randrepeat=0 --minimal --terse-version=3"
        )

    def run(self, console: Console) -> dict[str, float]:
        """Run it; return commands, iops, p50_us and p99_us. Raises GuestError."""
        return parse_terse(console.check(self.command, self.seconds + 120), self.rw)


def parse_terse(said: str, rw: str) -> dict[str, float]:
    """Read fio's terse line; raises GuestError when there is none, or it tells of an error."""
    line = next((line for line in said.splitlines() if line.startswith("3;")), "")
    fields = line.split(";")
    shift = _WRITE_FIELDS if rw == "write" else 0
    if len(fields) < _PERCENTILES.stop + shift or fields[4] != "0":
        raise GuestError(f"fio said: {said[-500:]}")
    percentiles = dict(field.split("%=") for field in fields[_PERCENTILES.start + shift : _PERCENTILES.stop + shift])
    return {
        "commands": int(fields[_KIB + shift]) / 4,
        "iops": float(fields[_IOPS + shift]),
        "p50_us": float(percentiles.get("50.000000", 0)),
        "p99_us": float(percentiles.get("99.000000", 0)),
    }


def disk_arguments(image: Path) -> list[str]:
    """Return QEMU's arguments for a raw image on an NVMe disk."""
    return ["-M", "q35", "-drive", f"if=none,id=d0,file={image},format=raw", "-device", "nvme,serial=bench,drive=d0"]


@contextlib.contextmanager
def machines(settings: Settings) -> Iterator[dict[str, Machine]]:
    """Two guests that are booted and stopped, on images of their own in memory."""
    with contextlib.ExitStack() as cleanup:
        found = {}
        for name, front in FRONTS.items():
            settings.tell(f"boot on {name}")
            machine = Machine(settings.directory / name[0], settings.sysroot, front, memory="384M")
            cleanup.callback(machine.kill)
            machine.boot(disk_arguments(make_image(settings.memory / f"{name}.img", settings.image)))
            machine.qmp.execute("stop")
            found[name] = machine
        yield found


def measure(settings: Settings) -> Section:
    """Measure; raises GuestError."""
    section = Section(
        "guest",
        "In a guest (TCG): 4 KiB at random, image in memory",
        {
            "what": "device",
            "rw": "random",
            "depth": "depth",
            "iops": "IOPS",
            "p50_us": "p50 µs",
            "p99_us": "p99 µs",
            "cpu_us": "host CPU µs/IO",
        },
    )
    found: defaultdict[tuple[str, int, str], list[dict[str, float]]] = defaultdict(list)
    with machines(settings) as guests:
        for number in range(settings.rounds):
            order = list(guests) if number % 2 == 0 else list(reversed(guests))
            for rw in ("read", "write"):
                for depth in DEPTHS:
                    for name in order:
                        settings.tell(f"round {number + 1} of {settings.rounds}: {rw}, depth {depth}, on {name}")
                        found[rw, depth, name].append(_measure(guests[name], GuestFio(rw, depth, settings.seconds)))
    for (rw, depth, name), rounds in found.items():
        row: dict[str, Any] = {"what": name, "rw": rw, "depth": depth, "cpu_us": _cpu_us(rounds)}
        row |= {key: median([one[key] for one in rounds]) for key in ("iops", "p50_us", "p99_us")}
        section.rows.append(row | {"rounds": rounds})
    for rw, depth in dict.fromkeys((rw, depth) for rw, depth, _ in found):
        ours, theirs = (found[rw, depth, name] for name in FRONTS)
        what = f"{rw}, depth {depth}"
        iops = [[one["iops"] for one in rounds] for rounds in (ours, theirs)]
        section.ratio_of_rounds(f"{what}: IOPS / QEMU's nvme", iops[0], iops[1], 1.0)
        section.ratio(f"{what}: host CPU per I/O / QEMU's nvme", _cpu_us(ours), _cpu_us(theirs), 1.0, at_most=True)
    return section


def _cpu_us(rounds: Sequence[dict[str, float]]) -> float:
    """Return what a command costs the host, in microseconds, without what fio's start and end cost."""
    around = median([one["around_cpu_s"] for one in rounds])
    used = sum(one["cpu_s"] - around for one in rounds)
    return max(used, 0.0) / max(sum(one["commands"] for one in rounds), 1) * 1e6


def _measure(machine: Machine, fio: GuestFio) -> dict[str, float]:
    """Run fio for one command only, and as it is; return what it found, and the processor time of both."""
    machine.qmp.execute("cont")
    _, around = _cpu(machine, dataclasses.replace(fio, seconds=0))
    found, used = _cpu(machine, fio)
    machine.qmp.execute("stop")
    return found | {"cpu_s": used, "around_cpu_s": around}


def _cpu(machine: Machine, fio: GuestFio) -> tuple[dict[str, float], float]:
    """Return what fio found, and the seconds of processor time that QEMU and nvmove have used meanwhile."""
    before = marked_cpu_seconds(machine.mark)
    found = fio.run(machine.console)
    return found, marked_cpu_seconds(machine.mark) - before
