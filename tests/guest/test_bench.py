"""Each kind of `nvmove bench` with tiny numbers: it runs, and its JSON has the right shape. Speed is never asserted."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nvmove.lab.processes import Marked, marked
from tests.guest.command_lines import command_lines_with
from tests.guest.conftest import Nvmove


def left_in_memory(run: Marked) -> list[Path]:
    return list(Path("/dev/shm").glob(f"nvmove-bench-{run.process.pid}-*"))


def bench(nvmove: Nvmove, work: Path, kind: str, *options: str, rounds: int = 1) -> dict[str, Any]:
    """Run one; return its section of the JSON. Nothing else is left of it."""
    measured = ("--seconds", "0.05", "--rounds", str(rounds), "--json", str(work / "json"))
    run = nvmove("bench", kind, *measured, *options)
    assert run.wait(400) == 0, run.output
    assert marked(run.mark) == []
    assert sorted(path.name for path in work.iterdir()) == ["json", "said"]
    assert left_in_memory(run) == []
    found = json.loads((work / "json").read_text())
    assert found["format"] == 1
    assert found["conditions"].keys() >= {"nvmove", "processor", "processors", "kernel", "qemu", "load"}
    (section,) = found["sections"].values()
    for ratio in section["ratios"]:
        assert ratio["value"] >= 0  # processor time so short that it rounds to none
        assert ratio["held"] in {None, True, False}
    assert isinstance(section, dict)
    return section


def test_host(nvmove: Nvmove, work: Path) -> None:
    section = bench(nvmove, work, "host")
    rows = section["rows"]
    assert all(row["iops"] > 0 for row in rows)
    assert {row["image"] for row in rows} >= {"tmpfs", "nbd", "null"}
    ahead = [row for row in rows if row["what"] == "nvmove, ahead"]
    assert {(row["image"], row["queues"]) for row in ahead} == {(name, n) for name in ("tmpfs", "null") for n in (1, 2)}
    ours = [row for row in rows if row["what"] == "nvmove"]
    assert {row["depth"] for row in ours} == {1, 32, 128}
    assert all(0 < row["p50_us"] <= row["p99_us"] and row["cpu_us"] >= 0 for row in ours)
    assert any(row["what"] == "fio psync" for row in rows)
    assert {
        "read, tmpfs, depth 32 / fio psync",
        "write, null / tmpfs, depth 32",
        "read, tmpfs, two queues / one, initiator asleep",
        "read, nbd, depth 32 / fio nbd",
    } <= {r["name"] for r in section["ratios"]}


def test_curves(nvmove: Nvmove, work: Path) -> None:
    section = bench(nvmove, work, "curves")
    rows = section["rows"]
    assert {row["x"] for row in rows if row["curve"] == "reads by queues"} == {1, 2, 4, 8, 16, 32, 64}
    sizes = [row["bytes"] for row in rows if row["curve"] == "save by held requests"]
    assert sizes == sorted(sizes) and sizes[0] > 0
    assert all(0 < row["ms"] <= row["worst_ms"] for row in rows if "worst_ms" in row)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_guest(nvmove: Nvmove, work: Path, image_format: str) -> None:
    section = bench(nvmove, work, "guest", "--format", image_format, rounds=2)
    rows = {(row["what"], row["rw"], row["depth"]): row for row in section["rows"]}
    assert rows.keys() == {(what, rw, n) for what in ("nvmove", "qemu") for rw in ("read", "write") for n in (1, 32)}
    assert all(row["iops"] > 0 and row["cpu_us"] >= 0 for row in rows.values())
    assert all(len(row["starts"]) == 2 for row in rows.values())
    assert sum("IOPS" in ratio["name"] for ratio in section["ratios"]) == 4
    assert sum("standard error" in note for note in section["notes"]) == 4


def test_downtime(nvmove: Nvmove, work: Path) -> None:
    section = bench(nvmove, work, "downtime")
    assert [row["what"] for row in section["rows"]] == ["nvmove", "qemu"]
    assert all(0 < row["downtime_ms"] <= row["total_ms"] and row["outage_ms"] > 0 for row in section["rows"])
    assert [ratio["goal"] for ratio in section["ratios"]] == [1.2, 1.2]


def test_ctrl_c_leaves_nothing(nvmove: Nvmove, work: Path) -> None:
    run = nvmove("bench", "host", "--seconds", "60", "--json", str(work / "json"))
    deadline = time.monotonic() + 300
    while not list(work.glob("*/s-null*")):  # before anything is measured
        assert time.monotonic() < deadline, run.output
        time.sleep(0.05)
    assert command_lines_with(f"{work}/nvmove-bench")
    run.process.send_signal(signal.SIGINT)
    assert run.wait(180) == 130, run.output  # a measurement that has begun ends first
    assert marked(run.mark) == []
    assert [path.name for path in work.iterdir()] == ["said"]
    assert left_in_memory(run) == []
    assert command_lines_with(f"{work}/nvmove-bench") == []
