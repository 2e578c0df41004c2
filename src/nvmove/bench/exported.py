"""An image exported by qemu-nbd, for the back end that speaks NBD."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from nvmove.block.nbd.backend import nbd_unix_uri
from nvmove.errors import UserError
from nvmove.lab.processes import Marked
from nvmove.lab.sysroot import Sysroot

_START_SECONDS = 30.0
_CLIENTS = 8
"""More than are ever connected at once."""


class ExportError(UserError):
    """qemu-nbd did not start."""


class Exported:
    """qemu-nbd with a raw image, from its start to its end."""

    def __init__(self, sysroot: Sysroot, directory: Path, image: Path) -> None:
        """The socket and the log are put into `directory`; raises ExportError."""
        socket = directory / "s-qemu-nbd"
        self.uri = nbd_unix_uri(str(socket))
        self._process = Marked.start(
            [
                *(sysroot.program("qemu-nbd"), "--socket", str(socket), "--persistent", "--shared", str(_CLIENTS)),
                *("--format", "raw", "--cache", "writeback", str(image)),
            ],
            directory / "qemu-nbd.log",
        )
        deadline = time.monotonic() + _START_SECONDS
        while not socket.exists():
            if self._process.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise ExportError(f"qemu-nbd did not start: {self._process.output.strip()}")
            time.sleep(0.02)

    def __enter__(self) -> Exported:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill_all()
