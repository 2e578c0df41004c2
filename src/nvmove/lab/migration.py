"""A VM that moves between machines: every hop a new set of processes, the guest the same."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvmove.lab.console import GuestError
from nvmove.lab.machine import Machine
from nvmove.lab.processes import marked
from nvmove.lab.qmp import Qmp

ENDED = ("completed", "failed", "cancelled")
"""Statuses in which a migration is over."""


def migrate_status(qmp: Qmp) -> dict[str, Any]:
    """Return the answer to `query-migrate`."""
    answer: dict[str, Any] = qmp.execute("query-migrate")
    return answer


def wait_status(qmp: Qmp, *wanted: str, timeout: float = 120) -> dict[str, Any]:
    """Poll `query-migrate` until its status is one of `wanted`; return the answer."""
    deadline = time.monotonic() + timeout
    while (answer := migrate_status(qmp)).get("status") not in wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the migration is not {' or '.join(wanted)} after {timeout:.0f} s: {answer}")
        time.sleep(0.05)
    return answer


def wait_run_state(qmp: Qmp, *wanted: str, timeout: float = 120) -> str:
    """Poll `query-status` until the VM is in one of these states; return which."""
    deadline = time.monotonic() + timeout
    while (status := qmp.status) not in wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the VM is '{status}' after {timeout:.0f} s, not {' or '.join(wanted)}")
        time.sleep(0.05)
    return status


@dataclass
class Traveller:
    """A guest, the machine it runs on, and a factory of further ones."""

    machine: Machine
    """Where the guest is."""
    arguments: Sequence[str]
    """QEMU's arguments besides those of every machine: the same at each end."""
    another: Callable[[str], Machine]
    """Makes a machine of that name."""
    hops: int = field(default=0, init=False)

    def boot(self) -> None:
        """Start the guest where it is."""
        self.machine.boot(list(self.arguments))

    def destination(self, *more: str, incoming: str = "defer", arguments: Sequence[str] | None = None) -> Machine:
        """Start a machine that waits for the guest."""
        self.hops += 1
        machine = self.another(f"m{self.hops}")
        given = self.arguments if arguments is None else arguments
        machine.start([*machine.linux, *given, "-incoming", incoming, *more])
        return machine

    def uri(self, machine: Machine) -> str:
        """Return the address of a Unix socket at which `machine` may wait."""
        return f"unix:{machine.directory / 'migration'}"

    def hop(self, *more: str) -> dict[str, Any]:
        """Move the guest to a new machine, end the old one, and return the source's last `query-migrate`."""
        source, target = self.machine, self.destination(*more)
        target.qmp.execute("migrate-incoming", {"uri": self.uri(target)})
        source.qmp.execute("migrate", {"uri": self.uri(target)})
        answer = wait_status(source.qmp, *ENDED)
        if answer["status"] != "completed":
            raise GuestError(f"the migration {answer['status']}: {answer.get('error-desc')}")
        wait_run_state(target.qmp, "running", "paused", "io-error", "suspended")
        self.machine = target
        source.quit()
        return answer


def move_by_file(source: Machine, target: Machine, arguments: Sequence[str]) -> None:
    """Move a VM that was started with `arguments`, through a file; the source has ended, `target` has the VM."""
    stream = f"file:{target.directory / 'stream'}"
    source.qmp.execute("migrate", {"uri": stream})
    wait_status(source.qmp, "completed")
    if status := source.quit():
        raise GuestError(f"the source ended with status {status}")
    target.start([*arguments, "-incoming", stream])
    wait_status(target.qmp, "completed")


class Cable:
    """What lies between source and destination, to be cut: passes on what comes at one Unix socket to another.

    It takes what comes at once, also when the other end is stuck: QEMU's monitor waits while it sends a device's state.
    """

    def __init__(self, here: Path, there: Path) -> None:
        self._there = there
        self._ends: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(here))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                target = socket.socket(socket.AF_UNIX)
                target.connect(str(self._there))
                self._ends += [source, target]
                for ends in ((source, target), (target, source)):
                    under_way: queue.SimpleQueue[bytes] = queue.SimpleQueue()
                    threading.Thread(target=_take, args=(ends[0], under_way), daemon=True).start()
                    threading.Thread(target=_give, args=(ends[1], under_way), daemon=True).start()

    def cut(self, *, at_the_source: bool = False) -> None:
        """Break all connections, and take no more.

        `at_the_source`: there only; what is under way still reaches the destination, whose answers are lost.
        """
        for sock in (self._listener, *(self._ends[::2] if at_the_source else self._ends)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(10)


def _take(source: socket.socket, under_way: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            under_way.put(data)
    under_way.put(b"")


def _give(target: socket.socket, under_way: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(OSError):
        while data := under_way.get():
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def qemu_of(machine: Machine) -> int:
    """Return the process id of a machine's QEMU, behind an nvmove or not."""
    found = [
        process.pid for process in marked(machine.mark) if "-incoming" in process.command or "-M" in process.command
    ]
    return found[-1]  # the youngest: QEMU is started last
