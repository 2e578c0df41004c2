"""What tests do to a VM's processes from outside: stop one thread of QEMU, cut a connection of nvmove."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from nvmove.lab.machine import Machine
from nvmove.lab.processes import marked

_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207
"""ptrace(2)."""
_WALL = 0x4000_0000
"""waitpid(2): threads, too."""
_SYS_PIDFD_GETFD = 438
"""pidfd_getfd(2)."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def qemu_pid(machine: Machine) -> int:
    """The VM's QEMU."""
    (found,) = (
        process.pid
        for process in marked(machine.mark)
        if "qemu-system" in process.command and process.pid != machine.started.process.pid
    )
    return found


@contextlib.contextmanager
def main_loop_stopped(machine: Machine) -> Iterator[None]:
    """QEMU's main loop does nothing: no monitor, no timer, no interrupt of the disk. The guest's CPUs run on."""
    thread = qemu_pid(machine)
    _ptrace(_PTRACE_SEIZE, thread)
    try:
        _ptrace(_PTRACE_INTERRUPT, thread)
        os.waitpid(thread, _WALL)
        yield
    finally:
        _ptrace(_PTRACE_DETACH, thread)


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def cut_connections(machine: Machine, name: str) -> int:
    """Shut down nvmove's connections to Unix sockets called `name`, as a network would; return how many."""
    pid = machine.started.process.pid
    process = os.pidfd_open(pid)
    try:
        return sum(_cut(process, int(fd.name), name) for fd in (Path("/proc") / str(pid) / "fd").iterdir())
    finally:
        os.close(process)


def _cut(process: int, number: int, name: str) -> bool:
    copy = _libc.syscall(_SYS_PIDFD_GETFD, process, number, 0)
    if copy < 0:  # closed meanwhile
        return False
    try:
        connection = socket.socket(fileno=copy)
    except OSError:  # no socket
        os.close(copy)
        return False
    with connection:
        try:
            peer = connection.getpeername()
        except OSError:  # it listens, or is closed
            return False
        if connection.family != socket.AF_UNIX or not isinstance(peer, str) or Path(peer).name != name:
            return False
        connection.shutdown(socket.SHUT_RDWR)
        return True
