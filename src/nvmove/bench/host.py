"""The host-side benchmark: our own initiator against `nvmove serve`, beside fio on the same file in the same run."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmove.bench import hostfio
from nvmove.bench.driver import DoorbellKind, Job, initiator_class
from nvmove.bench.exported import Exported
from nvmove.bench.measure import Settings, has_direct, make_image, median
from nvmove.bench.report import Section
from nvmove.bench.results import Run
from nvmove.bench.served import Served, doorbells_by_speed

DEPTHS = (1, 32, 128)
_RW = {"read": 100, "write": 0}
_COLUMNS = {
    "what": "program",
    "image": "image",
    "doorbells": "doorbells",
    "rw": "random",
    "queues": "queues",
    "depth": "depth",
    "iops": "IOPS",
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "cpu_us": "CPU µs/IO",
    "messages": "messages/IO",
}
"""`cpu_us` is the serving process's; `messages` are those for doorbells."""
_QUEUE_ENTRIES = 65536
"""Of the queues that are filled beforehand: the most that there are, so that the initiator sleeps long."""
_LOOKS = {"tmpfs": 0.005, "null": 0.0005}
"""Seconds between two looks at them, by image: a fraction of what the device needs for so many commands."""
_AHEAD = "nvmove, ahead"
_Measurement = Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True)
class _Image:
    name: str
    drive: str
    path: Path | None = None
    direct: bool = False
    uri: str = ""
    """Where it is exported, when it is read from there."""

    @property
    def shared(self) -> str:
        """What lets several devices have it at once."""
        return "" if self.path is None or self.uri else ",file.locking=off"

    @property
    def peers(self) -> tuple[tuple[str, int], ...]:
        """fio's engines, and their depths, that are measured beside."""
        if self.uri:
            return tuple(("nbd", depth) for depth in DEPTHS)
        if self.path is None:
            return ()
        return ("psync", 1), *((("libaio", 32), ("libaio", 128)) if self.direct else ())


def measure(settings: Settings) -> Section:
    """Measure; raises InitiatorError, FioError, ExportError."""
    initiator_class()
    section = Section("host", "Host side: 4 KiB, one process serves, one drives", _COLUMNS)
    with contextlib.ExitStack() as cleanup:
        plan: dict[tuple[str, ...], _Measurement] = {}
        images = _images(settings, section, cleanup)
        kinds = doorbells_by_speed(settings, images[0].drive)
        best = kinds[-1]
        for kind in kinds[:-1]:
            served = _serve(settings, images[0], kind, cleanup)
            for rw in _RW:
                for depth in DEPTHS:
                    plan["nvmove", "tmpfs", kind.value, rw, "1", f"{depth}"] = _ours(served, settings, rw, depth)
        for image in images:
            served = _serve(settings, image, best, cleanup)
            for rw in _RW:
                for engine, depth in image.peers:
                    plan[f"fio {engine}", image.name, "", rw, "1", str(depth)] = _fio(
                        settings, image, rw, engine, depth
                    )
                for depth in DEPTHS:
                    plan["nvmove", image.name, best.value, rw, "1", str(depth)] = _ours(served, settings, rw, depth)
        _plan_two_queues(plan, settings, images, cleanup)
        found: defaultdict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
        for number in range(settings.rounds):
            for key, act in plan.items():
                settings.tell(f"round {number + 1} of {settings.rounds}: {' '.join(key)}")
                found[key].append(act())
    for key, rounds in found.items():
        section.rows.append(_row(key, rounds))
    _ratios(section)
    return section


def _serve(
    settings: Settings, image: _Image, kind: DoorbellKind, cleanup: contextlib.ExitStack, entries: int = 1024
) -> Served:
    device = f"{kind.device},mqes={entries - 1}"
    name = f"s-{image.name}-{kind.value}-{entries}"
    served = Served(settings.directory, name, f"{image.drive}{image.shared}", device)
    cleanup.callback(served.close)
    served.driver.make_queues(2, entries, kind)
    return served


def _images(settings: Settings, section: Section, cleanup: contextlib.ExitStack) -> list[_Image]:
    in_memory = make_image(settings.memory / "host.img", settings.image)
    images = [_Image("tmpfs", f"file={in_memory},format=raw", in_memory)]
    on_disk = make_image(settings.disk / "host.img", settings.image)
    if has_direct(on_disk):
        images.append(_Image("disk", f"file={on_disk},format=raw,cache=none", on_disk, direct=True))
    else:
        section.notes.append(
            f"No disk was measured: {settings.disk.parent} has no O_DIRECT (--directory names another)."
        )
    exported = make_image(settings.memory / "nbd.img", settings.image)
    uri = cleanup.enter_context(Exported(settings.sysroot, settings.directory, exported)).uri
    images.append(_Image("nbd", f"file={uri},format=raw", exported, uri=uri))
    return [*images, _Image("null", f"driver=null-co,size={settings.image}")]


def _plan_two_queues(
    plan: dict[tuple[str, ...], _Measurement],
    settings: Settings,
    images: list[_Image],
    cleanup: contextlib.ExitStack,
) -> None:
    """One queue and two, with an initiator that leaves the processors to them; and what the machine gives fio so."""
    kind = DoorbellKind.SHADOW  # no message while the device is awake, and no poller as mapped ones have
    for image in (image for image in images if image.name in _LOOKS):
        served = _serve(settings, image, kind, cleanup, _QUEUE_ENTRIES)
        for rw in _RW:
            if image.path is not None:
                plan["fio psync", image.name, "", rw, "2", "1"] = _fio(settings, image, rw, "psync", 1, jobs=2)
            for queues in ((1,), (1, 2)):
                key = _AHEAD, image.name, kind.value, rw, str(len(queues)), str(_QUEUE_ENTRIES - 1)
                plan[key] = _ours(served, settings, rw, 32, queues, _LOOKS[image.name])


def _fio(settings: Settings, image: _Image, rw: str, engine: str, depth: int, jobs: int = 1) -> _Measurement:
    path = image.path
    assert path is not None

    def act() -> dict[str, float]:
        run = hostfio.run(
            settings.sysroot,
            path,
            rw=rw,
            seconds=settings.seconds,
            engine=engine,
            depth=depth,
            direct=image.direct,
            jobs=jobs,
            uri=image.uri,
        )
        return {"iops": run.iops, "p50_us": run.p50, "p99_us": run.p99}

    return act


def _ours(
    served: Served, settings: Settings, rw: str, depth: int, queues: tuple[int, ...] = (1,), ahead: float = 0.0
) -> _Measurement:
    job = Job(depth=depth, read_percent=_RW[rw], seconds=settings.seconds, ahead=ahead)

    def act() -> dict[str, float]:
        before = served.cpu_seconds
        run: Run = served.driver.run(job, queues)
        commands = max(run.commands, 1)
        latencies = {} if ahead else {"p50_us": run.p50, "p99_us": run.p99}
        return {
            "iops": run.iops,
            **latencies,
            "cpu_us": (served.cpu_seconds - before) / commands * 1e6,
            "messages": run.messages / commands,
        }

    return act


def _row(key: tuple[str, ...], rounds: list[dict[str, float]]) -> dict[str, Any]:
    what, image, doorbells, rw, queues, depth = key
    row: dict[str, Any] = {
        "what": what,
        "image": image,
        "doorbells": doorbells,
        "rw": rw,
        "queues": int(queues),
        "depth": int(depth),
    }
    row |= {name: median([one[name] for one in rounds]) for name in rounds[0]}
    return row | {"iops_of_rounds": [one["iops"] for one in rounds]}


def _ratios(section: Section) -> None:
    def iops(what: str, image: str, rw: str, depth: int, queues: int = 1) -> list[float]:
        """Of each round, with the doorbells that are quickest there."""
        wanted = {"what": what, "image": image, "rw": rw, "depth": depth, "queues": queues}
        rounds = [row["iops_of_rounds"] for row in section.rows if wanted.items() <= row.items()]
        return max(rounds, key=median, default=[])

    section.notes.append("Two queues on one file in memory: Linux lets one write to a file at a time, as fio shows.")
    goal = 1.7 if len(os.sched_getaffinity(0)) > 1 else None
    for rw in _RW:
        fio, one = iops("fio psync", "tmpfs", rw, 1), iops("nvmove", "tmpfs", rw, 32)
        add = section.ratio_of_rounds
        add(f"{rw}, tmpfs, depth 1 / fio psync", iops("nvmove", "tmpfs", rw, 1), fio, 0.55)
        add(f"{rw}, tmpfs, depth 32 / fio psync", one, fio, 0.85)
        add(f"{rw}, null / tmpfs, depth 32", iops("nvmove", "null", rw, 32), one, 2.5)
        for image in _LOOKS:
            two, alone = (iops(_AHEAD, image, rw, _QUEUE_ENTRIES - 1, queues) for queues in (2, 1))
            serial = (rw, image) == ("write", "tmpfs")
            add(f"{rw}, {image}, two queues / one, initiator asleep", two, alone, None if serial else goal)
        add(f"{rw}, tmpfs, fio psync: two jobs / one", iops("fio psync", "tmpfs", rw, 1, 2), fio)
        for image, depth, engine in (
            *(("disk", depth, "psync" if depth == 1 else "libaio") for depth in DEPTHS),
            *(("nbd", depth, "nbd") for depth in DEPTHS),
        ):
            ours, theirs = iops("nvmove", image, rw, depth), iops(f"fio {engine}", image, rw, depth)
            add(f"{rw}, {image}, depth {depth} / fio {engine}", ours, theirs)
