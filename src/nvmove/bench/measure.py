"""What every benchmark shares: its settings, the conditions that it ran in, processor time, medians."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvmove.engine.choice import chosen
from nvmove.lab.processes import marked
from nvmove.lab.sysroot import Sysroot

_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured, and where."""

    sysroot: Sysroot
    directory: Path
    """For sockets, hence with a short name."""
    disk: Path
    """For images on a disk."""
    memory: Path
    """For images in memory (tmpfs)."""
    seconds: float = 2.0
    """Of one measurement."""
    rounds: int = 3
    """Everything is measured so often, turn and turn about; the medians count."""
    image: int = 256 << 20
    """Bytes of a disk image."""
    format: str = "raw"
    """Of the guests' images, where QEMU's nvme has the same."""
    tell: Callable[[str], None] = field(default=lambda _text: None)
    """Hears what is measured now."""


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time (user and system) that living processes have had, in seconds; raises OSError."""
    total = 0.0
    for pid in pids:
        clock = ctypes.c_int()
        if error := _libc.clock_getcpuclockid(pid, ctypes.byref(clock)):  # clock_getcpuclockid(3): to the nanosecond
            raise OSError(error, os.strerror(error), f"process {pid}")
        total += time.clock_gettime(clock.value)
    return total


def marked_cpu_seconds(mark: str) -> float:
    """Return the processor time of the processes that carry a mark (`lab.processes`), in seconds."""
    return cpu_seconds(process.pid for process in marked(mark))


def conditions(sysroot: Sysroot) -> dict[str, Any]:
    """Return what a number is worth nothing without."""
    return {
        "nvmove": importlib.metadata.version("nvmove"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": sysroot.qemu_version.split("(")[0].strip(),
        "accelerator": "TCG",
        "engine": chosen(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def median(values: Sequence[float]) -> float:
    """Return the median; 0 of nothing."""
    return float(statistics.median(values)) if values else 0.0


def make_image(path: Path, size: int) -> Path:
    """Write an image without holes, whose pages all differ."""
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            piece = os.urandom(4096) * (min(1 << 20, size - start) // 4096)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return path


def has_direct(path: Path) -> bool:
    """Return whether an image can be opened past the page cache (O_DIRECT)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
