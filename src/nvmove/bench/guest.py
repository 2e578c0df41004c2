"""The guest benchmark: fio in the same stock Linux, on nvmove and on QEMU's own nvme, turn and turn about.

Both guests run the same fio all the time, but only one of them runs: they are stopped and go on in slices of a quarter
of a second, so that whatever the machine does besides meets both. QEMU counts the commands. How fast a guest is differs
from one start of fio to the next more than from slice to slice, so each round starts it anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nvmove.bench.measure import Settings, cpu_seconds, make_image, median
from nvmove.bench.report import Section
from nvmove.lab.console import Console, GuestError
from nvmove.lab.machine import LINUX, Machine, nvmove_command
from nvmove.lab.processes import marked

FRONTS = {"nvmove": [*nvmove_command(), "run"], "qemu": []}
"""What stands before QEMU's command line."""
GOALS = {"raw": {1: (1.0, 1.0), 32: (1.0, 1.0)}, "qcow2": {1: (1.0, 1.2), 32: (1.5, 1.0)}}
"""By format and depth: IOPS at least, and processor time of a command at most, both of QEMU's nvme."""
_SLICE, _SETTLE = 0.25, 0.05
"""Seconds: how long a guest is measured at a time, and how long it has run again before that."""
_WARM = 100
"""Commands that fio has done when it is under way."""
_WRITE_FIELDS = 41
"""fio's terse format, version 3: the fields of writes come so many after those of reads (fio(1), TERSE OUTPUT)."""
_PERCENTILES = slice(17, 37)


@dataclasses.dataclass(frozen=True, slots=True)
class GuestFio:
    """Random reads or writes of 4 KiB in a guest, until `end`."""

    rw: str
    depth: int
    device: str = "/dev/nvme0n1"

    @property
    def command(self) -> str:
        """fio's command line."""
        return (
            f"fio --name=bench --filename={self.device} --rw=rand{self.rw} --bs=4k --ioengine=libaio"
            f" --iodepth={self.depth} --direct=1 --time_based --runtime=1d --norandommap --randrepeat=0"
            " --minimal --terse-version=3"
        )

    def start(self, console: Console) -> None:
        """Start it in the guest's background."""
        console.check(f"(({self.command} >/tmp/bench 2>&1; echo >/tmp/bench.ended) &)")

    def end(self, console: Console) -> dict[str, float]:
        """End it; return p50_us and p99_us, in the guest's own time. Raises GuestError."""
        console.check("killall -INT fio; until [ -e /tmp/bench.ended ]; do sleep 0.1; done; rm /tmp/bench.ended", 120)
        return parse_terse(console.check("cat /tmp/bench"), self.rw)


def parse_terse(said: str, rw: str) -> dict[str, float]:
    """Read fio's terse line; raises GuestError when there is none, or it tells of an error."""
    line = next((line for line in said.splitlines() if line.startswith("3;")), "")
    fields = line.split(";")
    shift = _WRITE_FIELDS if rw == "write" else 0
    if len(fields) < _PERCENTILES.stop + shift or fields[4] != "0":
        raise GuestError(f"fio said: {said[-500:]}")
    percentiles = dict(field.split("%=") for field in fields[_PERCENTILES.start + shift : _PERCENTILES.stop + shift])
    return {
        "p50_us": float(percentiles.get("50.000000", 0)),
        "p99_us": float(percentiles.get("99.000000", 0)),
    }


def disk_arguments(image: Path, image_format: str = "raw") -> list[str]:
    """Return QEMU's arguments for an image on an NVMe disk."""
    drive = f"if=none,id=d0,file={image},format={image_format}"
    return ["-M", "q35", "-drive", drive, "-device", "nvme,serial=bench,drive=d0"]


def _image(settings: Settings, name: str) -> Path:
    """Make an image in the wanted format, all of it allocated."""
    raw = make_image(settings.memory / f"{name}.img", settings.image)
    if settings.format == "raw":
        return raw
    image = raw.with_suffix(f".{settings.format}")
    program = str(settings.sysroot.program("qemu-img"))
    convert = [program, "convert", "-f", "raw", "-O", settings.format, str(raw), str(image)]
    try:
        subprocess.run(convert, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise GuestError(error.stderr) from None
    raw.unlink()
    return image


@contextlib.contextmanager
def machines(settings: Settings) -> Iterator[dict[str, Machine]]:
    """Two guests that are booted and stopped, on images of their own in memory."""
    with contextlib.ExitStack() as cleanup:
        found = {}
        for name, front in FRONTS.items():
            settings.tell(f"boot on {name}")
            machine = Machine(settings.directory / name[0], settings.sysroot, front, "384M", LINUX)
            cleanup.callback(machine.kill)
            machine.boot(disk_arguments(_image(settings, name), settings.format))
            machine.qmp.execute("stop")
            found[name] = machine
        yield found


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """What a guest did in a short time."""

    commands: int
    seconds: float
    cpu_s: float
    """Processor time of QEMU and nvmove."""


def rates(slices: Sequence[Slice]) -> dict[str, float]:
    """Return iops, and cpu_us: the processor time of a command."""
    commands = sum(one.commands for one in slices)
    return {
        "iops": commands / sum(one.seconds for one in slices),
        "cpu_us": sum(one.cpu_s for one in slices) / max(commands, 1) * 1e6,
    }


def measure(settings: Settings) -> Section:
    """Measure; raises GuestError."""
    section = Section(
        "guest",
        f"In a guest (TCG): 4 KiB at random, {settings.format} image in memory",
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
    with machines(settings) as guests:
        for rw in ("read", "write"):
            for depth in GOALS[settings.format]:
                _add(section, guests, GuestFio(rw, depth), settings)
    return section


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """One start of fio in one guest."""

    slices: list[Slice]
    percentiles: dict[str, float]
    """Of the whole time."""


def _add(section: Section, guests: dict[str, Machine], fio: GuestFio, settings: Settings) -> None:
    """Measure one kind of commands."""
    starts: dict[str, list[Start]] = {name: [] for name in guests}
    what = f"{fio.rw}, depth {fio.depth}"
    for number in range(settings.rounds):
        settings.tell(f"{what}: start {number + 1} of {settings.rounds}")
        for name, start in _start(guests, fio, settings.seconds).items():
            starts[name].append(start)
    found = {}
    for name, some in starts.items():
        found[name] = rates([one for start in some for one in start.slices])
        percentiles = {key: median([start.percentiles[key] for start in some]) for key in some[0].percentiles}
        row = {"what": name, "rw": fio.rw, "depth": fio.depth} | found[name] | percentiles
        section.rows.append(row | {"starts": [[dataclasses.asdict(one) for one in start.slices] for start in some]})
    ours, theirs = (found[name] for name in FRONTS)
    iops, cpu = GOALS[settings.format][fio.depth]
    section.ratio(f"{what}: IOPS / QEMU's nvme", ours["iops"], theirs["iops"], iops)
    section.ratio(f"{what}: host CPU per I/O / QEMU's nvme", ours["cpu_us"], theirs["cpu_us"], cpu, at_most=True)
    if settings.rounds > 1:
        error = uncertainty(*([start.slices for start in starts[name]] for name in FRONTS))
        section.notes.append(
            f"{what}: a standard error of {error:.1%} in the ratio of IOPS, over {settings.rounds} starts of fio"
        )


def _start(guests: dict[str, Machine], fio: GuestFio, seconds: float) -> dict[str, Start]:
    """Start fio in all guests, and measure each for so long, in slices."""
    for guest in guests.values():
        guest.qmp.execute("cont")
        fio.start(guest.console)
        _wait_warm(guest)
        guest.qmp.execute("stop")
    length = min(_SLICE, seconds)
    slices: dict[str, list[Slice]] = {name: [] for name in guests}
    for turn in range(max(1, round(seconds / length))):
        for name in list(guests) if turn % 2 == 0 else reversed(guests):
            slices[name].append(_slice(guests[name], length))
    found = {}
    for name, guest in guests.items():
        guest.qmp.execute("cont")
        found[name] = Start(slices[name], fio.end(guest.console))
        guest.qmp.execute("stop")
    return found


def uncertainty(ours: Sequence[Sequence[Slice]], theirs: Sequence[Sequence[Slice]]) -> float:
    """Return the standard error of the ratio of IOPS, from how much the ratios of single starts of fio differ."""
    ratios = [rates(one)["iops"] / max(rates(other)["iops"], 1) for one, other in zip(ours, theirs, strict=True)]
    return statistics.stdev(ratios) / math.sqrt(len(ratios))


def _commands(machine: Machine) -> int:
    """Return how many commands the disk has done."""
    return sum(
        one["stats"]["rd_operations"] + one["stats"]["wr_operations"] for one in machine.qmp.execute("query-blockstats")
    )


def _wait_warm(machine: Machine) -> None:
    """Wait until fio is under way."""
    start, deadline = _commands(machine), time.monotonic() + 120
    while _commands(machine) < start + _WARM:
        if time.monotonic() > deadline:
            raise GuestError(f"fio does nothing: {machine.console.check('cat /tmp/bench')[-500:]}")
        time.sleep(0.1)


def _slice(machine: Machine, length: float) -> Slice:
    """Let a guest run for a while, and measure that."""
    pids = [process.pid for process in marked(machine.mark)]
    machine.qmp.execute("cont")
    time.sleep(_SETTLE)
    commands, since, cpu = _commands(machine), time.monotonic(), cpu_seconds(pids)
    time.sleep(length)
    found = Slice(_commands(machine) - commands, time.monotonic() - since, cpu_seconds(pids) - cpu)
    machine.qmp.execute("stop")
    return found
