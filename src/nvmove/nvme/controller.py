"""The controller: registers and doorbells on one side, queues on the other, and the six verbs.

Two kinds of thread meet here. The control thread calls `read` and `write`, which take the lock for a moment and never
touch guest memory. The workers of the engine call `run`, which fetches and executes; completions come from them or from
the back ends. Everything in flight is counted, and what must not overtake it (disable, reset, a queue's deletion) waits
for the count as a callback, never as a thread.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from nvmove.block.backend import Backend
from nvmove.block.policy import DriveErrors, ErrorReport
from nvmove.nvme.activity import Activity, Callback, call
from nvmove.nvme.commands.command import Command
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.doorbell_registers import DoorbellRegisters
from nvmove.nvme.doorbells import Doorbells
from nvmove.nvme.enabling import Enabling
from nvmove.nvme.errors import StateError
from nvmove.nvme.events import EventQueue
from nvmove.nvme.features import Features
from nvmove.nvme.leases import Leases
from nvmove.nvme.logs import Logs
from nvmove.nvme.namespace import NamespaceTable
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.ratelimit import RateLimit
from nvmove.nvme.registers import Registers
from nvmove.nvme.runner import Runner
from nvmove.nvme.seams import Engine, Interrupts, Memory
from nvmove.nvme.spec import (
    CC_WRITABLE,
    CSTS_CFS,
    CSTS_SHST_OCCURRING,
    PAGE,
    REGISTER_END,
    EventType,
    Log,
    Register,
    Status,
)
from nvmove.nvme.state import checks, saving
from nvmove.nvme.state.saved import ControllerState

log = logging.getLogger(__name__)

UNLIMITED = 1 << 62


class Controller:
    """One NVMe controller. `clock` gives seconds that only grow: for timestamps and power-on hours."""

    def __init__(
        self,
        config: ControllerConfig,
        backends: Mapping[str, Backend],
        memory: Memory,
        interrupts: Interrupts,
        engine: Engine,
        clock: Callable[[], float] = time.monotonic,
        *,
        errors: Mapping[str, DriveErrors] | None = None,
        on_error: Callable[[ErrorReport], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.memory = memory
        self.interrupts = interrupts
        self.engine = engine
        self.lock = threading.RLock()
        self.activity = Activity(self.lock)
        self.registers = Registers(config)
        self.sqs: dict[int, SubmissionQueue] = {}
        self.cqs: dict[int, CompletionQueue] = {}
        self.paused = False
        self.resetting = 0
        """Disables and resets that wait for what is in flight."""
        self.epoch = 0
        """Counts disables and resets: a command of an earlier epoch completes without a trace."""
        self.events = EventQueue(config.aerl + 1, config.aer_max_queued)
        self.errors = errors or {}
        self.on_error = on_error or (lambda _report: None)
        self.on_wait = on_wait or (lambda: None)
        """Called when the guest begins to wait, by a clock of its own, for what a disk has: see `waits`."""
        self._deleting = 0
        """Submission queues whose deletion waits for what is in flight."""
        self._aborting: set[SubmissionQueue] = set()
        """Queues of which an Abort found nothing, though something is in flight."""
        self.namespaces = NamespaceTable(config, backends)
        self.features = Features(config, clock)
        self.logs = Logs(config, clock)
        self.log_limit = RateLimit(clock)
        self.doorbells = Doorbells(self)
        self.leases = Leases(self)
        runner, self._enabling, self._doorbell_registers = Runner(self), Enabling(self), DoorbellRegisters(self)
        self.run, self.step, self.abort_event_request = runner.run, runner.step, runner.abort_event_request
        self.complete, self.hold, self.park = runner.complete, runner.hold, runner.park
        engine.bind(self.run, self.leases)

    # --- what others ask ---------------------------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether commands are fetched now."""
        return not self.paused and not self.resetting and self.registers.runs

    @property
    def held(self) -> int:
        """Commands that failed and wait to be tried again at `resume`."""
        with self.lock:
            return sum(len(sq.held) for sq in self.sqs.values())

    @property
    def waits(self) -> bool:
        """Whether the guest waits for what a disk has of it: a disable, a deletion, a shutdown, an aborted command.

        A host gives such a thing a minute or less, and then the controller up (Linux: 30 s to an Abort, CAP.TO to RDY).
        """
        with self.lock:
            self._aborting = {sq for sq in self._aborting if self.leases.in_flight(sq)}
            shutting_down = self.registers.shutdown_status == CSTS_SHST_OCCURRING
            return bool(self.resetting or self._deleting or self._aborting or shutting_down)

    def abort_failed(self, sq: SubmissionQueue) -> None:
        """An Abort of the guest's did not find its command in `sq`: it may be at a disk."""
        with self.lock:
            if self.leases.in_flight(sq):
                self._aborting.add(sq)
                self.on_wait()

    @property
    def page_size(self) -> int:
        """Memory page size in bytes."""
        return self.registers.page_size

    @property
    def max_transfer(self) -> int:
        """The largest transfer of one command in bytes (Identify's MDTS, in units of CAP.MPSMIN)."""
        return PAGE << self.config.mdts if self.config.mdts else UNLIMITED

    # --- registers and doorbells, on the control thread --------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read `size` bytes of BAR0 at `offset`; doorbells read as zero."""
        with self.lock:
            return self.registers.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes of BAR0 at `offset`, registers or doorbells; what makes no sense is ignored."""
        after: list[Callback] = []
        with self.lock:
            if offset >= REGISTER_END:
                self._doorbell_registers.write(offset, size, value)
            elif size == 4 and offset == Register.INTMS:
                self._mask(self.registers.intms | value)
            elif size == 4 and offset == Register.INTMC:
                self._mask(self.registers.intms & ~value)
            elif size == 4 and offset == Register.CC:
                after = self._enabling.write_cc(value & CC_WRITABLE)
            elif self.registers.enabled:
                pass  # the admin queues are fixed while enabled
            elif size == 4 and offset == Register.AQA:
                self.registers.write_aqa(value)
            elif Register.ASQ <= offset < Register.ACQ + 8 and offset % size == 0 and size in {4, 8}:
                self.registers.write_address(offset, size, value)
        call(after)

    def _mask(self, mask: int) -> None:
        """INTMS, INTMC: undefined with MSI-X (PCIe 3.1.1), so ignored."""
        if not self.interrupts.msix_enabled:
            self.registers.intms = mask & 0xFFFF_FFFF
            self.drive_pin()

    def start_reset(self, done: Callable[[], Callback | None]) -> list[Callback]:
        """Drop the queues; `done` runs when nothing is in flight. Until then RDY stays and nothing is fetched."""
        self.epoch += 1
        self.resetting += 1
        for sqid in list(self.sqs):
            self.engine.detach(sqid)
        self.sqs.clear()
        self.cqs.clear()
        self.doorbells.reset()
        self.events.reset()
        self.drive_pin()
        self.leases.silence()

        def settled() -> Callback | None:
            self.resetting -= 1
            return done()

        after = [*self.activity.when_idle(settled), *self.leases.revoke()]
        if self.resetting:
            self.on_wait()
        return after

    def fatal(self, why: str) -> None:
        """Controller Fatal Status (Base 9.5): the host has to reset the controller."""
        with self.lock:
            if not self.registers.failed and self.log_limit.allows():
                log.warning("%s: controller fatal status: %s", self.config.serial, why)
            self.registers.csts |= CSTS_CFS
            after = self.leases.revoke()
        call(after)

    def woken(self, queue: SubmissionQueue | CompletionQueue) -> None:
        """The queue's doorbell has changed in memory. With the lock held."""
        if isinstance(queue, SubmissionQueue):
            self.engine.kick(queue.sqid)
        elif queue.free <= 0 or not self.interrupts.msix_enabled:  # otherwise nobody waits for the host
            for sqid in queue.sqs or {0}:
                self.engine.kick(sqid)

    def head_moved(self, cq: CompletionQueue, was_full: bool) -> None:
        """The host has consumed completions. With the lock held."""
        self.drive_pin()
        if was_full:
            for sqid in cq.sqs:
                self.engine.kick(sqid)

    # --- queues, by the guest's commands and by load alike -----------------------------------------------------------

    def create_cq(self, cq: CompletionQueue) -> None:
        """Add a completion queue that was checked."""
        self.cqs[cq.cqid] = cq
        self.doorbells.created(cq)

    def create_sq(self, sq: SubmissionQueue) -> None:
        """Add a submission queue that was checked; its worker is there on return. Raises OSError: there is none."""
        self.engine.attach(sq.sqid)
        sq.epoch = self.epoch
        self.sqs[sq.sqid] = sq
        self.doorbells.created(sq)
        sq.cq.sqs.add(sq.sqid)

    def delete_cq(self, cq: CompletionQueue) -> None:
        """Remove a completion queue that no submission queue uses."""
        del self.cqs[cq.cqid]
        self.doorbells.deleted(cq)
        self.drive_pin()

    def delete_sq(self, sq: SubmissionQueue, done: Callback) -> list[Callback]:
        """Stop fetching from a queue and remove it; held commands complete as aborted, as long as there is room.

        `done` is called when nothing of it is in flight, on a thread that may post completions, without the lock.
        Returns what the caller must call when it has released the lock.
        """
        after = self.leases.revoke(sq)
        self.engine.detach(sq.sqid)
        del self.sqs[sq.sqid]
        self.doorbells.deleted(sq)
        sq.cq.sqs.discard(sq.sqid)
        # Such completions are a courtesy (Base 5.7): what finds the completion queue full does without.
        count = sq.cq.reserve(len(sq.held))
        self.activity.enter(sq, count)
        orphans = [Command(self, sq, held.sqe, held.order) for held in itertools.islice(sq.held, count)]
        sq.held.clear()
        if not sq.in_flight:
            return [done]
        self._deleting += 1

        def deleted() -> None:
            with self.lock:
                self._deleting -= 1
            done()

        sq.on_idle = deleted
        self.on_wait()
        return after + [functools.partial(orphan.complete, Status.ABORTED_SQ_DELETION, dnr=False) for orphan in orphans]

    # --- commands and events -----------------------------------------------------------------------------------------

    def abort_held(self, sq: SubmissionQueue, cid: int) -> bool:
        """Let the held command `cid` of `sq` complete as aborted; return whether there was one."""
        with self.lock:
            found = sq.held.abort(cid)
            if found:
                self.engine.kick(sq.sqid)
            return found

    def raise_event(self, kind: EventType, info: int, page: Log) -> None:
        """Queue an asynchronous event; the admin queue's worker delivers it. From any thread."""
        with self.lock:
            if self.registers.ready and not self.resetting and self.events.add(kind, info, page):
                self.engine.kick(0)

    # --- interrupts --------------------------------------------------------------------------------------------------

    @property
    def irq_status(self) -> int:
        """The vectors, as bits, that have completions the host has not consumed."""
        return sum({1 << cq.vector for cq in self.cqs.values() if cq.irq_enabled and not cq.is_empty})

    def notify(self, cq: CompletionQueue) -> None:
        """Tell the host of completions on `cq`. With the lock held."""
        if not self.interrupts.msix_enabled:
            self.drive_pin()
        elif cq.irq_enabled:
            self.interrupts.signal(cq.vector)

    def drive_pin(self) -> None:
        """Set INTx to what the completion queues and INTMS say. With the lock held."""
        if not self.interrupts.msix_enabled:
            self.interrupts.set_level(bool(self.irq_status & ~self.registers.intms))

    # --- the six verbs -----------------------------------------------------------------------------------------------

    def reset(self, done: Callback) -> None:
        """Function-level reset; `done`, which must not wait, when nothing of before can touch guest memory any more.

        A paused controller stays paused.
        """
        with self.lock:

            def finished() -> Callback:
                self.registers.reset()
                self.features.reset()
                self.namespaces.reset()
                return done

            self.registers.cc = 0
            after = self.start_reset(finished)
        call(after)

    def pause(self, timeout: float | None = None) -> bool:
        """Stop fetching and wait until nothing is in flight; return whether that came within `timeout` seconds.

        Not for the control thread.
        """
        with self.lock:
            self.paused = True
        self.leases.reclaim()
        with self.lock:
            return self.activity.wait(timeout)

    def resume(self) -> None:
        """Go on after `pause`: look at every submission queue's tail again, signal every vector with work.

        What is held is tried again, first of all, and also when the VM was not paused in between: a stop that a failure
        asked for may have been overtaken.
        """
        with self.lock:
            for sq in self.sqs.values():
                sq.held.let_go()
            if not self.paused:
                self.kick_all()
                return
            self.paused = False
            self.drive_pin()
            for cq in self.cqs.values():
                if not cq.is_empty:
                    self.notify(cq)
            self.kick_all()

    def kick_all(self) -> None:
        """Let every submission queue's worker look. With the lock held."""
        for sqid in self.sqs:
            self.engine.kick(sqid)

    def save(self) -> ControllerState:
        """Return all of the state. The controller must be paused and idle; raises RuntimeError otherwise."""
        with self.lock:
            self._require_idle("save")
            self.doorbells.take_page()
            return saving.save(self)

    def load(self, state: ControllerState) -> None:
        """Take `state` over; the controller must be paused and idle, and stays paused.

        Raises StateError, which names the field, before anything is touched; or, with the controller as after a reset,
        where there is no thread for a queue.
        """
        with self.lock:
            self._require_idle("load")
            checks.check(self, state)
            call(self.start_reset(lambda: None))
            try:
                saving.load(self, state)
            except OSError as error:
                self.reset(lambda: None)
                raise StateError(f"a submission queue has no worker: {error.strerror}") from None

    def _require_idle(self, verb: str) -> None:
        if not self.paused or self.activity.count:
            raise RuntimeError(f"{verb} of a controller that is not paused and idle")

    def inspect(self) -> dict[str, Any]:
        """Return what the controller is and does now, as a tree of plain values; also while it runs."""
        with self.lock:
            return saving.inspect(self)
