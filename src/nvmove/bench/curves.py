"""How costs grow: with depth, command size and number of queues; and what pausing and saving cost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from nvmove.bench.driver import DoorbellKind, HostDriver, Job, initiator_class
from nvmove.bench.inside import inside
from nvmove.bench.measure import Settings, make_image, median
from nvmove.bench.report import Plot, Section
from nvmove.bench.served import Served, doorbells_by_speed
from nvmove.block.config import NullConfig, OpenOptions
from nvmove.block.null import NullBackend
from nvmove.block.raw.backend import open_raw

DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1023)
SIZES = tuple(4096 << shift for shift in range(9))
QUEUES = (1, 2, 4, 8, 16, 32, 64)
HELD = (1, 4, 16, 64, 256, 1000)
_ENTRIES = 1024
"""Of each queue: so many commands write every page of a completion queue."""
_SAVES = 9
"""Repetitions of what takes well below a millisecond."""
_PAUSE_DEPTHS = (1, 32, 128, 1023)
_PAUSES = 40
_SAVE_GOAL = 2.0
_PAUSE_GOAL = 1.0
"""Milliseconds (issue 5)."""
_MEMORY = 512 << 20
_COLUMNS = {
    "curve": "what",
    "image": "image",
    "x": "at",
    "iops": "IOPS",
    "mib_s": "MiB/s",
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "ms": "ms",
    "best_ms": "best ms",
    "worst_ms": "worst ms",
    "bytes": "bytes",
}


def measure(settings: Settings) -> Section:
    """Measure; raises InitiatorError."""
    initiator_class()
    section = Section("curves", "How costs grow (host side)", _COLUMNS)
    with _devices(settings) as (drivers, kind):
        section.title += f", doorbells: {kind.value}"
        _by_depth(settings, section, drivers)
        _by_size(settings, section, drivers["tmpfs"])
        _by_queues(settings, section, drivers)
    _save_by_queues(settings, section)
    _save_by_held(settings, section)
    _mark_by_queues(settings, section)
    _pause_by_depth(settings, section)
    return section


@contextlib.contextmanager
def _devices(settings: Settings) -> Iterator[tuple[dict[str, HostDriver], DoorbellKind]]:
    """Devices by the names of their images, with the doorbells that are quickest here."""
    image = make_image(settings.memory / "curves.img", settings.image)
    drives = {"tmpfs": f"file={image},format=raw", "null": f"driver=null-co,size={settings.image}"}
    best = doorbells_by_speed(settings, drives["tmpfs"])[-1]
    with contextlib.ExitStack() as cleanup:
        drivers = {}
        for name, drive in drives.items():
            served = cleanup.enter_context(Served(settings.directory, f"c-{name}", drive, best.device, _MEMORY))
            served.driver.make_queues(max(QUEUES), doorbells=best)
            drivers[name] = served.driver
        yield drivers, best


def _rates(settings: Settings, act: Callable[[], tuple[float, float, float]]) -> dict[str, float]:
    """Return the medians of IOPS, p50 and p99."""
    rounds = [act() for _ in range(settings.rounds)]
    return dict(
        zip(("iops", "p50_us", "p99_us"), (median(values) for values in zip(*rounds, strict=True)), strict=True)
    )


def _run(driver: HostDriver, job: Job, queues: Sequence[int] = (1,)) -> Callable[[], tuple[float, float, float]]:
    def act() -> tuple[float, float, float]:
        run = driver.run(job, queues)
        return run.iops, run.p50, run.p99

    return act


def _by_depth(settings: Settings, section: Section, drivers: dict[str, HostDriver]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, driver in drivers.items():
        for depth in DEPTHS:
            settings.tell(f"depth {depth}, {name}")
            found = _rates(settings, _run(driver, Job(depth=depth, seconds=settings.seconds)))
            section.rows.append({"curve": "reads by depth", "image": name, "x": depth, **found})
            curves.setdefault(name, []).append((depth, found["iops"]))
    title = "Reads of 4 KiB, one queue"
    section.plots.append(Plot("depth", title, "queue depth", "IOPS", curves, log_y=True))


def _by_size(settings: Settings, section: Section, driver: HostDriver) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for rw, percent in (("read", 100), ("write", 0)):
        for size in SIZES:
            settings.tell(f"{size >> 10} KiB, {rw}")
            job = Job(depth=16, size=size, read_percent=percent, seconds=settings.seconds)
            found = _rates(settings, _run(driver, job))
            rate = found["iops"] * size / (1 << 20)
            row = {"curve": f"{rw}s by KiB", "image": "tmpfs", "x": size >> 10, "mib_s": rate}
            section.rows.append(row | found)
            curves.setdefault(rw, []).append((size >> 10, rate))
    section.plots.append(Plot("size", "Depth 16, one queue, file in memory", "KiB a command", "MiB/s", curves))


def _by_queues(settings: Settings, section: Section, drivers: dict[str, HostDriver]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, driver in drivers.items():
        for queues in QUEUES:
            settings.tell(f"{queues} queues, {name}")
            job = Job(depth=32, seconds=settings.seconds)
            found = _rates(settings, _run(driver, job, range(1, queues + 1)))
            section.rows.append({"curve": "reads by queues", "image": name, "x": queues, **found})
            curves.setdefault(name, []).append((queues, found["iops"]))
    title = "Reads of 4 KiB, depth 32 on each queue"
    section.plots.append(Plot("queues", title, "queues (a thread each, on either side)", "IOPS", curves))


def _null(settings: Settings) -> NullBackend:
    return NullBackend(NullConfig(size=settings.image), OpenOptions())


def _save_by_queues(settings: Settings, section: Section) -> None:
    curve, sizes = [], []
    for queues in QUEUES:
        settings.tell(f"save with {queues} queues")
        with inside(settings.directory / "c-save", _null(settings), queues) as here:
            here.driver.run(Job(depth=8, count=64), range(1, queues + 1))
            here.device.pause()
            times, size = _save(here.device.save)
        section.rows.append({"curve": "save by queues", "x": queues, **_times(times), "bytes": size})
        curve.append((float(queues), median(times)))
        sizes.append((float(queues), float(size)))
    name = f"save with {QUEUES[-1]} queues / {_SAVE_GOAL:g} ms"
    section.ratio_of_rounds(name, times, [_SAVE_GOAL], 1.0, at_most=True)
    section.plots.append(Plot("save-queues", "The whole Save", "I/O queues", "ms", {"save": curve}, log_x=False))
    section.plots.append(
        Plot("state-queues", "Size of the device's state", "I/O queues", "bytes", {"state": sizes}, log_x=False)
    )


def _save_by_held(settings: Settings, section: Section) -> None:
    curve, sizes = [], []
    for held in HELD:
        settings.tell(f"save with {held} held requests")
        with inside(settings.directory / "c-held", _null(settings), 1) as here:
            here.hold(held)
            here.device.pause()
            times, size = _save(here.device.save)
        section.rows.append({"curve": "save by held requests", "x": held, **_times(times), "bytes": size})
        curve.append((float(held), median(times)))
        sizes.append((float(held), float(size)))
    section.plots.append(Plot("save-held", "The whole Save", "held requests", "ms", {"save": curve}, log_x=False))
    section.plots.append(
        Plot("state-held", "Size of the device's state", "held requests", "bytes", {"state": sizes}, log_x=False)
    )


def _mark_by_queues(settings: Settings, section: Section) -> None:
    """What is left to mark dirty at the switch-over of a migration: mostly the pages of completion queues."""
    curve = []
    for queues in QUEUES:
        settings.tell(f"dirty marking with {queues} queues")
        with inside(settings.directory / "c-mark", _null(settings), queues) as here:
            times = []
            for _ in range(settings.rounds):
                here.device.track_dirty(True)
                here.driver.run(Job(depth=32, count=_ENTRIES, read_percent=0, seconds=600), range(1, queues + 1))
                here.device.pause()
                report = here.device.mark_dirty()
                here.device.track_dirty(False)
                here.device.resume()
                times.append(report.seconds * 1000)
        row = {"curve": "dirty marking by pages", "x": report.pages, "bytes": report.bytes}
        section.rows.append(row | _times(times))
        curve.append((float(report.pages), median(times)))
    title = "Dirty marking at the switch-over (our own client answers)"
    section.plots.append(Plot("marking", title, "pages", "ms", {"mark_dirty": curve}, log_x=False))


def _times(times: Sequence[float]) -> dict[str, float]:
    """Return the columns of times in milliseconds."""
    return {"ms": median(times), "best_ms": min(times), "worst_ms": max(times)}


def _save(save: Callable[[], bytes]) -> tuple[list[float], int]:
    """Return how many milliseconds it takes each time, and how many bytes it gives."""
    times = []
    for _ in range(_SAVES):
        start = time.perf_counter()
        state = save()
        times.append((time.perf_counter() - start) * 1000)
    return times, len(state)


def _pause_by_depth(settings: Settings, section: Section) -> None:
    curves: dict[str, list[tuple[float, float]]] = {"median": [], "worst": []}
    image = make_image(settings.memory / "pause.img", settings.image)
    for depth in _PAUSE_DEPTHS:
        settings.tell(f"pause at depth {depth}")
        with inside(settings.directory / "c-pause", open_raw(str(image)), 4) as here:
            load = threading.Thread(target=here.driver.run, args=(Job(depth=depth, seconds=3600), (1, 2, 3, 4)))
            load.start()
            try:
                times = [_pause(here.device.pause, here.device.resume) for _ in range(_PAUSES)]
            finally:
                here.driver.stop()
                load.join()
        row = {"curve": "pause at depth, 4 queues", "image": "tmpfs", "x": depth}
        section.rows.append(row | _times(times))
        curves["median"].append((depth, median(times)))
        curves["worst"].append((depth, max(times)))
        name = f"pause at depth {depth} / {_PAUSE_GOAL:g} ms"
        section.ratio_of_rounds(name, times, [_PAUSE_GOAL], 1.0, at_most=True)
    section.plots.append(Plot("pause", "Pausing under full load, 4 queues", "depth of each queue", "ms", curves))


def _pause(pause: Callable[[], None], resume: Callable[[], None]) -> float:
    time.sleep(0.01)
    start = time.perf_counter()
    pause()
    taken = (time.perf_counter() - start) * 1000
    resume()
    return taken
