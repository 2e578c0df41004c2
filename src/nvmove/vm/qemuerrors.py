"""What QEMU says on its standard error, in the user's own words: nvmove has rewritten some of the options."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Mapping

_PIECE = 1 << 16


class Wording:
    """Puts what the user typed where QEMU names what it was given instead."""

    def __init__(self, typed: Mapping[str, str], driver: str, shown: str) -> None:
        """`typed`: the user's options by QEMU's; `driver` is called `shown` in messages about those."""
        self._typed = {os.fsencode(ours): os.fsencode(theirs) for ours, theirs in typed.items()}
        self._driver = os.fsencode(driver)
        self._shown = os.fsencode(shown)

    def line(self, line: bytes) -> bytes:
        """Return one line of QEMU's as the user is to see it."""
        found = next((ours for ours in self._typed if ours + b":" in line), None)
        if found is None:
            return line
        before, after = line.split(found, 1)
        return before + self._typed[found] + after.replace(self._driver, self._shown)


class ErrorRelay:
    """Passes on what comes from a pipe, line by line and at once.

    It has a thread of its own, as writing may wait for a terminal.
    A line that is not whole is passed on as it is when nothing more has come for a moment: some messages wait for a
    `cont` in the midst of a line.
    """

    _PATIENCE_MS = 500

    def __init__(self, wording: Wording, to: int) -> None:
        """Write to the file descriptor `to`, which stays the caller's."""
        self._wording = wording
        self._to = to
        self._from, self.end = os.pipe2(os.O_CLOEXEC)
        """`end` is for QEMU; whoever has given it to QEMU closes it."""
        os.set_blocking(self._from, False)
        self._stop, self._stopping = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="qemu-stderr", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what there is and end; a child of QEMU's that has kept its end of the pipe is not waited for."""
        os.close(self._stopping)
        self._thread.join()
        for fd in (self._from, self._stop):
            os.close(fd)

    def _run(self) -> None:
        rest = b""
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            if not poll.poll(self._PATIENCE_MS if rest else None):
                self._write(rest)
                rest = b""
                continue
            try:
                data = os.read(self._from, _PIECE)
            except BlockingIOError:
                break  # asked to end, and there is no more
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            self._write(b"".join(self._wording.line(line) + b"\n" for line in lines))
        self._write(rest)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                writable = select.poll()
                writable.register(self._to, select.POLLOUT)
                writable.poll()
            except OSError:
                return  # nobody is there to read it, as when QEMU writes itself
