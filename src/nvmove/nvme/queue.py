"""Submission and completion queues: rings in guest memory and the controller's positions in them (Base 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nvmove.nvme.spec import CQE_SIZE, SQE_SIZE


@dataclass(slots=True, eq=False)
class CompletionQueue:
    """A completion queue. A slot is reserved before a command starts, so that every completion has its place."""

    cqid: int
    address: int
    size: int
    """Entries."""
    vector: int
    irq_enabled: bool
    head: int = 0
    tail: int = 0
    phase: int = 1
    """The phase tag of the next entry; it turns over with every wrap."""
    reserved: int = 0
    """Slots that commands under way will fill."""
    sqs: set[int] = field(default_factory=set)
    """Ids of the submission queues that complete here."""

    @property
    def used(self) -> int:
        """Entries posted and not yet consumed by the host."""
        return (self.tail - self.head) % self.size

    @property
    def is_empty(self) -> bool:
        """Whether the host has consumed every entry."""
        return self.head == self.tail

    def reserve(self) -> bool:
        """Reserve a slot; return whether there was one. One slot stays free: a full ring has size - 1 entries."""
        if self.used + self.reserved >= self.size - 1:
            return False
        self.reserved += 1
        return True

    def release(self) -> None:
        """Give a reserved slot back unused."""
        self.reserved -= 1

    def take(self) -> tuple[int, int]:
        """Turn a reserved slot into the next entry; return its guest address and its phase tag."""
        address, phase = self.address + self.tail * CQE_SIZE, self.phase
        self.reserved -= 1
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase ^= 1
        return address, phase


@dataclass(slots=True, eq=False)
class SubmissionQueue:
    """A submission queue."""

    sqid: int
    cq: CompletionQueue
    address: int
    size: int
    """Entries."""
    priority: int = 0
    head: int = 0
    tail: int = 0
    epoch: int = 0
    """The controller's epoch it was created in."""
    in_flight: int = 0
    """Commands fetched and not completed; outstanding Asynchronous Event Requests do not count."""
    aborted: set[int] = field(default_factory=set)
    """Ids of commands still in the ring that an Abort found: they complete as aborted when they are fetched."""
    on_idle: Callable[[], None] | None = None
    """Set while a Delete I/O Submission Queue waits for what is in flight."""

    @property
    def is_empty(self) -> bool:
        """Whether everything the host has submitted was fetched."""
        return self.head == self.tail

    @property
    def next_address(self) -> int:
        """Guest address of the next entry to fetch."""
        return self.address + self.head * SQE_SIZE

    def advance(self) -> None:
        """Count one entry as fetched."""
        self.head = (self.head + 1) % self.size

    def waiting(self) -> list[int]:
        """Return the guest addresses of the entries submitted and not yet fetched."""
        count = (self.tail - self.head) % self.size
        return [self.address + (self.head + index) % self.size * SQE_SIZE for index in range(count)]
