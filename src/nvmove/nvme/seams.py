"""What the controller asks of the world around it, as protocols.

Rules that every implementation and every caller keeps:

- `Memory` may wait for the vfio-user client (regions that came without a file descriptor). So it is never called from
  the control thread, and never with the controller's lock held.
- `Interrupts` and `Engine.kick` never wait: they may be called from any thread, with the lock held.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from nvmove.block.lend import LentExport, LentSpace


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

    @property
    def uses_pin(self) -> bool:
        """Whether the host is told by the INTx pin: it chose no MSI-X, and somebody listens to the pin."""

    def signal(self, vector: int) -> None:
        """Send MSI-X message `vector`."""

    def set_level(self, asserted: bool) -> None:
        """Drive the INTx pin."""


# --- queue pairs lent to an engine (nvme/leases.py) ------------------------------------------------------------------

WRITTEN_PAGE = 4096
"""Bytes for which there is one byte in `LentRegion.written`."""


class LentRegion(NamedTuple):
    """A run of guest memory that is mapped here, from the guest-physical address `start` on."""

    start: int
    view: memoryview
    readable: bool
    writable: bool
    written: memoryview | None = None
    """A byte for each page of `WRITTEN_PAGE` bytes that the region touches, where what is written must be known: who
    writes stores 1 there, after the data is in place and before the guest is told. None: nobody wants to know."""


class LentMemory(Protocol):
    """All mapped guest memory, in ascending order; it stays mapped until `release`."""

    regions: Sequence[LentRegion]
    marks: bool
    """Whether what a command writes is to be told to `mark` before its completion, and not to be noted in `written`."""

    def mark(self, runs: Sequence[tuple[int, int]], done: Callable[[], None]) -> None:
        """Mark (address, length) that were written dirty; what cannot be is noted as if in `written`. Never waits.

        `done` is called, from any thread and perhaps before the return, when the guest may be told; after `release`
        too.
        """

    def release(self) -> None:
        """Give it back, once."""


@runtime_checkable
class LendsMemory(Protocol):
    """Memory that can be lent."""

    def lend(self, revoke: Callable[[], None]) -> LentMemory | None:
        """Lend all that is mapped; None when it cannot be.

        `revoke` is called, from any thread and with locks held, when some of it is wanted back.
        """


class LentInterrupt(Protocol):
    """The way of one vector's messages: writes to the eventfd `fd`, which is the borrower's until `release`."""

    fd: int

    def release(self) -> None:
        """Give it back, once."""


@runtime_checkable
class LendsInterrupts(Protocol):
    """Interrupts whose vectors can be lent."""

    def lend(self, vector: int, revoke: Callable[[], None]) -> LentInterrupt | None:
        """Lend vector `vector`; None when its messages have no way now.

        `revoke` is called, from any thread and with locks held, before that way changes: no message may be sent after.
        """


class LentDisk(NamedTuple):
    """A namespace whose back end is a file, an export, or nothing at all (`fd` -1)."""

    fd: int
    blocks: int
    block_shift: int
    writable: bool
    zeroes: bool = False
    """Without a file: reads give zeroes, and do not leave memory as it is."""
    alignment: int = 1
    """More: O_DIRECT, which wants memory and lengths in such multiples, or an export, which wants lengths so. Slow: it
    needs depth."""
    syncs: bool = True
    """Whether a flush does something."""
    durable: bool = False
    """Each write is to be as with FUA."""
    space: LentSpace = LentSpace()
    export: LentExport | None = None
    """`fd` is a connection to it."""


class LentDoorbell(NamedTuple):
    """A doorbell that the host writes in memory, unseen (nvme/doorbells.py). Each view is of 4 bytes."""

    cell: memoryview
    event: memoryview
    """Where who goes to sleep says how far it has looked, before it looks once more."""
    untouched: int | None
    """The host has not used the cell yet, this is in it: until that changes, what the control thread is told counts."""
    always: bool
    """To be said at every sleep; otherwise only when the loop waits for this doorbell: of a head, for room."""
    written: memoryview | None = None
    """As of a region: the byte for the page of `event`."""


class LeaseTerms(NamedTuple):
    """A queue pair as it is lent."""

    sqid: int
    sq_address: int
    sq_size: int
    sq_head: int
    sq_tail: int
    cqid: int
    cq_address: int
    cq_size: int
    cq_head: int
    cq_tail: int
    cq_phase: int
    interrupt: int | None
    """Eventfd of the completion queue's vector; None: it has no interrupts."""
    page_size: int
    max_transfer: int
    """Bytes."""
    durable: bool
    """Writes must be on stable storage when they complete."""
    memory: Sequence[LentRegion]
    disks: dict[int, LentDisk]
    """By namespace id."""
    tail: LentDoorbell | None = None
    """Submission queue tail; None: the control thread is told all values, as of the head."""
    head: LentDoorbell | None = None
    """Completion queue head."""
    marks: bool = False
    """As of the memory: reads complete only when `Lender.mark` has marked what they wrote."""


class FailedCommand(NamedTuple):
    """A command that the disk failed, and that is not completed."""

    order: int
    """Which since `lend`."""
    sqe: bytes
    errno: int
    """Why its data did not get to stable storage, which Linux tells once, or what a server answered; 0: the back end is
    to be asked again."""


Counts = dict[int, tuple[tuple[int, int], ...]]
"""By namespace id: requests and bytes of each `nvmove.block.backend.Operation`, in their order."""


class Borrower(Protocol):
    """What runs a queue pair that is lent to it: it owns the positions of both rings until the pair is given back."""

    # With the controller's lock held; none of it waits.

    def prepare(self) -> None:
        """A lease is about to begin: what is revoked from now on counts."""

    def lend(self, terms: LeaseTerms) -> bool:
        """Take the queue pair over; False where it cannot be run so."""

    def take(self) -> bool:
        """Take the queue pair back at once, if nothing of it is under way; return whether that is so."""

    def end(self) -> None:
        """The queue pair was given back; from here on its positions and counts stay as they are."""

    def set_tail(self, tail: int) -> bool:
        """As `SubmissionQueue.set_tail`."""

    def set_head(self, head: int) -> bool:
        """As `CompletionQueue.set_head`."""

    def positions(self) -> tuple[int, int, int, int, int, int]:
        """Return head and tail of the submission queue; head, tail and phase of the completion queue; the fetched."""

    def counts(self) -> Counts:
        """Return what was done since `lend`."""

    @property
    def doorbells(self) -> int:
        """Doorbells told past the controller since `lend`."""

    @property
    def late(self) -> tuple[bool, bool]:
        """Whether the host has not used the tail's and the head's cell in memory yet."""

    @property
    def executing(self) -> int:
        """Commands under way now."""

    @property
    def owed(self) -> bool:
        """Whether an interrupt could not be sent because it was revoked."""

    def failed(self) -> list[FailedCommand]:
        """Return the commands that the disk failed, in any order."""

    def marking(self) -> list[tuple[int, bytes]]:
        """Return the commands of the last `take_marks` that are not completed, as `failed` does."""

    # The engine's thread.

    def take_marks(self) -> list[tuple[int, int]]:
        """Return what is to be marked next, (address, length); nothing of it is, and nothing else is being marked."""

    # From any thread that may wait, without a lock.

    def wait_halted(self, timeout: float) -> None:
        """After `halt`: wait until the queue pair can be taken, at most `timeout` seconds."""

    # From any thread, with any lock held.

    def marked(self) -> None:
        """What `take_marks` returned is marked; has no effect when the queue pair was given back before."""

    def revoke(self) -> None:
        """Ask for the queue pair; never waits."""

    def halt(self) -> None:
        """The same, of who takes it then: the borrower may leave it where it is for a moment."""

    def mute(self) -> None:
        """No interrupt is sent after this."""


class Lending(enum.Enum):
    """What became of a wish to borrow."""

    LENT = enum.auto()
    REFUSED = enum.auto()
    SOON = enum.auto()
    """Nothing is in the way but commands that Python has under way: the queue is kicked when they have ended."""


class Lender(Protocol):
    """Lends queue pairs to an engine; all of it is for the queue's worker."""

    def lend(self, sqid: int, borrower: Borrower) -> Lending:
        """Lend submission queue `sqid` and its completion queue, if all is plain about them."""

    def mark(self, borrower: Borrower) -> None:
        """Have marked what `take_marks` returns. Never waits: `Borrower.marked` says when."""

    def give_back(self, borrower: Borrower) -> None:
        """End a lease; nothing of the queue pair is under way but what is being marked, which is waited for."""

    def step(self, sqid: int, count: int) -> None:
        """Run at most `count` commands of a queue that is not lent."""


class Engine(Protocol):
    """Runs submission queues: calls `Controller.run(sqid)` for a kicked queue, outside the control thread.

    One queue is run by one thread at a time; different queues may run at once.
    """

    @property
    def poll(self) -> float:
        """Seconds that `run` goes on looking at a doorbell in memory when it has found no more work."""

    def bind(self, run: Callable[[int], None], lender: Lender | None = None) -> None:
        """`run(sqid)` is what runs a queue; the controller calls this once, before any `attach`.

        An engine that runs queue pairs itself borrows them from `lender`.
        """

    def attach(self, sqid: int) -> None:
        """Submission queue `sqid` exists from now on."""

    def kick(self, sqid: int) -> None:
        """There may be something to do on submission queue `sqid` (0 also stands for events to deliver)."""

    def detach(self, sqid: int) -> None:
        """Submission queue `sqid` is gone. May be called from its own worker, and never waits."""

    def close(self) -> None:
        """Stop all workers and wait for them."""
