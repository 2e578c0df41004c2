"""What HMP's `migrate` reads and prints, and `info migrate`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ARGUMENTS = re.compile(r'((?:-[dr]+\s+)*)("(?:[^"\\]|\\.)*"|[^\s"-]\S*)\s*')
_STATUS = re.compile(r"^(Status:\s+).*$", re.MULTILINE)
_UNKNOWN_DOWNTIME = 1 << 62
"""QEMU says a number above this while it does not know."""


@dataclass(frozen=True, slots=True)
class Command:
    """`migrate [-d] [-r] URI`."""

    uri: str
    detach: bool
    resume: bool


def parse(arguments: str) -> Command | None:
    """Return what HMP's `migrate` is asked; None when QEMU would not understand it either."""
    found = _ARGUMENTS.fullmatch(arguments.strip())
    if found is None:
        return None
    uri = found[2]
    if uri.startswith('"'):
        uri = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), uri[1:-1])
    return Command(uri, "d" in found[1], "r" in found[1])


def in_place(line: str) -> str:
    """Return what rewrites the terminal's current line."""
    return f"\r{line}\x1b[K"


def progress(answer: Mapping[str, Any]) -> str:
    """Return one line about a migration under way, from the answer to `query-migrate`."""
    ram = answer.get("ram")
    if not isinstance(ram, Mapping):
        return str(answer.get("status", ""))
    total, remaining = ram.get("total", 0), ram.get("remaining", 0)
    done = 100 * (total - remaining) // total if total else 0
    parts = [f"{done} %", f"{_size(ram.get('transferred', 0))} sent, {_size(remaining)} left"]
    pages = ram.get("normal", 0) + ram.get("duplicate", 0)
    parts += [f"{pages} pages", f"{ram.get('mbps', 0):.0f} Mbit/s"]
    downtime = answer.get("expected-downtime", _UNKNOWN_DOWNTIME)
    if 0 < downtime < _UNKNOWN_DOWNTIME:
        parts.append(f"downtime about {downtime} ms")
    return f"{answer.get('status')}: {', '.join(parts)}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def shown(text: str, answer: Mapping[str, Any]) -> str:
    """Return QEMU's `info migrate` with the status that the user is to see, and a line about the marking."""
    if "status" in answer:
        status = str(answer["status"])
        if "error-desc" in answer:
            status += f" ({answer['error-desc']})"
        text = _STATUS.sub(lambda m: m[1] + status + ("\r" if m[0].endswith("\r") else ""), text, count=1)
    marking = answer.get("nvmove-marking")
    if marking is not None:
        line = f"nvmove marking: \tpages={marking['pages']}, time (ms)={marking['milliseconds']}\r\n"
        text = text.rstrip("\r\n") + "\r\n" + line
    return text
