"""Submission and completion queues: rings in guest memory and the controller's positions in them (Base 3.3).

A command is only fetched with a permit: a completion queue slot reserved for it. So a full completion queue stops its
submission queues, and a completion always finds its slot.

Everything here wants the controller's lock, but for `CompletionQueue.posting`, which is taken before that lock: entries
are counted, written and signalled one after the other, so that what is signalled is in guest memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from nvmove.nvme.held import HeldCommands
from nvmove.nvme.seams import Borrower
from nvmove.nvme.spec import CQE_SIZE, SQE_SIZE


@dataclass(slots=True, eq=False)
class CompletionQueue:
    """A completion queue: the controller owns `tail` and `phase`, the host `head`."""

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
    """Permits given out: slots at the tail that commands under way will fill."""
    sqs: set[int] = field(default_factory=set)
    """Ids of the submission queues that complete here."""
    posting: threading.Lock = field(default_factory=threading.Lock)
    borrower: Borrower | None = None
    """Whom the queue pair is lent to (nvme/leases.py): the positions are there, and here they are old."""

    @property
    def used(self) -> int:
        """Entries posted and not yet consumed by the host."""
        return (self.tail - self.head) % self.size

    @property
    def is_empty(self) -> bool:
        """Whether the host has consumed every entry."""
        return self.head == self.tail

    @property
    def free(self) -> int:
        """Permits that can be given. One slot stays free: a full ring has size - 1 entries."""
        return self.size - 1 - self.used - self.reserved

    @property
    def tail_address(self) -> int:
        """Guest address of the next entry."""
        return self.address + self.tail * CQE_SIZE

    def reserve(self, count: int = 1) -> int:
        """Give out at most `count` permits; return how many."""
        count = min(count, self.free)
        self.reserved += count
        return count

    def release(self, count: int = 1) -> None:
        """Take permits back unused."""
        self.reserved -= count

    def advance(self) -> None:
        """The entry at the tail is about to be written; its permit is used up."""
        self.reserved -= 1
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase ^= 1

    def set_head(self, head: int) -> bool:
        """The host's doorbell: entries before `head` are consumed. False if that cannot be."""
        if self.borrower is not None:
            return self.borrower.set_head(head)
        if head >= self.size or (head - self.head) % self.size > self.used:
            return False
        self.head = head
        return True


@dataclass(slots=True, eq=False)
class SubmissionQueue:
    """A submission queue: the controller owns `head`, the host `tail`."""

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
    fetched: int = 0
    """Entries fetched since it was created: tells a ring position from the same one a round later."""
    aborted: set[int] = field(default_factory=set)
    """Ring positions, between head and tail, that an Abort hit: they complete as aborted when they are fetched."""
    held: HeldCommands = field(default_factory=HeldCommands)
    on_idle: Callable[[], None] | None = None
    """Set while a Delete I/O Submission Queue waits for what is in flight."""
    borrower: Borrower | None = None
    """As the completion queue's."""

    @property
    def waiting(self) -> int:
        """Entries submitted and not fetched."""
        return (self.tail - self.head) % self.size

    @property
    def contiguous(self) -> int:
        """Of these, how many come before the end of the ring."""
        return min(self.waiting, self.size - self.head)

    @property
    def head_address(self) -> int:
        """Guest address of the next entry to fetch."""
        return self.address + self.head * SQE_SIZE

    def set_tail(self, tail: int) -> bool:
        """The host's doorbell. False if it submits more entries than the ring has free."""
        if self.borrower is not None:
            return self.borrower.set_tail(tail)
        if tail >= self.size or (tail - self.tail) % self.size > self.size - 1 - self.waiting:
            return False
        self.tail = tail
        return True

    def advance(self, count: int) -> list[bool]:
        """Count `count` entries, not beyond the ring's end, as fetched; return of each whether an Abort hit it."""
        positions = range(self.head, self.head + count)
        hits = [position in self.aborted for position in positions]
        self.aborted.difference_update(positions)
        self.head = (self.head + count) % self.size
        self.fetched += count
        return hits

    def runs(self) -> list[tuple[int, int]]:
        """Return the waiting entries as runs of guest memory: address and count."""
        first = self.contiguous
        runs = [(self.head_address, first), (self.address, self.waiting - first)]
        return [(address, count) for address, count in runs if count]
