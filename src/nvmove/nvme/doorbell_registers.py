"""Doorbells that are rung by a write of their register (PCIe 3.1.2)."""

from __future__ import annotations

from typing import Protocol

from nvmove.nvme import doorbells
from nvmove.nvme.cells import Place
from nvmove.nvme.doorbells import Doorbells
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.spec import (
    DOORBELL_STRIDE,
    DOORBELLS,
    EVENT_INVALID_DOORBELL_REGISTER,
    EVENT_INVALID_DOORBELL_VALUE,
    EventType,
    Log,
)


class Controller(doorbells.Controller, Protocol):
    """What these registers use of their controller."""

    @property
    def doorbells(self) -> Doorbells:
        """Where the doorbells are."""

    @property
    def resetting(self) -> int:
        """Disables and resets that wait for what is in flight."""


class DoorbellRegisters:
    """Those of one controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes at `offset` of BAR0. With the lock held."""
        controller, registers = self._controller, self._controller.registers
        if not (registers.enabled and registers.ready) or controller.resetting or registers.failed:
            return
        index, rest = divmod(offset - DOORBELLS, DOORBELL_STRIDE)
        qid, is_cq = divmod(index, 2)
        queue = (self._controller.cqs if is_cq else self._controller.sqs).get(qid)
        self._controller.doorbells.writes += 1
        if rest or size != DOORBELL_STRIDE or queue is None:
            self._doorbell_error(EVENT_INVALID_DOORBELL_REGISTER)
        elif self._controller.doorbells.source(qid, bool(is_cq)).place is not Place.MESSAGE:
            self._rung_in_memory(queue, qid, bool(is_cq), value)
        elif isinstance(queue, SubmissionQueue):
            if not queue.set_tail(value):
                self._doorbell_error(EVENT_INVALID_DOORBELL_VALUE)
            elif queue.borrower is None:
                self._controller.doorbells.hear(queue)
                self._controller.engine.kick(qid)
        else:
            was_full = queue.borrower is None and not queue.free
            if not queue.set_head(value):
                self._doorbell_error(EVENT_INVALID_DOORBELL_VALUE)
                return
            if queue.borrower is None:
                self._controller.doorbells.hear(queue)
            self._controller.head_moved(queue, was_full)

    def _rung_in_memory(self, queue: SubmissionQueue | CompletionQueue, qid: int, is_cq: bool, value: int) -> None:
        """A doorbell register whose value is in memory, or can be: the queue's workers look there."""
        if value >= queue.size:
            self._doorbell_error(EVENT_INVALID_DOORBELL_VALUE)
            return
        self._controller.doorbells.written(qid, is_cq, value)
        self._controller.woken(queue)

    def _doorbell_error(self, info: int) -> None:
        self._controller.raise_event(EventType.ERROR, info, Log.ERROR_INFORMATION)
