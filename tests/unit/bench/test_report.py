"""What a benchmark tells: latencies from buckets, ratios and their goals, tables, JSON, and its command line."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nvmove.bench import command, guest, host, hostfio, measure, report, svg
from nvmove.bench.report import Section
from nvmove.bench.results import Run, bucket_ns, merge, percentile_us
from nvmove.errors import UserError
from nvmove.lab.console import GuestError
from nvmove.lab.sysroot import Sysroot


def bucket(ns: int) -> int:
    """The bucket that the initiator counts a latency in, said anew."""
    top = max(ns, 1).bit_length() - 1
    return ns if top < 6 else (top - 5) * 64 + (ns >> (top - 6) & 63)


@given(st.integers(1, 1 << 40))
def test_a_bucket_stands_for_its_latencies(ns: int) -> None:
    assert abs(bucket_ns(bucket(ns)) - ns) <= ns / 64


def test_percentiles_are_those_of_the_commands() -> None:
    histogram = {bucket(1000): 98, bucket(50_000): 1, bucket(9_000_000): 1}
    assert percentile_us(histogram, 50) == pytest.approx(1, rel=0.02)
    assert percentile_us(histogram, 99) == pytest.approx(50, rel=0.02)
    assert percentile_us(histogram, 100) == pytest.approx(9000, rel=0.02)
    assert percentile_us({}, 50) == 0


def test_runs_side_by_side_add_up() -> None:
    run = merge([Run(10, 1.0, 3, {5: 10}), Run(30, 2.0, 4, {5: 10, 6: 20})])
    assert (run.commands, run.seconds, run.messages, run.iops) == (40, 2.0, 7, 20.0)
    assert run.histogram == {5: 20, 6: 20}
    assert (run.p50, run.p99) == (0.005, 0.006)
    assert Run(0, 0.0, 0, {}).iops == 0


def section() -> Section:
    made = Section("x", "A title", {"a": "first", "b": "second", "c": "third"})
    made.rows += [{"a": "words [b]", "b": 12345, "c": 1.23456, "d": [1, 2]}, {"a": "more", "b": 1, "c": 12345.6}]
    made.ratio("more is better", 3, 2, 1.5)
    made.ratio("less is better", 3, 2, 1.2, at_most=True)
    made.ratio("no goal", 1, 2)
    made.ratio("nothing to compare with", 1, 0, 5)
    made.ratio_of_rounds("of rounds", [1, 2, 9], [2, 4, 3], 0.5)
    made.ratio_of_rounds("of rounds, the least", [1, 2, 9], [2, 4, 3], 0.5, at_most=True)
    made.ratio_of_rounds("not measured", [], [1])
    made.ratio_of_rounds("nothing to compare with", [1], [0])
    made.notes.append("a note")
    return made


def test_a_ratio_knows_its_goal() -> None:
    assert [(one.name, one.value, one.held) for one in section().ratios] == [
        ("more is better", 1.5, True),
        ("less is better", 1.5, False),
        ("no goal", 0.5, None),
        ("of rounds", 2 / 3, True),
        ("of rounds, the least", 2 / 3, False),
    ]
    assert [one.best for one in section().ratios] == [None, None, None, 2.25, 0.5]


def test_tables_show_what_was_found() -> None:
    screen = Console(file=io.StringIO(), width=120)
    report.show(screen, section())
    report.show_conditions(screen, {"load": 1.5, "kvm": False})
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    for words in ("A title", "words [b]", "12,345", "1.23", "12,346", "≤ 1.2", "missed", "held", "a note", "kvm no"):
        assert words in said


def test_json_has_all_of_it() -> None:
    found = json.loads(json.dumps(report.to_json({"load": 1.5}, [section()])))
    assert found["format"] == report.FORMAT
    assert found["conditions"] == {"load": 1.5}
    assert found["sections"]["x"]["rows"] == section().rows
    assert found["sections"]["x"]["ratios"][1] == {
        "name": "less is better",
        "value": 1.5,
        "best": None,
        "goal": 1.2,
        "at_most": True,
        "held": False,
    }


def test_conditions_are_what_they_are(tmp_path: Path) -> None:
    (tmp_path / ".qemu-version").write_text("QEMU emulator version 11.1.3 (x)\n")
    found = measure.conditions(Sysroot(tmp_path))
    assert found["qemu"] == "QEMU emulator version 11.1.3"
    assert found["processors"] >= 1 and found["processor"]


def test_processor_time_is_counted() -> None:
    before, end = measure.cpu_seconds([os.getpid()]), time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert measure.cpu_seconds([os.getpid()]) - before >= 0.03


def test_an_image_has_no_holes(tmp_path: Path) -> None:
    image = measure.make_image(tmp_path / "i", (1 << 20) + 8192)
    assert image.stat().st_size == (1 << 20) + 8192
    assert image.stat().st_blocks * 512 >= image.stat().st_size
    assert not measure.has_direct(tmp_path / "none")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fast"],
        ["host", "--seconds", "0"],
        ["host", "--seconds", "nan"],
        ["host", "--rounds", "0"],
        ["guest", "--format", "qcow"],
        ["--json", "x"],
    ],
)
def test_wrong_usage_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*words)


def test_outputs_that_cannot_be_written_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_sysroot", lambda: Sysroot(tmp_path))
    for words in (["--json", "/nowhere/x"], ["--directory", "/nowhere"]):
        with pytest.raises(UserError, match="/nowhere"):
            command.run(arguments("host", *words))
    with pytest.raises(UserError, match="--format is for `guest`, not for `host`"):
        command.run(arguments("host", "--format", "raw"))
    monkeypatch.setattr(command, "_MEMORY", Path("/nowhere"))
    with pytest.raises(UserError, match="a tmpfs"):
        command.run(arguments("host"))


def test_the_command_measures_tells_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".qemu-version").write_text("QEMU 11\n")
    monkeypatch.setattr(command, "find_sysroot", lambda: Sysroot(tmp_path))
    monkeypatch.setattr(command, "_MEMORY", tmp_path)
    monkeypatch.setattr(host, "measure", lambda settings: settings.tell("now") or section())
    assert command.run(arguments("host", "--json", str(tmp_path / "j"), "--directory", str(tmp_path))) == 0
    assert "A title" in capsys.readouterr().out
    assert json.loads((tmp_path / "j").read_text())["sections"]["x"]["title"] == "A title"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".qemu-version", "j"]


def test_ctrl_c_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_settings: object) -> Section:
        raise KeyboardInterrupt

    (tmp_path / ".qemu-version").write_text("QEMU 11\n")
    monkeypatch.setattr(command, "find_sysroot", lambda: Sysroot(tmp_path))
    monkeypatch.setattr(command, "_MEMORY", tmp_path)
    monkeypatch.setattr(host, "measure", interrupt)
    assert command.run(arguments("host", "--directory", str(tmp_path))) == 130
    assert "nothing is left" in capsys.readouterr().out


def test_a_fio_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    failed = SimpleNamespace(returncode=1, stdout="", stderr="no\nbad engine")
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: failed)
    with pytest.raises(hostfio.FioError, match="bad engine"):
        hostfio.run(Sysroot(tmp_path), tmp_path / "image", rw="read", seconds=1)


TERSE = (
    "fio: warning\n3;fio-3.39;bench;0;0;{read};1.000000%=0;5.000000%=0;10.000000%=0;20.000000%=0;30.000000%=0;"
    "40.000000%=0;50.000000%={p50};60.000000%=0;70.000000%=0;80.000000%=0;90.000000%=0;95.000000%=0;99.000000%={p99};"
    "99.500000%=0;99.900000%=0;99.950000%=0;99.990000%=56;0%=0;0%=0;0%=0;0;5;0.2;9.0;9;94;99.9%;92.0;25.7;"
)


def terse_half(kib: int, iops: float, p50: int, p99: int) -> str:
    text = TERSE.format(read=f"{kib};{kib};{iops};1000;0;0;0.0;0.0;0;5028;0.26;8.44", p50=p50, p99=p99)
    return text.partition("bench;0;0;")[2]


def test_fios_terse_line_is_read() -> None:
    said = "fio: warning\n3;fio-3.39;bench;0;0;" + terse_half(4000, 1000, 5, 9) + terse_half(8000, 2000, 6, 8) + "0.1%"
    assert guest.parse_terse(said, "read") == {"p50_us": 5, "p99_us": 9}
    assert guest.parse_terse(said, "write") == {"p50_us": 6, "p99_us": 8}
    for bad in ("", "3;fio;bench;0;0;1", said.replace("bench;0;0;", "bench;0;5;")):
        with pytest.raises(GuestError, match="fio said"):
            guest.parse_terse(bad, "read")


def test_slices_of_different_lengths_count_by_their_length() -> None:
    slices = [guest.Slice(100, 1.0, 0.5), guest.Slice(500, 2.0, 0.1)]
    assert guest.rates(slices) == {"iops": 200, "cpu_us": pytest.approx(1000)}
    assert guest.rates([guest.Slice(0, 1.0, 0.5)]) == {"iops": 0, "cpu_us": 500_000}


def test_the_error_is_that_of_ratios_of_single_starts() -> None:
    """What happens to both sides is none."""
    theirs = [[guest.Slice(commands, 1.0, 0.0)] * 2 for commands in (1000, 100, 3000, 10)]
    ours = [[guest.Slice(2 * one.commands, 1.0, 0.0) for one in start] for start in theirs]
    assert guest.uncertainty(ours, theirs) == 0
    ours = [
        [guest.Slice(k * one.commands, 1.0, 0.0) for one in some] for k, some in zip((1, 3, 1, 3), theirs, strict=True)
    ]
    assert guest.uncertainty(ours, theirs) == pytest.approx(0.577, abs=1e-3)


def test_a_guest_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_settings: object) -> Section:
        raise GuestError("it panicked; it wrote last:\n  this\n  and that")

    (tmp_path / ".qemu-version").write_text("QEMU 11\n")
    monkeypatch.setattr(command, "find_sysroot", lambda: Sysroot(tmp_path))
    monkeypatch.setattr(command, "_MEMORY", tmp_path)
    monkeypatch.setattr(guest, "measure", fail)
    with pytest.raises(UserError, match=r"^bench: it panicked; it wrote last: this and that$"):
        command.run(arguments("guest", "--directory", str(tmp_path)))


def plot(log: bool, *points: tuple[float, float]) -> report.Plot:
    return report.Plot("p", "A <title>", "x axis", "y axis", {"one": points, "two": points[:1]}, log_x=log, log_y=log)


@given(st.lists(st.tuples(st.floats(0.001, 1e7), st.floats(0.001, 1e7)), min_size=1, max_size=20), st.booleans())
def test_a_plot_has_every_point_within_its_frame(points: list[tuple[float, float]], log: bool) -> None:
    document = ElementTree.fromstring(svg.draw(plot(log, *points)))
    names = {"s": "http://www.w3.org/2000/svg"}
    places = [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in document.findall("s:circle", names)]
    assert len(places) == len(points) + 1
    assert all(84 <= x <= 696 and 48 <= y <= 364 for x, y in places)
    assert "A <title>" in [text.text for text in document.findall("s:text", names)]


def test_ticks_are_round() -> None:
    assert svg._linear_ticks([437.0]) == [0, 100, 200, 300, 400, 500]
    assert svg._linear_ticks([0.0, 0.0]) == [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert svg._log_ticks([1, 1023], 2) == [1, 4, 16, 64, 256, 1024]
    assert svg._log_ticks([8, 8], 2) == [8, 16]
    assert svg._log_ticks([950, 4_000_000], 10) == [100, 1000, 10000, 100000, 1000000, 10000000]
    assert [svg._tick(value) for value in (5, 0.25, 1500, 400_000, 2e6, 123_456)] == [
        "5", "0.25", "1.5k", "400k", "2M", "123,456",
    ]  # fmt: skip


def test_nothing_cannot_be_plotted() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        svg.draw(report.Plot("p", "", "", "", {"none": []}))


def test_plots_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = section()
    found.plots.append(plot(False, (1, 2)))
    (tmp_path / ".qemu-version").write_text("QEMU 11\n")
    monkeypatch.setattr(command, "find_sysroot", lambda: Sysroot(tmp_path))
    monkeypatch.setattr(command, "_MEMORY", tmp_path)
    monkeypatch.setattr(host, "measure", lambda _settings: found)
    words = ["host", "--directory", str(tmp_path), "--plots", str(tmp_path / "a" / "b")]
    assert command.run(arguments(*words)) == 0
    assert (tmp_path / "a" / "b" / "p.svg").read_text().startswith("<svg")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        command.run(arguments("host", "--plots", str(tmp_path / "file" / "b")))
