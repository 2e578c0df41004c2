"""Queue pairs lent to an engine that runs them itself, without Python.

A pair is lent only while all about it is plain: an I/O queue that has its completion queue for itself, nothing in
flight, held or aborted, disks that are files or exports. While it is lent its positions are the borrower's, all
completion queue slots count as given out, and the lease counts as one thing in flight. So whatever waits for what is in
flight waits for the lease's end: pause, disable, reset, deletion, shutdown, unmap. Whoever starts to wait revokes the
lease. A borrower that sleeps gives back at once, without its thread; one that works, after the command it is at.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from nvmove.block.backend import Operation
from nvmove.block.lend import LendsFile
from nvmove.nvme.activity import Activity, Callback, call
from nvmove.nvme.cells import cell_of
from nvmove.nvme.commands import command as commands
from nvmove.nvme.commands import failures
from nvmove.nvme.commands.batch import Failure
from nvmove.nvme.commands.command import Command
from nvmove.nvme.doorbells import Doorbells
from nvmove.nvme.held import HeldCommand
from nvmove.nvme.lease import Lease, Refused
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.seams import Borrower, LeaseTerms, Lending
from nvmove.nvme.spec import Nvm, Status

_OPERATIONS = {
    Nvm.FLUSH: Operation.FLUSH,
    Nvm.WRITE: Operation.WRITE,
    Nvm.READ: Operation.READ,
    Nvm.WRITE_ZEROES: Operation.WRITE_ZEROES,
}
"""What a borrower may be told an error of that is told once."""

_SOON = 0.002
"""Seconds for loops to stop where they are; after that their threads give back what they have."""

log = logging.getLogger(__name__)


class Controller(commands.Controller, Protocol):
    """What leases use of their controller."""

    @property
    def activity(self) -> Activity:
        """What is in flight."""

    @property
    def doorbells(self) -> Doorbells:
        """Where the doorbells are."""

    def step(self, sqid: int, count: int) -> None:
        """Run at most `count` commands of a submission queue."""

    def notify(self, cq: CompletionQueue) -> None:
        """Tell the host of completions. With the lock held."""


class Leases:
    """The leases of one controller, as `nvmove.nvme.seams.Lender`."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._lock = controller.lock
        self._live: dict[Borrower, Lease] = {}
        self._barred = 0
        self._ended = threading.Condition(controller.lock)

    # --- the engine's side -------------------------------------------------------------------------------------------

    def lend(self, sqid: int, borrower: Borrower) -> Lending:
        """Lend a queue pair; see `Lender.lend`."""
        result = Lending.REFUSED
        with contextlib.ExitStack() as unless_lent, self._lock:
            sq = self._controller.sqs.get(sqid)
            if sq is None or not self._is_plain(sq):
                return result
            lease = Lease(sq, borrower)
            unless_lent.callback(lease.release)  # whatever goes wrong, and without the lock
            borrower.prepare()
            try:
                terms = lease.borrow(self._controller)
                if not sq.in_flight:
                    self._begin(lease, terms)
                    unless_lent.pop_all()
                    return Lending.LENT
                if any(disk.export for disk in terms.disks.values()):  # requests there never end all at once
                    result = Lending.SOON
                    sq.on_idle = functools.partial(self._controller.engine.kick, sqid)
            except Refused:
                pass
            except (OSError, MemoryError) as error:  # descriptors or memory ran out: Python wants none for a command
                if self._controller.log_limit.allows():
                    log.warning("%s: queue %d is not lent: %s", self._controller.config.serial, sqid, error)
        return result

    def mark(self, borrower: Borrower) -> None:
        """Have data marked dirty; see `Lender.mark`."""
        lease = self._live[borrower]
        assert lease.memory is not None
        lease.marked = marked = threading.Event()

        def done() -> None:
            borrower.marked()
            marked.set()

        lease.memory.mark(borrower.take_marks(), done)

    def give_back(self, borrower: Borrower) -> None:
        """End a lease; see `Lender.give_back`.

        Who marks may be in an unmap, and answer when that is done: when all memory has come back. So the memory is
        released first. Commands whose data is being marked are in flight without a lease then, as Python's own are
        while they wait for the same, and end on this thread, which may wait. Giving them up is no way: a message that
        is under way may reach memory when the guest has it again.
        """
        with self._lock:
            lease = self._live[borrower]
            marking = borrower.marking()
            after = self._end(lease)
            commands = self._take_over(lease, marking)
        after()
        if commands:
            lease.marked.wait()
            for command in commands:
                command.complete()

    def _take_over(self, lease: Lease, commands: list[tuple[int, bytes]]) -> list[Command]:
        """Return commands that have done all but complete; they are in flight, in the slots that the lease had.

        Those from before a reset too: the guest must not have its memory again while messages are under way to it.
        """
        sq = lease.sq
        sq.cq.reserve(len(commands))
        self._controller.activity.enter(sq, len(commands))
        return [Command(self._controller, sq, sqe, lease.first + order) for order, sqe in commands]

    def step(self, sqid: int, count: int) -> None:
        """Run some commands in Python; see `Lender.step`."""
        self._controller.step(sqid, count)

    def _is_plain(self, sq: SubmissionQueue) -> bool:
        cq = sq.cq
        return (
            self._controller.runs
            and not self._barred
            and not self._controller.doorbells.is_refused(sq)
            and self._controller.doorbells.is_clear(sq)
            and sq.sqid != 0
            and not (sq.held or sq.aborted)
            and cq.reserved <= sq.in_flight
            and cq.sqs == {sq.sqid}
            and (self._controller.interrupts.msix_enabled or not cq.irq_enabled)
        )

    def _begin(self, lease: Lease, terms: LeaseTerms) -> None:
        sq, cq = lease.sq, lease.sq.cq
        if not lease.borrower.lend(terms):
            raise Refused
        lease.first = sq.fetched
        lease.permits = cq.reserve(cq.size)
        sq.borrower = cq.borrower = lease.borrower
        self._controller.activity.enter(sq)
        self._live[lease.borrower] = lease

    def _end(self, lease: Lease) -> Callback:
        """Take the queue pair's positions back; return what the caller must call when it has released the lock."""
        controller, sq, cq = self._controller, lease.sq, lease.sq.cq
        del self._live[lease.borrower]
        lease.borrower.end()
        self._copy(lease)
        controller.doorbells.heard.update({cell_of(sq), cell_of(cq)} & controller.doorbells.late.keys())
        sq.borrower = cq.borrower = None
        cq.release(lease.permits)
        ends: list[Callback] = []
        if sq.epoch == controller.epoch:
            ends = self._keep_failed(lease)
            if lease.borrower.owed:
                controller.notify(cq)
            for sqid in cq.sqs - {sq.sqid}:  # created meanwhile: they waited for room
                controller.engine.kick(sqid)

        def release() -> None:
            lease.release()
            call(ends)
            with self._lock:
                after = controller.activity.leave(sq)
                self._ended.notify_all()
            call(after)

        return release

    def _keep_failed(self, lease: Lease) -> list[Callback]:
        """Have what the disk failed tried again by Python, first of all; return what ends commands that cannot be."""
        controller, sq = self._controller, lease.sq
        lost: list[tuple[int, bytes, Callable[[Command], None]]] = []
        for order, sqe, code in lease.borrower.failed():
            held = HeldCommand(lease.first + order, sqe, ready=True)
            if code:  # asked again, the file would say that all is well
                lost.append((held.order, sqe, functools.partial(_fail, code)))
            elif controller.sqs.get(sq.sqid) is not sq:
                lost.append((held.order, sqe, functools.partial(_refuse, Status.ABORTED_SQ_DELETION)))
            elif held.cid in sq.held:
                lost.append((held.order, sqe, functools.partial(_refuse, Status.COMMAND_ID_CONFLICT)))
            elif not controller.registers.shutdown_status:  # a shutdown drops what is held
                sq.held.add(held)
        count = sq.cq.reserve(len(lost))
        controller.activity.enter(sq, count)
        return [functools.partial(end, Command(controller, sq, sqe, order)) for order, sqe, end in lost[:count]]

    def _copy(self, lease: Lease) -> None:
        """Bring positions and counters up to date here."""
        sq, cq = lease.sq, lease.sq.cq
        fetched = sq.fetched - lease.fetched
        sq.head, sq.tail, cq.head, cq.tail, cq.phase, lease.fetched = lease.borrower.positions()
        sq.fetched = fetched + lease.fetched
        lease.count(self._controller)
        is_tail_late, is_head_late = lease.borrower.late
        for cell, is_late in ((cell_of(sq), is_tail_late), (cell_of(cq), is_head_late)):
            if not is_late:
                self._controller.doorbells.late.pop(cell, None)
        spare = cq.free  # all slots stay given out, whatever the host consumed
        cq.reserve(spare)
        lease.permits += spare

    # --- the controller's side, with the lock held -------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the positions and counters of all that is lent up to date, to be looked at."""
        for lease in self._live.values():
            self._copy(lease)

    def in_flight(self, sq: SubmissionQueue) -> int:
        """Return how many commands of `sq` are under way: a lease is none."""
        return sq.in_flight if sq.borrower is None else sq.in_flight - 1 + sq.borrower.executing

    def revoke(self, *queues: SubmissionQueue) -> list[Callback]:
        """Want `queues`, or all, back: at once or soon. Return what the caller must call after releasing the lock."""
        after: list[Callback] = []
        for lease in self._wanted(queues):
            if lease.borrower.take():
                after.append(self._end(lease))
            else:
                lease.borrower.revoke()
        return after

    def silence(self) -> None:
        """All that is lent is of no interest any more: its interrupts are not sent."""
        for borrower in self._live:
            borrower.mute()

    # --- without the lock, and not for the control thread ------------------------------------------------------------

    @contextlib.contextmanager
    def suspended(self, *queues: SubmissionQueue, timeout: float | None = None) -> Iterator[bool]:
        """Hold while nothing may be lent; on entry none of `queues`, or of all, is: false if that takes too long."""
        is_back = self.bar(*queues, timeout=timeout)
        try:
            yield is_back
        finally:
            self.unbar()

    def reclaim(self, *queues: SubmissionQueue) -> None:
        """Take `queues`, or all, back; those that are not stopped soon are asked for, as by `revoke`.

        Their threads have no part in it, and so this thread has no turns to wait for.
        """
        with self._lock:
            asleep, working = [], []
            for lease in self._wanted(queues):
                if lease.borrower.take():
                    asleep.append(self._end(lease))
                else:
                    lease.borrower.halt()
                    working.append(lease)
        call(asleep)
        until = time.monotonic() + _SOON
        for lease in working:
            lease.borrower.wait_halted(max(0.0, until - time.monotonic()))
        with self._lock:
            after = [self._end(lease) for lease in working if self._is_live(lease) and lease.borrower.take()]
        call(after)

    def _wanted(self, queues: Collection[SubmissionQueue]) -> list[Lease]:
        return [lease for lease in self._live.values() if not queues or lease.sq in queues]

    def _is_live(self, lease: Lease) -> bool:
        return self._live.get(lease.borrower) is lease

    def bar(self, *queues: SubmissionQueue, timeout: float | None = None) -> bool:
        """Lend nothing any more, until `unbar`; wait until none of `queues`, or of all, is lent; return whether so.

        A disk that hangs keeps its queue for as long; `timeout` is in seconds.
        """
        with self._lock:
            self._barred += 1
        self.reclaim(*queues)
        with self._lock:
            return self._ended.wait_for(lambda: not self._wanted(queues), timeout)

    def unbar(self) -> None:
        """Undo one `bar`."""
        with self._lock:
            self._barred -= 1
            for sqid in self._controller.sqs:
                self._controller.engine.kick(sqid)


def _refuse(status: Status, command: Command) -> None:
    command.complete(status, dnr=status is Status.COMMAND_ID_CONFLICT)


def _fail(code: int, command: Command) -> None:
    """What a flush, a write that had to be durable, or any request at an export met with."""
    if command.stale:
        command.complete()
        return
    namespace = command.controller.namespaces.get(command.nsid)
    assert namespace is not None  # it was lent
    operation = _OPERATIONS[command.opcode]
    is_sync = operation is not Operation.READ and (operation is not Operation.WRITE or code == errno.EIO)
    if isinstance(namespace.backend, LendsFile) and is_sync:
        namespace.backend.sync_failed(code)
    with command.controller.lock:
        namespace.counters.fail(operation)
    lba = 0 if operation is Operation.FLUSH else command.cdw11 << 32 | command.cdw10
    failure = Failure(operation, code, lba << namespace.block_shift, namespace.backend)
    failures.backend_failed(command.controller, command, failure)
