"""Processes that cannot get lost: each carries a mark in its environment, and so do all that it starts.

A mark survives fork, setsid and re-parenting, so "nothing is left" is a fact that /proc tells, and not a hope.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

MARK = "NVMOVE_LAB"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Process:
    """A process that carries a mark."""

    pid: int
    command: str


def new_mark() -> str:
    """Return a mark that no other process has."""
    return uuid.uuid4().hex


def marked(mark: str) -> list[Process]:
    """Return the living processes that carry `mark` (zombies have ended), parents first where pids tell."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=False):
        proc = Path("/proc") / str(entry)
        try:
            if needle not in (proc / "environ").read_bytes().split(b"\0"):
                continue
            if (proc / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            command = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is not ours
        found.append(Process(entry, command))
    return found


def kill_marked(mark: str, sig: int = signal.SIGKILL) -> list[Process]:
    """Send `sig` to every process that carries `mark`, at once; return those it was sent to."""
    processes = marked(mark)
    for process in processes:
        try:
            os.kill(process.pid, sig)
        except ProcessLookupError:
            continue
    return processes


def wait_gone(mark: str, timeout: float) -> list[Process]:
    """Wait until no process carries `mark`; return those that still do after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(slots=True)
class Marked:
    """A started program, and by its mark all that it starts."""

    argv: Sequence[str]
    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    """What it wrote on stdout and stderr."""
    _closed: bool = field(default=False, init=False)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        mark: str | None = None,
    ) -> Marked:
        """Start `argv`; it dies when this process dies. Raise FileNotFoundError when there is no such program."""
        mark = mark or new_mark()
        with log.open("ab") as out:
            process = subprocess.Popen(
                list(argv),
                stdin=stdin,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), MARK: mark},
                preexec_fn=_die_with_parent,  # noqa: PLW1509 -- one system call, no lock, no memory
            )
        return cls(argv, process, mark, log)

    @property
    def output(self) -> str:
        """All that was written so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """Wait for the program and return its exit status; raise TimeoutError with its last output."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.argv[0]} did not end within {timeout:.0f} s; {self.tail()}") from None

    def tail(self, lines: int = 15) -> str:
        """Return the end of the output for a message."""
        last = self.output.splitlines()[-lines:]
        return "it said:\n  " + "\n  ".join(last) if last else "it said nothing"

    def kill_all(self) -> list[Process]:
        """SIGKILL the program and all that it started, until none is left; return those there were."""
        killed = kill_marked(self.mark)
        deadline = time.monotonic() + 20
        while marked(self.mark):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not even SIGKILL ends {marked(self.mark)}")
            kill_marked(self.mark)
            time.sleep(0.02)
        self.process.wait()
        return killed
