"""The way of a command: fetched with a permit, executed, completed. On the engine's threads and the back ends'.

The lock is held only to look at and change state: guest memory and disks are touched with the lock released. What was
fetched before a disable or reset (an older epoch) ends without a trace.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Protocol

from nvmove.nvme import shutdown
from nvmove.nvme.activity import Activity, Callback, call
from nvmove.nvme.commands import admin, io
from nvmove.nvme.commands import command as commands
from nvmove.nvme.commands.command import Command
from nvmove.nvme.doorbells import Doorbells
from nvmove.nvme.errors import CommandError
from nvmove.nvme.held import HeldCommand
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.seams import DmaError
from nvmove.nvme.spec import (
    CQE,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_OCCURRING,
    SQE_SIZE,
    STATUS_DNR,
    STATUS_MORE,
    Status,
)

log = logging.getLogger(__name__)

BATCH = 16
"""Entries fetched at once: a read of 1 KiB costs what a read of 64 bytes costs."""


class Controller(commands.Controller, Protocol):
    """What who runs its queues uses of a controller."""

    @property
    def activity(self) -> Activity:
        """What is in flight."""

    @property
    def doorbells(self) -> Doorbells:
        """Where the doorbells are."""

    def notify(self, cq: CompletionQueue) -> None:
        """Tell the host of completions. With the lock held."""


class Runner:
    """Runs the submission queues of one controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._lock = controller.lock
        self._activity = controller.activity

    def run(self, sqid: int) -> None:
        """Run submission queue `sqid` until it is empty, its completion queue is full, or the controller stops.

        Where its doorbell is in memory, go on looking there for `Engine.poll` seconds after the last command.
        """
        doorbells, poll = self._controller.doorbells, self._controller.engine.poll
        deadline, armed = 0.0, False
        while True:
            in_memory = doorbells.look(sqid)
            worked = self._work(sqid)
            if not in_memory:
                return
            if worked:
                deadline, armed = time.monotonic() + poll, False
            elif armed:
                return
            elif time.monotonic() < deadline:
                os.sched_yield()  # without the GIL; and on few cores the guest may need this one
            else:
                doorbells.arm(sqid)
                armed = True

    def step(self, sqid: int, count: int) -> None:
        """Run at most `count` commands of submission queue `sqid`, and what is held."""
        self._controller.doorbells.look(sqid)
        self._work(sqid, count)

    def _work(self, sqid: int, limit: int | None = None) -> bool:
        """Run what is known to be there, with `limit` no more than so many; return whether there was any of it."""
        worked = False
        left = BATCH if limit is None else limit
        if sqid == 0:
            self._shut_down()
            self._deliver_events()
        while commands := self._take_held(sqid):
            self._run(commands)
            worked = True
        while left and (work := self._start(sqid, min(left, BATCH))) is not None:
            sq, address, count = work
            if limit is not None:
                left -= count
            try:
                entries = self._controller.memory.read(address, count * SQE_SIZE)
            except DmaError:
                self._controller.fatal(f"submission queue {sqid} is not in guest memory")
                self._leave(sq, count)
                return worked
            self._run(self._fetched(sq, count, entries))
            worked = True
        return worked

    def _run(self, commands: list[tuple[Command, bool]]) -> None:
        for command, aborted in commands:
            if command.stale:
                self._leave(command.sq)
            elif aborted:
                command.complete(Status.ABORT_REQUESTED, dnr=False)
            else:
                self._execute(command)

    def _take_held(self, sqid: int) -> list[tuple[Command, bool]]:
        """Take held commands whose turn has come, with permits; they are in flight again from now on."""
        with self._lock:
            sq = self._controller.sqs.get(sqid)
            if sq is None or not self._controller.runs:
                return []
            count = sq.cq.reserve(min(sq.held.ready, BATCH))
            self._activity.enter(sq, count)
            return [(Command(self._controller, sq, held.sqe, held.order), held.aborted) for held in sq.held.take(count)]

    def _start(self, sqid: int, limit: int) -> tuple[SubmissionQueue, int, int] | None:
        """Take permits for the next entries of the queue; they count as in flight from now on."""
        with self._lock:
            sq = self._controller.sqs.get(sqid)
            if sq is None or not self._controller.runs:
                return None
            if sq.held.ready:  # they come first, and wait for room in the completion queue
                return None
            if not self._controller.doorbells.is_clear(sq):
                return None
            count = sq.cq.reserve(min(sq.contiguous, limit))
            if count == 0:
                return None
            self._activity.enter(sq, count)
            return sq, sq.head_address, count

    def _fetched(self, sq: SubmissionQueue, count: int, entries: bytes) -> list[tuple[Command, bool]]:
        """Move the head over what was read, unless the queue or the controller stopped meanwhile."""
        with self._lock:
            if self._controller.sqs.get(sq.sqid) is sq and self._controller.runs:
                order, hits = sq.fetched, sq.advance(count)
                return [
                    (Command(self._controller, sq, entries[n * SQE_SIZE : (n + 1) * SQE_SIZE], order + n), hit)
                    for n, hit in enumerate(hits)
                ]
            sq.cq.release(count)
        self._leave(sq, count)
        return []

    def _execute(self, command: Command) -> None:
        try:
            if command.is_admin:
                admin.execute(self._controller, command)
            else:
                io.execute(self._controller, command)
        except CommandError as error:
            self._log_error(command, error)
            command.complete(error.status, dnr=error.dnr, more=True)
        except Exception:
            if self._controller.log_limit.allows():
                log.exception("%r failed inside nvmove", command)
            command.complete(Status.INTERNAL_ERROR, dnr=False)

    def _log_error(self, command: Command, error: CommandError) -> None:
        """A handler raised `error`: the Error Information log says where in the command it lies."""
        with self._lock:
            if command.stale:
                return
            status = error.status | STATUS_DNR * error.dnr | STATUS_MORE
            self._controller.logs.errors.add(command, status, location=error.location, lba=error.lba)

    def complete(self, command: Command, status: int, result: int, *, dnr: bool, more: bool) -> None:
        """Post `command`'s completion; `Command.complete` says the rest."""
        with self._lock:
            if command.completed:
                log.error("%r was completed twice", command)
                return
            command.completed = True
        if status:
            status |= STATUS_DNR * dnr | STATUS_MORE * more
        self._post(command.sq, command.cid, status, result)

    def _post(self, sq: SubmissionQueue, cid: int, status: int, result: int) -> None:
        """Write a completion into the slot that a permit holds, and tell the host.

        The host may see the entry, and say so by doorbell, before this thread gets further: so the tail moves first.
        """
        controller, cq = self._controller, sq.cq
        with cq.posting:
            with self._lock:
                dead = sq.epoch != controller.epoch or controller.registers.failed
                address, entry = cq.tail_address, CQE.pack(result, sq.head, sq.sqid, cid, status << 1 | cq.phase)
                if not dead:
                    cq.advance()
            if not dead:
                try:
                    controller.memory.write(address, entry)
                except DmaError:
                    controller.fatal(f"completion queue {cq.cqid} is not in guest memory")
                else:
                    with self._lock:
                        if sq.epoch == controller.epoch:
                            controller.notify(cq)
        self._leave(sq)

    def _leave(self, sq: SubmissionQueue | None, count: int = 1) -> None:
        with self._lock:
            after = self._activity.leave(sq, count)
        call(after)

    def hold(self, command: Command, announce: Callback) -> None:
        """Keep `command`, of which nothing is under way any more, to be tried again; it gives all else back.

        `announce`, which must not wait, is called when it is kept and before a pause can end.
        """
        sq = command.sq
        with self._lock:
            fate = self._fate(command)
            if fate is None:
                command.completed = True
                if not self._controller.registers.shutdown_status:  # a shutdown drops what is held
                    sq.held.add(HeldCommand(command.order, command.sqe))
        if not command.stale:
            announce()
        if fate is not None:
            command.complete(fate, dnr=fate is Status.COMMAND_ID_CONFLICT)
            return
        with self._lock:
            sq.cq.release()
            for sqid in sq.cq.sqs:  # they may have waited for room
                self._controller.engine.kick(sqid)
            after = self._activity.leave(sq)
        call(after)

    def _fate(self, command: Command) -> Status | None:
        """Return the status of a command that cannot be held; a stale one completes without a trace."""
        sq = command.sq
        if command.stale:
            return Status.INTERNAL_ERROR
        if self._controller.sqs.get(sq.sqid) is not sq:
            return Status.ABORTED_SQ_DELETION
        if command.cid in sq.held:
            return Status.COMMAND_ID_CONFLICT  # and so there are never more than there are command ids
        return None

    def park(self, command: Command) -> None:
        """Let an Asynchronous Event Request wait: it holds no permit and is not in flight any more."""
        with self._lock:
            command.completed = True
            command.sq.cq.release()
            after = self._activity.leave(command.sq)
        call(after)

    def abort_event_request(self, cid: int) -> bool:
        """Complete the outstanding Asynchronous Event Request `cid` as aborted; return whether there was one."""
        with self._lock:
            sq = self._controller.sqs.get(0)
            if sq is None or not sq.cq.reserve():
                return False
            if not self._controller.events.abort(cid):
                sq.cq.release()
                return False
            self._activity.enter(sq)
        self._post(sq, cid, Status.ABORT_REQUESTED, 0)
        return True

    def _deliver_events(self) -> None:
        while True:
            with self._lock:
                sq = self._controller.sqs.get(0)
                events = self._controller.events
                if sq is None or not self._controller.runs or not events.deliverable or not sq.cq.reserve():
                    return
                cid, event = events.deliver()
                self._activity.enter(sq)
            self._post(sq, cid, Status.SUCCESS, event.kind | event.info << 8 | event.log << 16)

    def _shut_down(self) -> None:
        """CC.SHN, once nothing is in flight: what the write caches hold goes to the disks (Base 3.6)."""
        with self._lock:
            registers = self._controller.registers
            wanted = registers.ready and registers.shutdown_status == CSTS_SHST_OCCURRING and not registers.failed
            if not wanted or self._controller.paused or self._activity.count:
                return
            self._activity.enter()
            epoch = self._controller.epoch

        def flushed() -> None:
            with self._lock:
                if epoch == self._controller.epoch and registers.shutdown_status == CSTS_SHST_OCCURRING:
                    registers.set_shutdown_status(CSTS_SHST_COMPLETE)
            self._leave(None)

        shutdown.flush_all((namespace.backend for namespace in self._controller.namespaces), flushed)
