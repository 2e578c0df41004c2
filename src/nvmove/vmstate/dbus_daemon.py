"""A D-Bus message bus of our own: a `dbus-daemon` on a Unix socket in a private directory, which ends when we do."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import html
import os
import shutil
import signal
import string
from pathlib import Path

from nvmove.errors import UserError
from nvmove.limits import restore_descriptors

START_TIMEOUT = 10.0
"""Seconds. The daemon answers in a few milliseconds; a machine under load may take much longer."""
SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path: sun_path less its terminating zero (unix(7))."""
PLAIN = (string.ascii_letters + string.digits + "-_/.*\\").encode()
"""What a D-Bus address may hold as it is."""
PR_SET_PDEATHSIG = 1
"""prctl(2)."""

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>{address}</listen>
  <auth>ANONYMOUS</auth>
  <allow_anonymous/>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""

_prctl = ctypes.CDLL(None, use_errno=True).prctl


class BusError(UserError):
    """The private bus cannot be used: one line that says why and how to mend it."""


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    restore_descriptors()


def bus_address(path: str) -> str:
    """Return the D-Bus address of the Unix socket `path`, escaped (D-Bus Specification, Server Addresses)."""
    return "unix:path=" + "".join(chr(c) if c in PLAIN else f"%{c:02x}" for c in os.fsencode(path))


class DBusDaemon:
    """The running daemon. `address` is for its clients; its socket and configuration lie in the run directory."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, files: tuple[Path, ...]) -> None:
        self.address = address
        self._process = process
        self._files = files

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self._process.pid

    @classmethod
    async def start(cls, run_directory: Path, program: str = "dbus-daemon") -> DBusDaemon:
        """Start `program` with its socket `bus` in `run_directory` (0700, the caller's); raise BusError."""
        found = shutil.which(program)
        if found is None:
            raise BusError(f"{program} was not found: install it (Debian: apt-get install dbus-daemon)")
        socket, config = run_directory / "bus", run_directory / "bus.conf"
        if len(os.fsencode(socket)) > SOCKET_PATH_MAX:
            raise BusError(f"socket path {socket} is longer than {SOCKET_PATH_MAX} bytes: use a shorter run directory")
        address = bus_address(str(socket))
        socket.unlink(missing_ok=True)
        try:
            config.write_text(CONFIG.format(address=html.escape(address)))
        except OSError as error:
            raise BusError(f"cannot write '{config}': {error.strerror}") from None
        process = await asyncio.create_subprocess_exec(
            found,
            f"--config-file={config}",
            "--nofork",
            "--nopidfile",
            "--nosyslog",
            "--print-address=1",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for us alone
            preexec_fn=_die_with_parent,
        )
        daemon = cls(process, address, (socket, config))
        try:
            await daemon._wait_until_ready(program)
        except BaseException:
            await daemon.close()
            raise
        return daemon

    async def _wait_until_ready(self, program: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT)
        except TimeoutError:
            raise BusError(f"{program} did not start within {START_TIMEOUT:.0f} s") from None
        if not line:
            said = (await self._process.stderr.read()).decode(errors="replace").strip().splitlines()
            status = await self._process.wait()
            raise BusError(f"{program} ended with status {status}: {said[-1] if said else 'it said nothing'}")

    def check(self) -> None:
        """Raise BusError when the daemon has ended."""
        if self._process.returncode is not None:
            raise BusError(
                f"dbus-daemon (pid {self.pid}), which carries the state of nvmove's devices, ended with status "
                f"{self._process.returncode}: the VM cannot be saved, loaded or moved until it is started anew"
            )

    async def close(self) -> None:
        """End the daemon and remove its files."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        for path in self._files:
            path.unlink(missing_ok=True)
