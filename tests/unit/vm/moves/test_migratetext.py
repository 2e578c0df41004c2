"""HMP's `migrate`: what is typed, and what is shown."""

from __future__ import annotations

import pytest

from nvmove.vm.moves.migratetext import Command, in_place, parse, progress, shown


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("tcp:0:1", Command("tcp:0:1", detach=False, resume=False)),
        (" -d  unix:/x ", Command("unix:/x", detach=True, resume=False)),
        ("-d -r tcp:0:1", Command("tcp:0:1", detach=True, resume=True)),
        (r'-d "exec:cat > \"/tmp/a b\""', Command('exec:cat > "/tmp/a b"', detach=True, resume=False)),
        ("", None),
        ("-d", None),
        ("-x tcp:0:1", None),
        ("tcp:0:1 more", None),
        ('"exec:cat', None),
    ],
)
def test_what_qemu_understands_is_understood(typed: str, command: Command | None) -> None:
    assert parse(typed) == command


def test_progress_is_one_line_that_replaces_itself() -> None:
    ram = {"total": 512 << 20, "remaining": 128 << 20, "transferred": 3 << 29, "normal": 9, "duplicate": 4}
    ram["mbps"] = 812
    line = progress({"status": "active", "ram": ram, "expected-downtime": 300})
    assert line == "active: 75 %, 1.5 GiB sent, 128.0 MiB left, 13 pages, 812 Mbit/s, downtime about 300 ms"
    assert in_place(line) == f"\r{line}\x1b[K"
    unknown = progress({"status": "active", "ram": {"total": 0}, "expected-downtime": (1 << 63) - 1})
    assert unknown == "active: 0 %, 0 B sent, 0 B left, 0 pages, 0 Mbit/s"
    assert progress({"status": "setup"}) == "setup"
    assert progress({}) == ""


def test_info_migrate_has_the_users_status_and_the_marking() -> None:
    text = "Status: \t\tpre-switchover\r\nTime (ms): \t\ttotal=4\r\n\r\n"
    marking = {"pages": 7, "bytes": 7, "milliseconds": 12}
    assert shown(text, {"status": "active", "nvmove-marking": marking}) == (
        "Status: \t\tactive\r\nTime (ms): \t\ttotal=4\r\nnvmove marking: \tpages=7, time (ms)=12\r\n"
    )
    assert shown("", {}) == ""
