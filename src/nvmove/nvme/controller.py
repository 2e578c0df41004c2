"""The controller: registers and doorbells on one side, queues and completions on the other.

Two kinds of thread meet here. The control thread calls `read` and `write`, which take the lock for a moment and
never touch guest memory. The workers of the engine call `run`, which fetches and executes; completions come from them
or from the back ends. Everything in flight is counted, and what must not overtake it (disable, reset, a queue's
deletion, a pause) waits for the count as a callback, never as a thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from nvmove.block.backend import Backend
from nvmove.nvme import admin, io, shutdown
from nvmove.nvme.command import Command
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.errors import CommandError
from nvmove.nvme.events import EventQueue
from nvmove.nvme.features import Features
from nvmove.nvme.logs import Logs
from nvmove.nvme.namespace import NamespaceTable
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.registers import Registers
from nvmove.nvme.seams import DmaError, Engine, Interrupts, Memory
from nvmove.nvme.spec import (
    CC_EN,
    CC_SHN,
    CC_WRITABLE,
    CQE,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_OCCURRING,
    DOORBELL_STRIDE,
    DOORBELLS,
    EVENT_INVALID_DOORBELL_REGISTER,
    EVENT_INVALID_DOORBELL_VALUE,
    PAGE,
    REGISTER_END,
    SQE_SIZE,
    STATUS_DNR,
    STATUS_MORE,
    EventType,
    Log,
    Register,
    Status,
)

log = logging.getLogger(__name__)

ADMIN_VECTOR = 0


class Controller:
    """One NVMe controller."""

    def __init__(
        self,
        config: ControllerConfig,
        backends: Mapping[str, Backend],
        memory: Memory,
        interrupts: Interrupts,
        engine: Engine,
    ) -> None:
        self.config = config
        self.memory = memory
        self.interrupts = interrupts
        self.engine = engine
        self.lock = threading.RLock()
        self._idle = threading.Condition(self.lock)
        self.registers = Registers(config)
        self.sqs: dict[int, SubmissionQueue] = {}
        self.cqs: dict[int, CompletionQueue] = {}
        self.irq_status = 0
        self.paused = False
        self.in_flight = 0
        """Commands fetched and not completed, and other work that may touch guest memory, over all queues."""
        self.epoch = 0
        """Counts disables and resets: a command of an earlier epoch completes without a trace."""
        self._when_idle: list[Callable[[], None]] = []
        self.events = EventQueue(config.aerl + 1, config.aer_max_queued)
        self.namespaces = NamespaceTable(config, backends)
        self.features = Features(config)
        self.logs = Logs(config)

    # --- registers and doorbells, on the control thread --------------------------------------------------------------

    @property
    def page_size(self) -> int:
        """Memory page size in bytes."""
        return self.registers.page_size

    @property
    def max_transfer(self) -> int:
        """The largest transfer of one command in bytes (Identify's MDTS, in units of CAP.MPSMIN)."""
        return PAGE << self.config.mdts if self.config.mdts else 1 << 62

    def read(self, offset: int, size: int) -> int:
        """Read `size` bytes of BAR0 at `offset`; doorbells read as zero."""
        with self.lock:
            return self.registers.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes of BAR0 at `offset`, registers or doorbells; what makes no sense is ignored."""
        with self.lock:
            if offset >= REGISTER_END:
                self._doorbell(offset, size, value)
            elif offset == Register.INTMS:
                self._mask(self.registers.intms | value)
            elif offset == Register.INTMC:
                self._mask(self.registers.intms & ~value)
            elif offset == Register.CC:
                self._write_cc(value & CC_WRITABLE)
            elif offset == Register.AQA:
                self.registers.aqa = value & 0x0FFF_0FFF
            elif Register.ASQ <= offset < Register.ACQ + 8 and offset % 4 == 0 and size in {4, 8}:
                self.registers.write_address(offset, size, value)

    def _mask(self, mask: int) -> None:
        if not self.interrupts.msix_enabled:
            self.registers.intms = mask & 0xFFFF_FFFF
            self._drive_pin()

    def _write_cc(self, value: int) -> None:
        was_enabled = self.registers.enabled
        had_shutdown = self.registers.shutdown_notification
        if was_enabled and value & CC_EN:  # all but the shutdown notification is fixed while enabled
            value = self.registers.cc & ~CC_SHN | value & CC_SHN
        self.registers.cc = value
        if was_enabled and not value & CC_EN:
            self._disable()
        elif not was_enabled and value & CC_EN:
            self._enable()
        if self.registers.shutdown_notification and not had_shutdown:
            self._shut_down()

    def _enable(self) -> None:
        if self._when_idle:  # the disable before is still waiting for what is in flight; it looks at CC.EN when done
            return
        fault = self.registers.enable_fault()
        if fault:
            self.fail(fault)
            return
        sq_size, cq_size = self.registers.admin_sizes
        self.create_cq(CompletionQueue(0, self.registers.acq, cq_size, ADMIN_VECTOR, irq_enabled=True))
        self.create_sq(SubmissionQueue(0, self.cqs[0], self.registers.asq, sq_size))
        self.registers.csts |= CSTS_RDY

    def _disable(self) -> None:
        """Controller Level Reset by CC.EN: nothing is fetched from now on; RDY falls when nothing is in flight."""
        self._drop_queues()

        def done() -> None:
            self.registers.disable()
            self.features.reset()
            self.namespaces.reset()
            if self.registers.enabled:
                self._enable()

        self.when_idle(done)

    def _drop_queues(self) -> None:
        self.epoch += 1
        for sqid in list(self.sqs):
            self.engine.detach(sqid)
        self.sqs.clear()
        self.cqs.clear()
        self.events.reset()
        self.irq_status = 0
        self._drive_pin()

    def _shut_down(self) -> None:
        """CC.SHN: what the write cache holds goes to the disks; it is the admin queue's worker that does it."""
        self.registers.csts = self.registers.csts & ~CSTS_SHST | CSTS_SHST_OCCURRING
        if 0 in self.sqs:
            self.engine.kick(0)
        else:
            self._shutdown_complete()

    def _shutdown_complete(self) -> None:
        if self.registers.shutdown_notification:
            self.registers.csts = self.registers.csts & ~CSTS_SHST | CSTS_SHST_COMPLETE

    def fail(self, why: str) -> None:
        """Controller Fatal Status (Base 9.5): the host has to reset the controller."""
        with self.lock:
            if not self.registers.csts & CSTS_CFS:
                log.warning("%s: controller fatal status: %s", self.config.serial, why)
            self.registers.csts |= CSTS_CFS

    def _doorbell(self, offset: int, size: int, value: int) -> None:
        index, rest = divmod(offset - DOORBELLS, DOORBELL_STRIDE)
        if not self.registers.ready or self.registers.csts & CSTS_CFS:
            return
        if rest or size != DOORBELL_STRIDE:
            self._doorbell_error(EVENT_INVALID_DOORBELL_REGISTER)
            return
        qid, is_cq = divmod(index, 2)
        if is_cq:
            self._cq_doorbell(qid, value)
        else:
            self._sq_doorbell(qid, value)

    def _sq_doorbell(self, sqid: int, value: int) -> None:
        sq = self.sqs.get(sqid)
        if sq is None:
            self._doorbell_error(EVENT_INVALID_DOORBELL_REGISTER)
        elif value >= sq.size:
            self._doorbell_error(EVENT_INVALID_DOORBELL_VALUE)
        else:
            sq.tail = value
            self.engine.kick(sqid)

    def _cq_doorbell(self, cqid: int, value: int) -> None:
        cq = self.cqs.get(cqid)
        if cq is None:
            self._doorbell_error(EVENT_INVALID_DOORBELL_REGISTER)
            return
        if value >= cq.size or (value - cq.head) % cq.size > cq.used:
            self._doorbell_error(EVENT_INVALID_DOORBELL_VALUE)
            return
        was_full = cq.used + cq.reserved >= cq.size - 1
        cq.head = value
        self._update_irq(cq)
        if was_full:
            for sqid in cq.sqs:
                self.engine.kick(sqid)

    def _doorbell_error(self, info: int) -> None:
        self.raise_event(EventType.ERROR, info, Log.ERROR_INFORMATION)

    # --- queues, by the guest's commands and by load alike -----------------------------------------------------------

    def create_cq(self, cq: CompletionQueue) -> None:
        """Add a completion queue that was checked."""
        self.cqs[cq.cqid] = cq

    def create_sq(self, sq: SubmissionQueue) -> None:
        """Add a submission queue that was checked; its worker is there on return."""
        sq.epoch = self.epoch
        self.sqs[sq.sqid] = sq
        sq.cq.sqs.add(sq.sqid)
        self.engine.attach(sq.sqid)

    def delete_cq(self, cq: CompletionQueue) -> None:
        """Remove a completion queue that no submission queue uses."""
        del self.cqs[cq.cqid]
        cq.head = cq.tail
        self._update_irq(cq)

    def delete_sq(self, sq: SubmissionQueue, done: Callable[[], None]) -> bool:
        """Stop fetching from a queue and remove it.

        Returns whether nothing of it is in flight; where something is, `done` is called when that is over, on a thread
        that may post completions, without the lock.
        """
        self.engine.detach(sq.sqid)
        del self.sqs[sq.sqid]
        sq.cq.sqs.discard(sq.sqid)
        if sq.in_flight:
            sq.on_idle = done
        return not sq.in_flight

    # --- running commands, on the engine's threads -------------------------------------------------------------------

    def run(self, sqid: int) -> None:
        """Run submission queue `sqid` until it is empty, its completion queue is full, or the controller pauses."""
        if sqid == 0:
            self._run_admin_work()
        while (sq := self._start(sqid)) is not None:
            try:
                sqe = self.memory.read(sq.next_address, SQE_SIZE)
            except DmaError:
                self.fail(f"submission queue {sqid} is not in guest memory")
                self._retire(sq, None)
                return
            with self.lock:
                sq.advance()
                command = Command(self, sq, sqe)
                is_aborted = command.cid in sq.aborted
                sq.aborted.discard(command.cid)
            if is_aborted:
                command.complete(Status.ABORT_REQUESTED, dnr=False)
            else:
                self._execute(command)

    def _may_run(self) -> bool:
        return not self.paused and self.registers.ready and not self.registers.csts & CSTS_CFS

    def _start(self, sqid: int) -> SubmissionQueue | None:
        """Take a permit for one command of the queue: a completion slot, and a place among those in flight."""
        with self.lock:
            sq = self.sqs.get(sqid)
            if sq is None or sq.is_empty or not self._may_run() or not sq.cq.reserve():
                return None
            sq.in_flight += 1
            self.in_flight += 1
            return sq

    def _execute(self, command: Command) -> None:
        try:
            if command.is_admin:
                admin.execute(self, command)
            else:
                io.execute(self, command)
        except CommandError as error:
            command.complete(error.status, dnr=error.dnr)
        except Exception:
            log.exception("%r failed inside nvmove", command)
            command.complete(Status.INTERNAL_ERROR, dnr=False)

    def complete(self, command: Command, status: Status, result: int, *, dnr: bool, more: bool) -> None:
        """Post `command`'s completion; `Command.complete` says the rest."""
        with self.lock:
            if command.completed:
                log.error("%r was completed twice", command)
                return
            command.completed = True
            if command.sq.epoch != self.epoch:
                self._retire(command.sq, None)
                return
            bits = status | (STATUS_DNR * dnr | STATUS_MORE * more if status else 0)
            address, entry = self._next_entry(command.sq, command.cid, bits, result)
        self._post(command.sq, address, entry)

    def _next_entry(self, sq: SubmissionQueue, cid: int, bits: int, result: int) -> tuple[int, bytes]:
        address, phase = sq.cq.take()
        return address, CQE.pack(result, 0, sq.head, sq.sqid, cid, bits << 1 | phase)

    def _post(self, sq: SubmissionQueue, address: int, entry: bytes) -> None:
        try:
            self.memory.write(address, entry)
        except DmaError:
            self.fail(f"completion queue {sq.cq.cqid} is not in guest memory")
            self._retire(sq, None)
        else:
            self._retire(sq, sq.cq)

    def _retire(self, sq: SubmissionQueue, posted: CompletionQueue | None) -> None:
        """One thing less in flight; where a completion was posted, the host is told."""
        deleted: Callable[[], None] | None = None
        with self.lock:
            if posted is not None and self.cqs.get(posted.cqid) is posted:
                self._update_irq(posted)
            sq.in_flight -= 1
            if sq.in_flight == 0:
                deleted, sq.on_idle = sq.on_idle, None
            self.in_flight -= 1
            if self.in_flight == 0:
                self._became_idle()
        if deleted is not None:
            deleted()

    def park(self, command: Command) -> None:
        """Let an Asynchronous Event Request wait: it holds no slot and is not in flight any more."""
        with self.lock:
            command.completed = True
            if command.sq.epoch == self.epoch:
                command.sq.cq.release()
            self._retire(command.sq, None)

    # --- events and shutdown, the admin worker's other work ----------------------------------------------------------

    def abort_event_request(self, cid: int) -> bool:
        """Complete the outstanding Asynchronous Event Request `cid` as aborted; return whether there was one."""
        with self.lock:
            sq = self.sqs[0]
            if not self.events.abort(cid) or not sq.cq.reserve():
                return False
            sq.in_flight += 1
            self.in_flight += 1
            address, entry = self._next_entry(sq, cid, Status.ABORT_REQUESTED, 0)
        self._post(sq, address, entry)
        return True

    def raise_event(self, kind: EventType, info: int, page: Log) -> None:
        """Queue an asynchronous event; the admin queue's worker delivers it. From any thread."""
        with self.lock:
            if self.registers.ready and self.events.add(kind, info, page):
                self.engine.kick(0)

    def _run_admin_work(self) -> None:
        with self.lock:
            wanted = self._may_run() and self.registers.csts & CSTS_SHST == CSTS_SHST_OCCURRING
            if wanted:
                self.in_flight += 1
        if wanted:
            shutdown.flush_all((namespace.backend for namespace in self.namespaces), self._flushed)
        while self._deliver_event():
            pass

    def _flushed(self) -> None:
        with self.lock:
            self._shutdown_complete()
            self.in_flight -= 1
            if self.in_flight == 0:
                self._became_idle()

    def _deliver_event(self) -> bool:
        with self.lock:
            sq = self.sqs.get(0)
            if sq is None or not self._may_run() or not self.events.deliverable or not sq.cq.reserve():
                return False
            cid, event = self.events.deliver()
            sq.in_flight += 1
            self.in_flight += 1
            result = event.kind | event.info << 8 | event.log << 16
            address, entry = self._next_entry(sq, cid, Status.SUCCESS, result)
        self._post(sq, address, entry)
        return True

    # --- interrupts --------------------------------------------------------------------------------------------------

    def _update_irq(self, cq: CompletionQueue) -> None:
        """Tell the host of completions on `cq` that it has not consumed, or stop telling it."""
        if not cq.irq_enabled:
            return
        if not cq.is_empty:
            if self.interrupts.msix_enabled:
                self.interrupts.signal(cq.vector)
            else:
                self.irq_status |= 1 << cq.vector
        elif not any(
            not other.is_empty and other.vector == cq.vector for other in self.cqs.values() if other.irq_enabled
        ):
            self.irq_status &= ~(1 << cq.vector)
        self._drive_pin()

    def _drive_pin(self) -> None:
        if not self.interrupts.msix_enabled:
            self.interrupts.set_level(bool(self.irq_status & ~self.registers.intms))

    # --- idle, pause, reset ------------------------------------------------------------------------------------------

    def when_idle(self, done: Callable[[], None]) -> None:
        """Call `done`, with the lock held, as soon as nothing is in flight: now, or on the last one's thread."""
        with self.lock:
            self._when_idle.append(done)
            if self.in_flight == 0:
                self._became_idle()

    def _became_idle(self) -> None:
        while self._when_idle:
            waiting, self._when_idle = self._when_idle, []
            for done in waiting:
                done()
        self._idle.notify_all()

    def pause(self, timeout: float | None = None) -> bool:
        """Stop fetching and wait until nothing is in flight; return whether that came within `timeout` seconds.

        Not for the control thread.
        """
        with self.lock:
            self.paused = True
            return self._idle.wait_for(lambda: self.in_flight == 0, timeout)

    def resume(self) -> None:
        """Go on after `pause`: look at every submission queue's tail again, signal every vector with work."""
        with self.lock:
            if not self.paused:
                return
            self.paused = False
            for cq in self.cqs.values():
                self._update_irq(cq)
            for sqid in self.sqs:
                self.engine.kick(sqid)

    def reset(self, done: Callable[[], None]) -> None:
        """Function-level reset; `done` when nothing of before can touch guest memory. A paused controller stays so."""
        with self.lock:
            self._drop_queues()
            self.registers.cc = 0

            def finish() -> None:
                self.registers.reset()
                self.features.reset()
                self.namespaces.reset()
                done()

            self.when_idle(finish)
