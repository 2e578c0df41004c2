"""fio on the host, on the same image: what the host-side figures are compared with."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nvmove.errors import UserError
from nvmove.lab.sysroot import Sysroot


class FioError(UserError):
    """fio did not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class FioRun:
    """What fio found."""

    iops: float
    p50: float
    """Microseconds, as `p99`; of the completion."""
    p99: float


def run(
    sysroot: Sysroot,
    image: Path,
    *,
    rw: str,
    seconds: float,
    engine: str = "psync",
    depth: int = 1,
    direct: bool = False,
    jobs: int = 1,
    uri: str = "",
) -> FioRun:
    """Read or write (`rw`: read, write) blocks of 4 KiB of `image` at random places, `jobs` threads at once.

    `uri`: what the engine nbd is to read in its place; the image tells the size. Raises FioError.
    """
    command = [
        sysroot.program("fio"),
        *("--name=bench", f"--size={image.stat().st_size}", f"--ioengine={engine}"),  # before the engine's own options
        *(f"--uri={uri}" if uri else f"--filename={image}", f"--rw=rand{rw}", "--bs=4k"),
        *(f"--numjobs={jobs}", "--group_reporting"),
        *(f"--iodepth={depth}", f"--direct={int(direct)}", "--thread", "--time_based"),
        *(f"--runtime={max(1, round(seconds))}", "--randrepeat=0", "--norandommap", "--output-format=json"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=image.parent)
    start = ended.stdout.find("{")
    if ended.returncode or start < 0:
        raise FioError(f"fio: {(ended.stderr or ended.stdout).strip().splitlines()[-1:]}")
    job = json.loads(ended.stdout[start:])["jobs"][0][rw]
    percentiles = job["clat_ns"].get("percentile", {})
    return FioRun(job["iops"], percentiles.get("50.000000", 0) / 1000, percentiles.get("99.000000", 0) / 1000)
