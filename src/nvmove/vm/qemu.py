"""QEMU's process: started so that it dies with nvmove, ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from nvmove.errors import UserError
from nvmove.limits import restore_descriptors

_PR_SET_PDEATHSIG = 1
"""prctl(2)."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_END_SECONDS = 10.0


def die_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child of `parent` runs before exec so that SIGTERM ends it when the parent dies, however that is.

    The signal comes when the *thread* that forked ends: start children from the main thread.
    """

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        restore_descriptors()
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

    def terminate(self) -> None:
        """Send it SIGTERM: QEMU shuts down cleanly, when it has done what it does; a snapshot may take long."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def end(self, seconds: float = _END_SECONDS) -> int:
        """End a QEMU that has nothing to lose: SIGTERM, and SIGKILL if that takes too long."""
        self.terminate()
        try:
            return await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        return await self.wait()


async def start(
    program: Path, arguments: Sequence[str], *, uses_stdio: bool = False, stderr: int | None = None
) -> QemuProcess:
    """Start QEMU from the main thread; raises UserError.

    It inherits the file descriptors that nvmove's own caller passed on (`-add-fd`, `-netdev tap,fd=`). Without
    `uses_stdio` its standard input is empty and its process group its own, so that Ctrl-C reaches nvmove only.
    `stderr` is a file descriptor, nvmove's own when there is none.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=None if uses_stdio else asyncio.subprocess.DEVNULL,
            stderr=stderr,
            close_fds=False,  # Python's own are close-on-exec
            process_group=None if uses_stdio else 0,
            preexec_fn=die_with_parent(os.getpid()),
        )
    except OSError as error:
        raise UserError(f"cannot run '{program}': {error.strerror}") from None
    return QemuProcess(process)
