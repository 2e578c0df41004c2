"""What a write of CC does: the controller is enabled, disabled, shut down (Base 3.1.3.5, 3.5, 3.6, 3.7.2).

EN 0 → 1        check AQA, ASQ, ACQ, MPS, CSS: create the admin queues and set RDY, or set CFS
EN 1 → 0        drop all queues at once; RDY falls when nothing is in flight
SHN 0 → 1, 2    stop fetching, SHST occurring; nothing in flight: flush the disks; then SHST complete
SHN → 0         SHST falls, and commands are fetched again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nvmove.nvme import core
from nvmove.nvme.activity import Activity, Callback
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.spec import (
    CC_EN,
    CC_IOCQES,
    CC_IOSQES,
    CC_SHN,
    CSTS_RDY,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_OCCURRING,
)

ADMIN_VECTOR = 0


class Revokes(core.Suspends, Protocol):
    """Who has lent queue pairs."""

    def revoke(self, *queues: SubmissionQueue) -> list[Callback]:
        """Want these queues back, or all; returns what to call without the lock."""


class Controller(core.Controller, Protocol):
    """What enabling, disabling and shutting down use of a controller."""

    @property
    def resetting(self) -> int:
        """Disables and resets that wait for what is in flight."""

    @property
    def activity(self) -> Activity:
        """What is in flight."""

    @property
    def leases(self) -> Revokes:
        """What is lent."""

    @property
    def on_wait(self) -> Callback:
        """Whom it is told that the guest begins to wait."""

    def start_reset(self, done: Callable[[], Callback | None]) -> list[Callback]:
        """Drop the queues; `done` runs when nothing is in flight."""

    def kick_all(self) -> None:
        """Look at every submission queue."""


class Enabling:
    """One controller's."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def write_cc(self, value: int) -> list[Callback]:
        """Write CC, its reserved bits clear; return what to call without the lock, which is held."""
        registers = self._controller.registers
        was_enabled, had_shutdown = registers.enabled, registers.shutdown_notification
        if was_enabled and value & CC_EN:  # else fixed while enabled; entry sizes until they are used (Base 3.1.3.5)
            has_io_queues = len(self._controller.cqs) + len(self._controller.sqs) > 2
            free = CC_SHN if has_io_queues else CC_SHN | CC_IOSQES | CC_IOCQES
            value = registers.cc & ~free | value & free
        registers.cc = value
        after: list[Callback] = []
        if was_enabled and not registers.enabled:
            after = self._controller.start_reset(self._disabled)
        elif not was_enabled and registers.enabled:
            self._enable()
        if registers.shutdown_notification and not had_shutdown:
            after += self._start_shutdown()
        elif had_shutdown and not registers.shutdown_notification:
            registers.set_shutdown_status(0)
            self._controller.kick_all()
        return after

    def _enable(self) -> None:
        controller, registers = self._controller, self._controller.registers
        if controller.resetting:  # the disable before waits for what is in flight; it looks at CC.EN when it is done
            return
        fault = registers.enable_fault()
        if fault:
            controller.fatal(fault)
            return
        sq_size, cq_size = registers.admin_sizes
        controller.create_cq(CompletionQueue(0, registers.acq, cq_size, ADMIN_VECTOR, irq_enabled=True))
        try:
            controller.create_sq(SubmissionQueue(0, controller.cqs[0], registers.asq, sq_size))
        except OSError as error:
            controller.fatal(f"the admin queue has no worker: {error}")
            return
        registers.csts |= CSTS_RDY

    def _disabled(self) -> None:
        self._controller.registers.disable()
        self._controller.features.reset()
        self._controller.namespaces.reset()
        if self._controller.registers.enabled:
            self._enable()

    def _start_shutdown(self) -> list[Callback]:
        """CC.SHN: the admin queue's worker does the rest, as soon as nothing is in flight."""
        if not self._controller.registers.ready or self._controller.resetting:
            self._controller.registers.set_shutdown_status(CSTS_SHST_COMPLETE)
            return []
        for sq in self._controller.sqs.values():
            sq.held.clear()
        self._controller.registers.set_shutdown_status(CSTS_SHST_OCCURRING)

        def idle() -> None:
            self._controller.engine.kick(0)

        after = [*self._controller.activity.when_idle(idle), *self._controller.leases.revoke()]
        self._controller.on_wait()
        return after
