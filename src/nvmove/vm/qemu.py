"""QEMU's program and process: found and checked, started so that it dies with nvmove, ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvmove.errors import UserError

MINIMUM = (10, 1)
"""The first QEMU with vfio-user-pci."""
_PR_SET_PDEATHSIG = 1
"""prctl(2)."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_PROBE_SECONDS = 60
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class QemuProgram:
    """A QEMU that nvmove can work with."""

    path: Path
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        """The version as QEMU's devices show it: `11.1.3`."""
        return ".".join(map(str, self.version))

    def property_types(self, driver: str) -> Mapping[str, str]:
        """Return the types of a device's properties by name, as `-device DRIVER,help` shows them; empty if unknown."""
        shown = _ask(self.path, "-device", f"{driver},help").stdout
        return dict(re.findall(r"^  (\S+)=<(.+?)>(?:\s|$)", shown, re.MULTILINE))


def find(program: str) -> QemuProgram:
    """Return the QEMU that the user means by `program` (`$NVMOVE_QEMU` when set); raises UserError."""
    wanted = os.environ.get("NVMOVE_QEMU") or program
    path = shutil.which(wanted)
    need = f"nvmove needs QEMU {MINIMUM[0]}.{MINIMUM[1]} or later"
    if path is None:
        raise UserError(f"'{wanted}' not found; {need} (set NVMOVE_QEMU to its path)")
    shown = _ask(Path(path), "--version").stdout
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", shown)
    if not match:
        raise UserError(f"'{path}' is not a QEMU system emulator: it does not tell its version; {need}")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if version[:2] < MINIMUM:
        raise UserError(f"{need}, and '{path}' is QEMU {'.'.join(map(str, version))} (NVMOVE_QEMU chooses another)")
    found = QemuProgram(Path(path), version)
    if "socket" not in found.property_types("vfio-user-pci"):
        raise UserError(f"'{path}' (QEMU {found.version_text}) was built without the device vfio-user-pci")
    objects = _ask(found.path, "-object", "help").stdout.split()
    for needed in ("dbus-vmstate", "qtest"):
        if needed not in objects:
            raise UserError(f"'{path}' (QEMU {found.version_text}) was built without the object {needed}")
    return found


def _ask(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [path, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PROBE_SECONDS,
        )
    except OSError as error:
        raise UserError(f"cannot run '{path}': {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"'{path} {' '.join(words)}' does not answer in {_PROBE_SECONDS} seconds") from None


def die_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child of `parent` runs before exec so that SIGTERM ends it when the parent dies, however that is.

    The signal comes when the *thread* that forked ends: start children from the main thread.
    """

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os._exit(128 + signal.SIGTERM)

    return prepare


def exit_status(returncode: int) -> int:
    """Return the status that nvmove ends with: QEMU's, or 128 + the signal that ended it."""
    return 128 - returncode if returncode < 0 else returncode


class QemuProcess:
    """A running QEMU."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait for its end; return the status that nvmove ends with."""
        return exit_status(await self._process.wait())

    async def end(self, seconds: float = _END_SECONDS) -> int:
        """End it: SIGTERM, with which QEMU shuts down cleanly, and SIGKILL if that takes too long."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            return await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        return await self.wait()


async def start(program: QemuProgram, arguments: Sequence[str], *, uses_stdio: bool = False) -> QemuProcess:
    """Start QEMU from the main thread; raises UserError.

    It inherits the file descriptors that nvmove's own caller passed on (`-add-fd`, `-netdev tap,fd=`). Without
    `uses_stdio` its standard input is empty and its process group its own, so that Ctrl-C reaches nvmove only.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            program.path,
            *arguments,
            stdin=None if uses_stdio else asyncio.subprocess.DEVNULL,
            close_fds=False,  # Python's own are close-on-exec
            process_group=None if uses_stdio else 0,
            preexec_fn=die_with_parent(os.getpid()),
        )
    except OSError as error:
        raise UserError(f"cannot run '{program.path}': {error.strerror}") from None
    return QemuProcess(process)
