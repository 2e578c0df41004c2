"""Saving and loading a controller's state.

`load` starts from a state that was checked (state/checks.py) and a controller without queues. It rebuilds them through
the same functions that the guest's own commands use; then it overlays the ring positions.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import msgspec

from nvmove.nvme import core
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.doorbells import Doorbells
from nvmove.nvme.held import HeldCommand
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.state.saved import (
    CompletionQueueState,
    ControllerState,
    HeldState,
    IdentityState,
    SubmissionQueueState,
)

ADOPTED = {"firmware_version"}
"""What the loading controller takes from the state: QEMU's version, which Identify shows, may be another here.
Beside it goes whether Doorbell Buffer Config is offered: older versions of nvmove did not."""


class Controller(core.Controller, Protocol):
    """What saving and loading use of a controller."""

    config: ControllerConfig

    @property
    def doorbells(self) -> Doorbells:
        """Where the doorbells are."""

    @property
    def resetting(self) -> int:
        """Disables and resets that wait for what is in flight."""

    @property
    def irq_status(self) -> int:
        """The vectors, as bits, that have completions the host has not consumed."""

    def drive_pin(self) -> None:
        """Set INTx to what the completion queues say. With the lock held."""


def save(controller: Controller) -> ControllerState:
    """Return the state of a controller that is idle. With the lock held."""
    registers = controller.registers
    smart, errors, changed = controller.logs.save()
    return ControllerState(
        identity=identity_of(controller),
        cc=registers.cc,
        csts=registers.csts,
        intms=registers.intms,
        aqa=registers.aqa,
        asq=registers.asq,
        acq=registers.acq,
        irq_status=controller.irq_status,
        sqs=[_save_sq(controller.sqs[sqid]) for sqid in sorted(controller.sqs)],
        cqs=[_save_cq(controller.cqs[cqid]) for cqid in sorted(controller.cqs)],
        events=controller.events.save(),
        features=controller.features.save(),
        smart=smart,
        error_log=errors,
        changed_namespaces=changed,
        namespaces=[namespace.save() for namespace in controller.namespaces],
        held=[
            HeldState(sqid, held.aborted, held.sqe) for sqid, sq in sorted(controller.sqs.items()) for held in sq.held
        ],
        doorbells=controller.doorbells.save(),
    )


def identity_of(controller: core.Controller) -> IdentityState:
    """Return what the guest has seen of a controller that does not change."""
    config, registers = controller.config, controller.registers
    return IdentityState(
        serial=config.serial,
        model=config.model,
        firmware_version=config.firmware_version,
        cap=registers.cap,
        version=registers.vs,
        max_ioqpairs=config.max_ioqpairs,
        msix_qsize=config.msix_qsize,
        mdts=config.mdts,
        aerl=config.aerl,
        cntlid=config.cntlid,
        use_intel_id=config.use_intel_id,
    )


def _save_sq(sq: SubmissionQueue) -> SubmissionQueueState:
    return SubmissionQueueState(
        sqid=sq.sqid,
        cqid=sq.cq.cqid,
        address=sq.address,
        size=sq.size,
        head=sq.head,
        tail=sq.tail,
        priority=sq.priority,
        aborted=sorted(sq.aborted),
    )


def _save_cq(cq: CompletionQueue) -> CompletionQueueState:
    return CompletionQueueState(
        cqid=cq.cqid,
        address=cq.address,
        size=cq.size,
        head=cq.head,
        tail=cq.tail,
        phase=cq.phase,
        vector=cq.vector,
        irq_enabled=cq.irq_enabled,
    )


def load(controller: Controller, state: ControllerState) -> None:
    """Take over `state`, which was checked, in a controller without queues. With the lock held.

    Raises OSError when a queue's worker cannot be had; part of the queues are there then.
    """
    registers = controller.registers
    registers.cc, registers.csts, registers.intms = state.cc, state.csts, state.intms
    registers.aqa, registers.asq, registers.acq = state.aqa, state.asq, state.acq
    for saved in state.cqs:
        cq = CompletionQueue(saved.cqid, saved.address, saved.size, saved.vector, saved.irq_enabled)
        controller.create_cq(cq)
        cq.head, cq.tail, cq.phase = saved.head, saved.tail, saved.phase
    for sub in state.sqs:
        sq = SubmissionQueue(sub.sqid, controller.cqs[sub.cqid], sub.address, sub.size, sub.priority)
        controller.create_sq(sq)
        sq.head, sq.tail, sq.aborted = sub.head, sub.tail, set(sub.aborted)
    for held in state.held:
        sq = controller.sqs[held.sqid]
        sq.held.add(HeldCommand(sq.fetched, held.sqe, ready=held.aborted, aborted=held.aborted))
        sq.fetched += 1
    adopted = {name: getattr(state.identity, name) for name in ADOPTED}
    controller.config = msgspec.structs.replace(controller.config, dbcs=state.doorbells.dbcs, **adopted)
    controller.doorbells.load(state.doorbells)
    controller.events.load(state.events)
    controller.features.load(state.features)
    controller.logs.load(state.smart, state.error_log, state.changed_namespaces)
    for namespace in state.namespaces:
        live = controller.namespaces.get(namespace.nsid)
        assert live is not None  # checked
        live.load(namespace)
    controller.drive_pin()


def inspect(controller: Controller) -> dict[str, Any]:
    """Return the state and what is under way as a tree of plain values. With the lock held; also while it runs."""
    controller.leases.refresh()
    tree = asdict(save(controller))
    tree["live"] = {
        "runs": controller.runs,
        "paused": controller.paused,
        "resetting": bool(controller.resetting),
        "doorbell_writes": controller.doorbells.writes,
        "lent": [sqid for sqid, sq in sorted(controller.sqs.items()) if sq.borrower is not None],
        "in_flight": {sqid: controller.leases.in_flight(sq) for sqid, sq in sorted(controller.sqs.items())},
    }
    return tree
