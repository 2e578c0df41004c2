"""The documentation and the program agree: every command and option is documented, every link leads somewhere."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvmove.cli import COMMANDS, parser

ROOT = Path(__file__).parents[2]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def subparsers(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def section(command: str) -> str:
    """The part of the reference under the heading of a command."""
    for page in REFERENCE:
        if match := re.search(rf"(?ms)^## `?nvmove {command}\b.*?(?=^## |\Z)", page.read_text()):
            return match[0]
    raise AssertionError(f"no page of docs/reference has a section '## nvmove {command}'")


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_in_the_reference(command: str) -> None:
    text = section(command)
    for action in subparsers(parser(command))[command]._actions:
        words = [*action.option_strings] or [str(action.metavar or action.dest).split()[0]]
        assert [word for word in words if word not in text and word not in {"-h", "--help"}] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_no_option_that_does_not_exist(command: str) -> None:
    options = {option for action in subparsers(parser(command))[command]._actions for option in action.option_strings}
    assert set(re.findall(r"(?m)^\| `(--[a-z-]+)", section(command))) <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    queue = [ROOT / "README.md"]
    while queue:
        page = queue.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        queue += [page.parent / target for target in links(page) if target.endswith(".md")]
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - seen == set()


@pytest.mark.parametrize("name", ["docs/design.md", "docs/walk.md", "docs/performance.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    source = ROOT / "src" / "nvmove"
    known = {path.name for path in source.rglob("*.*")} | {path.name for path in ROOT.glob("*.*")}
    for word in re.findall(r"`([\w/.]+\.(?:py|pyx|pyi|c|h))`", (ROOT / name).read_text()):
        assert (source / word).exists() or (ROOT / word).exists() or ("/" not in word and word in known), word
