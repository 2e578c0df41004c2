"""What the back ends' tests share: requests done and waited for, QEMU's tools run."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from nvmove.block.backend import Backend, Operation, Request

KIB = 1024
MIB = 1024 * KIB


class Waiter:
    """A `done` that can be waited for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.calls: list[int] = []

    def __call__(self, error: int) -> None:
        self.calls.append(error)
        self._event.set()

    def wait(self) -> int:
        """The errno that `done` got."""
        assert self._event.wait(20), "the request never ended"
        return self.calls[0]


def start(
    backend: Backend,
    operation: Operation,
    offset: int = 0,
    length: int = 0,
    buffers: Sequence[memoryview] = (),
    *,
    fua: bool = False,
    may_unmap: bool = False,
) -> Waiter:
    """Submit a request."""
    waiter = Waiter()
    backend.submit(Request(operation, waiter, offset, length, buffers, fua, may_unmap))
    return waiter


def read(backend: Backend, offset: int, length: int) -> bytes:
    """Read through one buffer; the read must succeed."""
    data = bytearray(length)
    assert start(backend, Operation.READ, offset, length, [memoryview(data)]).wait() == 0
    return bytes(data)


def write(backend: Backend, offset: int, data: bytes, *, fua: bool = False) -> int:
    """Write from one buffer and return the errno."""
    return start(backend, Operation.WRITE, offset, len(data), [memoryview(bytearray(data))], fua=fua).wait()


def do(backend: Backend, operation: Operation, offset: int = 0, length: int = 0, *, may_unmap: bool = False) -> int:
    """Do a request without data and return its errno."""
    return start(backend, operation, offset, length, may_unmap=may_unmap).wait()


def aligned(length: int) -> memoryview:
    """Page-aligned memory, as a guest's pages are."""
    return memoryview(mmap.mmap(-1, length))


def image(path: Path, size: int = MIB) -> Path:
    """An image of random bytes."""
    path.write_bytes(os.urandom(size))
    return path


def allocated(path: Path) -> int:
    """The bytes of disk space that a file has."""
    return path.stat().st_blocks * 512


def tool(sysroot: Path, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of QEMU's tools to its end."""
    command = [str(sysroot / "bin" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@contextlib.contextmanager
def qemu_nbd(sysroot: Path, *arguments: str) -> Iterator[None]:
    """Run qemu-nbd, which has ended with the block, and let go of its image; ready once it has forked."""
    with tempfile.TemporaryDirectory(prefix="nvmove-test-") as folder:
        pid_file = Path(folder, "pid")
        command = [str(sysroot / "bin" / "qemu-nbd"), "--fork", "--pid-file", str(pid_file), *arguments]
        subprocess.run(command, check=True, timeout=30)
        try:
            yield
        finally:
            process = os.pidfd_open(int(pid_file.read_text()))
            signal.pidfd_send_signal(process, signal.SIGKILL)
            ended, _, _ = select.select([process], [], [], 30)
            os.close(process)
            assert ended, "qemu-nbd is killed and does not end"
