"""Where doorbell values come from, and how the host is told when it must ring.

A doorbell's value reaches the controller on one of three ways (`nvmove.nvme.cells.Place`):

    MESSAGE   every write of the register comes to `Controller.write`, and goes into the ring at once
    PAGE      `x-doorbells=mapped`: the client has mapped the registers and writes them unseen. Workers look there as
              long as they are busy; for those that sleep somebody calls `scan` now and then
    GUEST     Doorbell Buffer Config (Base 5.8): the guest writes a page of its own, the shadow doorbells, and the
              register only when it steps over the queue's entry in a second page, EventIdx

With GUEST a write of the register is a wake-up and nothing more: what it says may be older than what the shadow says.
Nothing is missed, because a worker that goes to sleep first writes to EventIdx how far it has looked, and then looks
once more (`arm`, `look`); the guest writes its shadow first and then reads EventIdx. While a worker is awake EventIdx
lags behind, so that the guest does not ring.

A queue that existed before the command is GUEST only from the first value on that the guest puts into its shadow. Until
then (`late`) its register counts: doorbells rung while the command ran, and the admin queue's, which Linux never moves.
The first step in the shadow is always rung, and looked at before anything is built on the register's value (`heard`):
later the shadow may have come round to the value that says "not used yet".
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from nvmove.nvme import core
from nvmove.nvme.activity import Activity, call
from nvmove.nvme.cells import CELL, MESSAGE, Place, Ring, Source, cell_of, position
from nvmove.nvme.errors import CommandError
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.seams import DmaError
from nvmove.nvme.spec import EVENT_INVALID_DOORBELL_VALUE, EventType, Log, Status
from nvmove.nvme.state.saved import DoorbellsState, LateState


class _Watch(NamedTuple):
    """What a worker looks at: its queue and others, and the buffers of that moment."""

    sq: SubmissionQueue
    rings: list[Ring]
    dbs: int
    eis: int


class Fetched(Protocol):
    """The command that configures doorbells in memory."""

    @property
    def stale(self) -> bool:
        """Whether the controller was disabled or reset since it was fetched."""


class Controller(core.Controller, Protocol):
    """What doorbells use of their controller."""

    @property
    def activity(self) -> Activity:
        """What is in flight."""

    def woken(self, queue: Ring) -> None:
        """A queue's doorbell has changed in memory. With the lock held."""

    def head_moved(self, cq: CompletionQueue, was_full: bool) -> None:
        """The host has consumed completions. With the lock held."""


class Doorbells:
    """The doorbells of one controller. What says so wants its lock; the rest is for the queues' workers, without it."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._lock = controller.lock
        self._fence = threading.Lock()
        self.page: memoryview | None = None
        """PAGE: the cells, as unsigned integers of 32 bits."""
        self._seen = memoryview(b"")
        """What of the page the workers have looked at."""
        self.writes = 0
        """Doorbell registers written by message since the controller exists."""
        self.reset()

    def reset(self) -> None:
        """No shadow doorbells. With the lock."""
        self.dbs = self.eis = 0
        self.late: dict[int, int] = {}
        """Cells that the host has not used yet, and what this controller has put there."""
        self.heard: set[int] = set()
        """Late cells whose register was written: a worker has to look whether the host has moved."""
        self._refused: dict[int, int] = {}

    @property
    def offered(self) -> bool:
        """Whether the guest may have shadow doorbells: not with INTx.

        QEMU lowers a vfio device's pin when the guest touches the BAR; a guest that does not ring never gets it low.
        """
        return self._controller.config.dbcs and not self._controller.interrupts.uses_pin

    @property
    def enabled(self) -> bool:
        """Whether the guest has configured shadow doorbells: one buffer has address `dbs`, the other `eis`."""
        return bool(self.dbs)

    @property
    def in_memory(self) -> bool:
        """Whether some queues' doorbells are in memory."""
        return self.enabled or self.page is not None

    @property
    def cells(self) -> int:
        """Cells in memory: those of all possible queues, as far as they fit in one memory page of the guest."""
        controller = self._controller
        if self.page is not None:
            return len(self.page)
        return min(2 * (controller.config.max_ioqpairs + 1), controller.page_size // CELL)

    def source(self, qid: int, is_cq: bool) -> Source:
        """Return where the doorbell of a queue is. With the lock."""
        cell = 2 * qid + is_cq
        if self.page is not None:
            cells = (ctypes.c_uint32.from_buffer(memory, CELL * cell) for memory in (self.page, self._seen))
            return Source(Place.PAGE, *map(ctypes.addressof, cells))
        if not self.enabled or cell in self.late or cell >= self.cells:
            return MESSAGE
        return Source(Place.GUEST, self.dbs + CELL * cell, self.eis + CELL * cell)

    # --- Doorbell Buffer Config --------------------------------------------------------------------------------------

    def configure(self, command: Fetched, dbs: int, eis: int) -> None:
        """Put the doorbells' values into both buffers, and look there from now on; raise CommandError."""
        with self._controller.leases.suspended():
            self._configure(command, dbs, eis)

    def _configure(self, command: Fetched, dbs: int, eis: int) -> None:
        controller = self._controller
        if self.enabled:  # what is in the old buffers counts; the command is in flight, so they are there
            for ring in [ring for ring in self._rings() if cell_of(ring) < self.cells]:
                self._update(ring, self.dbs)
        with self._lock:
            values = {cell_of(ring): position(ring) for ring in self._rings()}
        image = b"".join(values.get(cell, 0).to_bytes(CELL, "little") for cell in range(self.cells))
        self._store(image, dbs, eis)
        with self._lock:
            if command.stale:
                raise CommandError(Status.ABORT_REQUESTED)
            self.reset()
            self.dbs, self.eis = dbs, eis
            self.late = {cell: value for cell, value in values.items() if cell < self.cells}
            for sqid in controller.sqs:
                controller.engine.kick(sqid)

    def clear(self, qid: int, is_cq: bool) -> None:
        """A queue is about to be created: nothing was rung for it; raise CommandError."""
        cell = 2 * qid + is_cq
        with self._lock:
            if not self.enabled or cell >= self.cells:
                return
            dbs, eis = self.dbs, self.eis
        self._store(bytes(CELL), dbs + CELL * cell, eis + CELL * cell)

    def _store(self, image: bytes, *addresses: int) -> None:
        try:
            for address in addresses:
                self._controller.memory.write(address, image)
        except DmaError:
            raise CommandError(Status.DATA_TRANSFER_ERROR) from None

    def _rings(self) -> Iterator[Ring]:
        yield from self._controller.sqs.values()
        yield from self._controller.cqs.values()

    # --- the mapped page ---------------------------------------------------------------------------------------------

    def share(self, page: memoryview) -> None:
        """Use `page`, whose elements are unsigned integers of 32 bits, while there is no queue."""
        with self._lock:
            self.page = page
            self._seen = memoryview(bytearray(page.nbytes)).cast("I")

    def cells_of(self, ring: Ring) -> tuple[memoryview, memoryview]:
        """Return a queue's cell in the page, and the one for what its worker has looked at."""
        assert self.page is not None
        at = slice(cell_of(ring), cell_of(ring) + 1)
        return self.page[at], self._seen[at]

    def created(self, ring: Ring) -> None:
        """A queue is there: what was in its cell before was rung for nothing. With the lock."""
        if self.page is not None:
            self.page[cell_of(ring)] = self._seen[cell_of(ring)] = 0

    def deleted(self, ring: Ring) -> None:
        """A queue is gone. With the lock."""
        self.late.pop(cell_of(ring), None)
        self.heard.discard(cell_of(ring))
        self._refused.pop(cell_of(ring), None)

    def hear(self, ring: Ring) -> None:
        """A register that counts was written: its queue's workers look whether it still counts. With the lock."""
        cell = cell_of(ring)
        if cell in self.late:
            self.heard.add(cell)
            for sqid in {ring.sqid} if isinstance(ring, SubmissionQueue) else ring.sqs or {0}:
                self._controller.engine.kick(sqid)

    def is_clear(self, sq: SubmissionQueue) -> bool:
        """Whether it is known where the doorbells of a queue pair are. With the lock."""
        return not self.heard or (cell_of(sq) not in self.heard and cell_of(sq.cq) not in self.heard)

    def written(self, qid: int, is_cq: bool, value: int) -> None:
        """A doorbell that could be written in memory came by message. With the lock."""
        if self.page is not None:
            self.page[2 * qid + is_cq] = value

    def scan(self) -> bool | None:
        """Kick the workers of queues whose doorbells have other values in the page than these workers saw last.

        Return whether there were any, None while nothing can be rung.
        """
        controller = self._controller
        with self._lock:
            if self.page is None or not controller.runs:
                return None
            if self.page.tobytes() == self._seen.tobytes():
                return False
            found = False
            for ring in self._rings():
                cell = cell_of(ring)
                if (value := self.page[cell]) != self._seen[cell]:
                    self._seen[cell] = value
                    controller.woken(ring)
                    found = True
            return found

    def take_page(self) -> None:
        """Take over what was rung in the page and nobody has seen, of a controller that is idle. With the lock."""
        if self.page is not None:
            for ring in self._rings():
                self._take(cell_of(ring), ring, self.page[cell_of(ring)])

    # --- the workers' side -------------------------------------------------------------------------------------------

    def look(self, sqid: int) -> bool:
        """Take over what the host has rung in memory for the submission queue and where it matters for completions.

        Return whether there is anything to look at; otherwise kicks say all.
        """
        watch = self._enter(sqid)
        if watch is None:
            return False
        try:
            for ring in watch.rings:
                self._update(ring, watch.dbs)
        except DmaError:
            self._lost(watch, "shadow doorbells are")
        finally:
            self._leave(watch)
        return True

    def arm(self, sqid: int) -> None:
        """Let the host ring from its next step on. What it rang before this took effect, a `look` must find."""
        watch = self._enter(sqid) if self.page is None else None
        if watch is None:
            return
        try:
            for ring in watch.rings:
                self._controller.memory.write(watch.eis + CELL * cell_of(ring), position(ring).to_bytes(CELL, "little"))
        except DmaError:
            self._lost(watch, "EventIdx buffer is")
        finally:
            self._leave(watch)
        with self._fence:
            pass  # a lock is a full barrier: EventIdx is written before the shadow is read again

    def _enter(self, sqid: int) -> _Watch | None:
        """Return what a submission queue's worker has to look at; it is in flight until `_leave`."""
        controller = self._controller
        with self._lock:
            sq = controller.sqs.get(sqid)
            if sq is None or not self.in_memory or not controller.runs:
                return None
            # Of a completion queue's head nothing depends but room, and with INTx the level of the pin.
            watches_pin = not controller.interrupts.msix_enabled
            rings: list[Ring] = [sq]
            if watches_pin or sq.cq.free <= 0 or cell_of(sq.cq) in self.heard:
                rings.append(sq.cq)
            if sqid == 0:
                rings += [
                    cq for cq in controller.cqs.values() if not cq.sqs and (watches_pin or cell_of(cq) in self.heard)
                ]
            rings = [ring for ring in rings if cell_of(ring) < self.cells]
            if not rings:
                return None
            controller.activity.enter(sq)
            return _Watch(sq, rings, self.dbs, self.eis)

    def _leave(self, watch: _Watch) -> None:
        with self._lock:
            after = self._controller.activity.leave(watch.sq)
        call(after)

    def _lost(self, watch: _Watch, what: str) -> None:
        if watch.sq.epoch == self._controller.epoch:
            self._controller.fatal(f"the {what} not in guest memory")

    def _update(self, ring: Ring, dbs: int) -> None:
        cell = cell_of(ring)
        while True:
            before = position(ring)
            value = self._read(cell, dbs)
            with self._lock:
                if position(ring) == before:  # another worker may have read a newer value of a shared head
                    self._take(cell, ring, value)
                    return

    def _read(self, cell: int, dbs: int) -> int:
        if self.page is not None:
            return self.page[cell]
        return int.from_bytes(self._controller.memory.read(dbs + CELL * cell, CELL), "little")

    def _take(self, cell: int, ring: Ring, value: int) -> None:
        """The host's doorbell has `value`. With the lock."""
        controller = self._controller
        is_sq = isinstance(ring, SubmissionQueue)
        if (controller.sqs if is_sq else controller.cqs).get(cell // 2) is not ring:
            return  # deleted meanwhile
        self.heard.discard(cell)
        if self.page is not None:
            self._seen[cell] = value
        elif not self.enabled or self.late.get(cell) == value:
            return
        self.late.pop(cell, None)
        if value == position(ring):
            return
        was_full = isinstance(ring, CompletionQueue) and ring.free <= 0
        if not (ring.set_tail(value) if isinstance(ring, SubmissionQueue) else ring.set_head(value)):
            self._refuse(cell, value)
        elif isinstance(ring, CompletionQueue):
            self._controller.head_moved(ring, was_full)

    def _refuse(self, cell: int, value: int) -> None:
        """A value that cannot be: an event when it appears, not each time that it is seen."""
        if self._refused.get(cell) != value:
            self._refused[cell] = value
            self._controller.raise_event(EventType.ERROR, EVENT_INVALID_DOORBELL_VALUE, Log.ERROR_INFORMATION)

    def is_refused(self, sq: SubmissionQueue) -> bool:
        """Whether a doorbell of this queue pair had a value in memory that cannot be. With the lock."""
        return cell_of(sq) in self._refused or cell_of(sq.cq) in self._refused

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self) -> DoorbellsState:
        """Return what of the doorbells is state. With the lock."""
        late = [LateState(cell, value) for cell, value in sorted(self.late.items())]
        return DoorbellsState(self._controller.config.dbcs, self.enabled, self.dbs, self.eis, late)

    def load(self, state: DoorbellsState) -> None:
        """Take over a state that was checked. With the lock."""
        self.reset()
        self.dbs, self.eis = state.dbs, state.eis
        self.late = {late.cell: late.value for late in state.late}
        self.heard = set(self.late)
        if self.page is not None:
            for ring in self._rings():
                self.page[cell_of(ring)] = self._seen[cell_of(ring)] = position(ring)
