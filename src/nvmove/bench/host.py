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
_FOR_TWO_QUEUES = 4
_Measurement = Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True)
class _Image:
    name: str
    drive: str
    path: Path | None = None
    direct: bool = False

    @property
    def shared(self) -> str:
        """What lets several devices have it at once."""
        return "" if self.path is None else ",file.locking=off"


def measure(settings: Settings) -> Section:
    """Measure; raises InitiatorError, FioError."""
    initiator_class()
    section = Section("host", "Host side: 4 KiB, one process serves, one drives", _COLUMNS)
    with contextlib.ExitStack() as cleanup:
        plan: dict[tuple[str, ...], _Measurement] = {}
        images = _images(settings, section)
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
                if image.path is not None:
                    _plan_fio(plan, settings, image, rw)
                for depth in DEPTHS:
                    plan["nvmove", image.name, best.value, rw, "1", str(depth)] = _ours(served, settings, rw, depth)
                if image is images[0]:
                    plan["nvmove", image.name, best.value, rw, "2", "32"] = _ours(served, settings, rw, 32, (1, 2))
        found: defaultdict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
        for number in range(settings.rounds):
            for key, act in plan.items():
                settings.tell(f"round {number + 1} of {settings.rounds}: {' '.join(key)}")
                found[key].append(act())
    for key, rounds in found.items():
        section.rows.append(_row(key, rounds))
    _ratios(section)
    return section


def _serve(settings: Settings, image: _Image, kind: DoorbellKind, cleanup: contextlib.ExitStack) -> Served:
    served = Served(settings.directory, f"s-{image.name}-{kind.value}", f"{image.drive}{image.shared}", kind.device)
    cleanup.callback(served.close)
    served.driver.make_queues(2, doorbells=kind)
    return served


def _images(settings: Settings, section: Section) -> list[_Image]:
    in_memory = make_image(settings.memory / "host.img", settings.image)
    images = [_Image("tmpfs", f"file={in_memory},format=raw", in_memory)]
    on_disk = make_image(settings.disk / "host.img", settings.image)
    if has_direct(on_disk):
        images.append(_Image("disk", f"file={on_disk},format=raw,cache=none", on_disk, direct=True))
    else:
        section.notes.append(
            f"No disk was measured: {settings.disk.parent} has no O_DIRECT (--directory names another)."
        )
    return [*images, _Image("null", f"driver=null-co,size={settings.image}")]


def _plan_fio(plan: dict[tuple[str, ...], _Measurement], settings: Settings, image: _Image, rw: str) -> None:
    assert image.path is not None
    path = image.path
    for engine, depth in (("psync", 1), *((("libaio", 32), ("libaio", 128)) if image.direct else ())):

        def act(engine: str = engine, depth: int = depth) -> dict[str, float]:
            run = hostfio.run(
                settings.sysroot, path, rw=rw, seconds=settings.seconds, engine=engine, depth=depth, direct=image.direct
            )
            return {"iops": run.iops, "p50_us": run.p50, "p99_us": run.p99}

        plan[f"fio {engine}", image.name, "", rw, "1", str(depth)] = act


def _ours(served: Served, settings: Settings, rw: str, depth: int, queues: tuple[int, ...] = (1,)) -> _Measurement:
    def act() -> dict[str, float]:
        before = served.cpu_seconds
        run: Run = served.driver.run(Job(depth=depth, read_percent=_RW[rw], seconds=settings.seconds), queues)
        commands = max(run.commands, 1)
        return {
            "iops": run.iops,
            "p50_us": run.p50,
            "p99_us": run.p99,
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

    processors = len(os.sched_getaffinity(0))
    if processors < _FOR_TWO_QUEUES:
        section.notes.append(
            f"Two queues want {_FOR_TWO_QUEUES} processors, two for the initiator; with {processors} they have no goal."
        )
    for rw in _RW:
        fio, one = iops("fio psync", "tmpfs", rw, 1), iops("nvmove", "tmpfs", rw, 32)
        add = section.ratio_of_rounds
        add(f"{rw}, tmpfs, depth 1 / fio psync", iops("nvmove", "tmpfs", rw, 1), fio, 0.55)
        add(f"{rw}, tmpfs, depth 32 / fio psync", one, fio, 0.85)
        add(f"{rw}, null / tmpfs, depth 32", iops("nvmove", "null", rw, 32), one, 2.5)
        two = iops("nvmove", "tmpfs", rw, 32, 2)
        add(f"{rw}, tmpfs, two queues / one, depth 32", two, one, 1.7 if processors >= _FOR_TWO_QUEUES else None)
        for depth, engine in ((1, "psync"), (32, "libaio"), (128, "libaio")):
            ours, theirs = iops("nvmove", "disk", rw, depth), iops(f"fio {engine}", "disk", rw, depth)
            add(f"{rw}, disk, depth {depth} / fio {engine}", ours, theirs)
