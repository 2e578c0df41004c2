"""Processes found by what is in their command line, where a program has put a mark of its own upon them."""

from __future__ import annotations

from pathlib import Path


def command_lines_with(text: str) -> list[str]:
    """The command lines of all processes that have `text` in them."""
    found = []
    for proc in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = proc.read_bytes()
        except OSError:
            continue  # it has ended
        if text.encode() in line:
            found.append(line.decode(errors="replace"))
    return found
