"""A VM under test: QEMU as it is, or behind `nvmove run`, with its serial port and its monitor."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from nvmove.lab.console import Console, GuestError
from nvmove.lab.processes import Marked, Process, new_mark
from nvmove.lab.qmp import Qmp, QmpClosed, connect_unix
from nvmove.lab.sysroot import Sysroot

LINUX = "console=ttyS0 quiet panic=-1"
"""The kernel's command line."""
QUICK = f"{LINUX} mitigations=off cryptomgr.notests rodata=off"
"""The same for who measures nothing inside: user space without page tables of its own (each switch flushes the TLB), no
self-tests of ciphers, no hunt for writable code. An emulated CPU boots it with a quarter less work."""


def nvmove_command() -> list[str]:
    """Return how to start this very nvmove: the script beside the running Python, or the module."""
    script = Path(sysconfig.get_path("scripts")) / "nvmove"
    return [str(script)] if script.exists() else [sys.executable, "-m", "nvmove"]


class Machine:
    """One VM's processes. Files it makes are in `directory`: sockets, the log, the run directory.

    `front` stands before QEMU's own command line: empty for QEMU as it is, `nvmove run` otherwise.
    """

    PROGRAM = "qemu-system-x86_64"

    def __init__(
        self, directory: Path, sysroot: Sysroot, front: Sequence[str], memory: str = "512M", append: str = QUICK
    ) -> None:
        self.directory = directory
        self.sysroot = sysroot
        self.front = list(front)
        self.memory = memory
        self.append = append
        self.mark = new_mark()
        self.runtime = directory / "runtime"
        """XDG_RUNTIME_DIR and TMPDIR of the processes: what they leave behind lies here."""
        self._started: Marked | None = None
        self._console: Console | None = None
        self._qmp: Qmp | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.runtime.mkdir(mode=0o700, exist_ok=True)

    @property
    def qemu_command(self) -> list[str]:
        """QEMU and the arguments that every VM here has."""
        return [
            *(self.sysroot.program(self.PROGRAM), "-m", self.memory),
            *("-nodefaults", "-display", "none", "-accel", "tcg"),
            *("-serial", f"unix:{self.directory / 'serial'}"),
            *("-qmp", f"unix:{self.directory / 'qmp'},server=on,wait=off"),
        ]

    @property
    def linux(self) -> list[str]:
        """The arguments that start the sysroot's Linux."""
        return ["-kernel", str(self.sysroot.kernel), "-initrd", str(self.sysroot.initrd), "-append", self.append]

    @property
    def started(self) -> Marked:
        """The processes."""
        if self._started is None:
            raise GuestError("the VM was not started")
        return self._started

    @property
    def console(self) -> Console:
        """The guest's shell."""
        if self._console is None:
            raise GuestError("the VM was not started")
        return self._console

    @property
    def qmp(self) -> Qmp:
        """The monitor, as a user of the VM has it."""
        if self._qmp is None:
            raise GuestError("the VM was not started")
        return self._qmp

    @property
    def alive(self) -> bool:
        """Whether the started program runs."""
        return self._started is not None and self._started.process.poll() is None

    def process_ended(self, within: float) -> bool:
        """Return whether the started program has ended, or does so within some seconds."""
        deadline = time.monotonic() + within
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._started is not None and not self.alive

    def launch(self, argv: Sequence[str], *, stdin: int | None = None) -> Marked:
        """Start `argv` marked as this VM's, without waiting for anything."""
        environment = {
            "XDG_RUNTIME_DIR": str(self.runtime),
            "TMPDIR": str(self.runtime),
            "NVMOVE_QEMU": self.sysroot.program(self.PROGRAM),
            "PATH": f"{self.sysroot.path / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }
        log = self.directory / "log"
        more = {} if stdin is None else {"stdin": stdin}
        self._started = Marked.start(argv, log, environment=environment, mark=self.mark, **more)
        return self._started

    def start(self, arguments: Sequence[str], *, timeout: float = 120) -> None:
        """Start the VM and connect to its serial port and monitor; raise GuestError with what it said if it ends."""
        self.hang_up()
        serial = self.directory / "serial"
        serial.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(serial))  # QEMU connects to us, so that not one character is lost
            listener.listen(1)
            listener.settimeout(0.1)
            self.launch([*self.front, *self.qemu_command, *arguments])
            deadline = time.monotonic() + timeout
            while True:
                with contextlib.suppress(TimeoutError):
                    self._console = Console(listener.accept()[0])
                    break
                if not self.alive:
                    raise GuestError(f"the VM did not start (status {self.started.wait(1)}); {self.started.tail()}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no VM after {timeout:.0f} s; {self.started.tail()}")
        serial.unlink(missing_ok=True)
        try:
            self._qmp = Qmp(connect_unix(self.directory / "qmp", timeout, lambda: self.alive))
            if not {"-S", "-incoming"} & set(arguments):
                self._wait_running(timeout)
        except (ConnectionError, QmpClosed) as error:
            raise GuestError(f"the VM has no monitor: {error}; {self.started.tail()}") from None

    def _wait_running(self, timeout: float) -> None:
        """Wait until the VM runs: what is typed on the serial port before a snapshot is loaded would be reverted."""
        deadline = time.monotonic() + timeout
        while (status := self.qmp.status) != "running":
            if time.monotonic() > deadline:
                raise TimeoutError(f"the VM is '{status}' after {timeout:.0f} s; {self.started.tail()}")
            time.sleep(0.05)

    def boot(self, arguments: Sequence[str], *, timeout: float = 240) -> None:
        """Start the VM with the sysroot's Linux and wait for its shell."""
        self.start([*self.linux, *arguments])
        self.console.wait_boot(timeout)

    def quit(self, timeout: float = 60) -> int:
        """End the VM by QMP `quit`; return the program's exit status."""
        with contextlib.suppress(QmpClosed):
            self.qmp.execute("quit", timeout=timeout)
        status = self.started.wait(timeout)
        self.hang_up()
        return status

    def kill(self) -> list[Process]:
        """SIGKILL everything at once, as an out-of-memory killer or a power cut would; return what was killed."""
        killed = self.started.kill_all() if self._started else []
        self.hang_up()
        return killed

    def hang_up(self) -> None:
        """Close our ends of the serial port and the monitor."""
        if self._console:
            self._console.close()
        if self._qmp:
            self._qmp.close()
        self._console = self._qmp = None


class ArmMachine(Machine):
    """A `virt` of QEMU's for arm64, with Debian's kernel, busybox and the NVMe driver in it."""

    PROGRAM = "qemu-system-aarch64"
    ARCHITECTURE = "arm64"
    """Debian's name."""
    BOARD: tuple[str, ...] = ("-M", "virt", "-cpu", "cortex-a57")
    CONSOLE = "ttyAMA0"

    @property
    def qemu_command(self) -> list[str]:
        """As above."""
        return [*super().qemu_command, *self.BOARD]

    @property
    def linux(self) -> list[str]:
        """As above."""
        guest = f"{self.sysroot.path}/guest/{self.ARCHITECTURE}"
        append = f"console={self.CONSOLE} quiet panic=-1"
        return ["-kernel", f"{guest}-vmlinuz", "-initrd", f"{guest}-initrd.cpio", "-append", append]


class RiscvMachine(ArmMachine):
    """The same for riscv64."""

    PROGRAM = "qemu-system-riscv64"
    ARCHITECTURE = "riscv64"
    BOARD = ("-M", "virt")
    CONSOLE = "ttyS0"
