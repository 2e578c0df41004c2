"""Chardevs that are no sockets: nvmove's own stdin and stdout, a new pseudo terminal, files and FIFOs."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import pty
import select
import signal
import stat
import sys
import termios
import tty

from nvmove.errors import UserError
from nvmove.vm.monitor.stream import ByteStream, Stream

STDIN, STDOUT = 0, 1
PTY_POLL_SECONDS = 0.2
"""How often an unconnected pseudo terminal is looked at: nothing announces that somebody opens it."""

IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6


def _reopen(fd: int, flags: int) -> tuple[int, bool]:
    """Return a descriptor of our own for what `fd` is open on, and whether it never blocks.

    O_NONBLOCK belongs to the open file, which the user's shell shares; so terminals and pipes are opened anew.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), True
    # Files never block. For a socket, or a terminal of another user (su), readiness is asked for first.
    return os.dup(fd), stat.S_ISREG(mode)


class Stdio:
    """nvmove's stdin and stdout. A terminal is put into raw mode, and back at the end, whatever ends it."""

    many = False
    label = "stdio"

    def __init__(self, signals: bool) -> None:
        self._signals = signals
        self._saved: list[object] | None = None
        self._fds: tuple[int, int, bool] | None = None

    async def open(self) -> None:
        """See `Chardev`."""
        try:
            read_fd, nonblocking = _reopen(STDIN, os.O_RDONLY)
            write_fd, _ = _reopen(STDOUT, os.O_WRONLY)
        except OSError as error:
            raise UserError(f"cannot use stdio: {error.strerror}") from None
        self._fds = (read_fd, write_fd, nonblocking)

    async def accept(self) -> ByteStream | None:
        """See `Chardev`."""
        if self._fds is None:
            return None
        read_fd, write_fd, nonblocking = self._fds
        self._fds = None
        sys.stdout.flush()
        self._raw()
        return Stream(read_fd, write_fd, poll_first=not nonblocking)

    def _raw(self) -> None:
        if not os.isatty(STDIN):
            return
        self._saved = list(termios.tcgetattr(STDIN))
        atexit.register(self.close)
        self._apply()
        # A shell that continues us has set the terminal to its own liking.
        asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, self._apply)

    def _apply(self) -> None:
        """Characters one by one and without echo, as QEMU sets its terminal; Ctrl-C is a signal or a character."""
        mode = termios.tcgetattr(STDIN)
        mode[IFLAG] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        mode[OFLAG] |= termios.OPOST
        mode[LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not self._signals:
            mode[LFLAG] &= ~termios.ISIG
        mode[CFLAG] = mode[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[CC][termios.VMIN] = 1
        mode[CC][termios.VTIME] = 0
        termios.tcsetattr(STDIN, termios.TCSANOW, mode)

    def close(self) -> None:
        """See `Chardev`."""
        if self._fds is not None:
            os.close(self._fds[0])
            os.close(self._fds[1])
            self._fds = None
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        atexit.unregister(self.close)
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGCONT)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSANOW, saved)  # type: ignore[arg-type]


class PseudoTerminal:
    """A new pseudo terminal; each time somebody opens it is a new client."""

    many = False

    def __init__(self, name: str, link: str) -> None:
        self._name = name
        self._link = link
        self._master: int | None = None
        self.path = ""

    @property
    def label(self) -> str:
        """See `Chardev`."""
        return f"pty:{self.path}"

    async def open(self) -> None:
        """See `Chardev`. Tells the user where it is, in QEMU's words."""
        master, slave = pty.openpty()
        tty.setraw(slave)
        self.path = os.ttyname(slave)
        os.close(slave)
        os.set_blocking(master, False)
        self._master = master
        if self._link:
            try:
                os.symlink(self.path, self._link)
            except OSError as error:
                link, self._link = self._link, ""
                self.close()
                raise UserError(f"Failed to create PTY symlink {link}: {error.strerror}") from None
        sys.stdout.write(f"char device redirected to {self.path} (label {self._name})\n")
        sys.stdout.flush()

    async def accept(self) -> ByteStream | None:
        """See `Chardev`."""
        poll = select.poll()
        while self._master is not None:
            poll.register(self._master, select.POLLIN)
            if not any(event & select.POLLHUP for _fd, event in poll.poll(0)):
                fd = os.dup(self._master)
                return Stream(fd, fd)
            await asyncio.sleep(PTY_POLL_SECONDS)
        return None

    def close(self) -> None:
        """See `Chardev`."""
        if self._master is not None:
            os.close(self._master)
            self._master = None
        if self._link:
            with contextlib.suppress(OSError):
                if os.readlink(self._link) == self.path:
                    os.unlink(self._link)


class Files:
    """Output to a file or FIFO; input, if any, from another."""

    many = False

    def __init__(self, output: str, source: str = "", *, append: bool = False) -> None:
        self._output = output
        self._source = source
        self._flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
        self._both = False
        self._stream: Stream | None = None

    @classmethod
    def pipe(cls, path: str) -> Files:
        """Return the chardev of `-chardev pipe`: FIFOs `path`.in and `path`.out, or one `path` for both ways."""
        split = os.path.exists(f"{path}.in") and os.path.exists(f"{path}.out")
        files = cls(f"{path}.out" if split else path, f"{path}.in" if split else "")
        # Opened for both ways, a FIFO neither waits for its other end nor ends with it.
        files._flags = os.O_RDWR
        files._both = not split
        return files

    @property
    def label(self) -> str:
        """See `Chardev`."""
        return f"file:{self._output}"

    async def open(self) -> None:
        """See `Chardev`."""
        name, read_fd = self._source, None
        extra = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            if self._source:
                access = os.O_RDWR if self._flags == os.O_RDWR else os.O_RDONLY
                read_fd = os.open(self._source, access | extra)
            name = self._output
            write_fd = os.open(self._output, self._flags | extra, 0o666)
        except OSError as error:
            if read_fd is not None:
                os.close(read_fd)
            raise UserError(f"Could not open '{name}': {error.strerror}") from None
        self._stream = Stream(write_fd if self._both else read_fd, write_fd)

    async def accept(self) -> ByteStream | None:
        """See `Chardev`."""
        stream, self._stream = self._stream, None
        return stream

    def close(self) -> None:
        """See `Chardev`."""
        if self._stream is not None:
            self._stream.close()
