"""The `nvmove` command itself: what all subcommands share."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvmove import cli
from nvmove.errors import UserError


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nvmove", *words])
    try:
        return cli.main()
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, command, "--help") == 0
    assert f"usage: nvmove {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in cli.COMMANDS), ["run"]])
def test_all_that_it_says_can_be_printed_in_ascii(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    ran = subprocess.run(
        [sys.executable, "-m", "nvmove", *words], env=environment, capture_output=True, check=False, timeout=120
    )
    said = (ran.stdout + ran.stderr).decode("ascii")
    assert ran.returncode == (0 if "--help" in words else 2)
    assert "Traceback" not in said
    assert "\\u" not in said


def test_what_a_user_named_in_other_letters_is_printed_too() -> None:
    argv: list[str | bytes] = [sys.executable, "-m", "nvmove", "inspect", b"/no/\xff\xc3\xa4"]
    ran = subprocess.run(
        argv, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False, timeout=120
    )
    assert (ran.returncode, ran.stderr.count(b"\n"), b"Traceback" in ran.stderr) == (1, 1, False)


def test_the_help_of_run_names_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "run", "--help") == 0
    said = capsys.readouterr().out
    assert [word for word in ("NVMOVE_QEMU", "image-owner", "docs/reference/cli.md") if word not in said] == []


def test_the_command_explains_all_and_says_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(summary.split(":")[0][:20] in said for _, summary in cli.COMMANDS.values())
    assert main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("nvmove 0.")


@pytest.mark.parametrize("words", [[], ["walk"], ["serve"], ["inspect"], ["demo", "--fast"]])
def test_wrong_usage_is_status_2(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, *words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_parser_can_be_made_at_once() -> None:
    actions = cli.parser()._subparsers
    assert actions is not None
    (commands,) = (action for action in actions._actions if isinstance(action, argparse._SubParsersAction))
    assert list(commands.choices) == list(cli.COMMANDS)
    assert all(len(command._actions) > 1 for command in commands.choices.values())


class Ends:
    """A subcommand that ends as it is told."""

    def __init__(self, how: BaseException | int) -> None:
        self.how = how

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        pass

    def run(self, _args: Any) -> int:
        if isinstance(self.how, BaseException):
            raise self.how
        return self.how


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        (0, 0, ""),
        (7, 7, ""),
        (UserError("no such thing"), 1, "nvmove: no such thing\n"),
        (UserError("not so", status=2), 2, "nvmove: not so\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_a_command_ends_is_the_exit_status(
    how: BaseException | int,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: Ends(how))
    assert main(monkeypatch, "demo") == status
    assert capsys.readouterr().err == said


def test_a_reader_that_has_gone_ends_it_silently(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`nvmove inspect … | head -1`: Python's own flush at the end must not complain either."""
    monkeypatch.setattr(importlib, "import_module", lambda name: Ends(BrokenPipeError()))
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(fileno=out.fileno))
        assert main(monkeypatch, "demo") == 141
        assert os.readlink(f"/proc/self/fd/{out.fileno()}") == os.devnull


@pytest.mark.parametrize(("level", "known"), [("debug", "DEBUG"), ("loud", "WARNING"), (None, "WARNING")])
def test_the_environment_sets_what_is_logged(level: str | None, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.delenv("NVMOVE_LOG", raising=False)
    if level is not None:
        monkeypatch.setenv("NVMOVE_LOG", level)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: asked.append(options["level"]))
    monkeypatch.setattr(importlib, "import_module", lambda name: Ends(0))
    assert main(monkeypatch, "demo") == 0
    assert asked == [known]
