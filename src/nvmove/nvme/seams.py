"""What the controller asks of the world around it, as protocols.

Rules that every implementation and every caller keeps:

- `Memory` may wait for the vfio-user client (regions that came without a file descriptor). So it is never called from
  the control thread, and never with the controller's lock held.
- `Interrupts` and `Engine.kick` never wait: they may be called from any thread, with the lock held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class DmaError(Exception):
    """An access to guest memory that is not mapped, or is mapped read-only: a Data Transfer Error to the guest."""


class Segment(NamedTuple):
    """A run of guest memory: guest-physical address and length, both in bytes."""

    address: int
    length: int


class Transfer(Protocol):
    """Guest memory taken for one command's data, in order; its regions stay mapped until `finish`."""

    buffers: Sequence[memoryview]

    def finish(self, commit: bool = True) -> None:
        """Give the memory back, once. With `commit`, what was put into bounce buffers is written to the guest first.

        Raises DmaError when that write fails.
        """


class Memory(Protocol):
    """Guest-physical memory."""

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes; raise DmaError."""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`; raise DmaError. It has reached the guest's memory on return."""

    def acquire(self, segments: Sequence[Segment], to_guest: bool) -> Transfer:
        """Take the memory of `segments` for a transfer towards or from the guest; raise DmaError."""


class Interrupts(Protocol):
    """The function's interrupt lines. Vectors that have no way to the guest now are remembered as pending."""

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest chose MSI-X; INTx otherwise."""

    def signal(self, vector: int) -> None:
        """Send MSI-X message `vector`."""

    def set_level(self, asserted: bool) -> None:
        """Drive the INTx pin."""


class Engine(Protocol):
    """Runs submission queues: calls `Controller.run(sqid)` for a kicked queue, outside the control thread.

    One queue is run by one thread at a time; different queues may run at once.
    """

    @property
    def poll(self) -> float:
        """Seconds that `run` goes on looking at a doorbell in memory when it has found no more work."""

    def bind(self, run: Callable[[int], None]) -> None:
        """`run(sqid)` is what runs a queue; the controller calls this once, before any `attach`."""

    def attach(self, sqid: int) -> None:
        """Submission queue `sqid` exists from now on."""

    def kick(self, sqid: int) -> None:
        """There may be something to do on submission queue `sqid` (0 also stands for events to deliver)."""

    def detach(self, sqid: int) -> None:
        """Submission queue `sqid` is gone. May be called from its own worker, and never waits."""

    def close(self) -> None:
        """Stop all workers and wait for them."""
