"""Admin commands: the dispatcher, queue creation and deletion, Abort, Asynchronous Event Request (Base 5)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from nvmove.nvme.activity import call
from nvmove.nvme.commands import features, identify, logs, management
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.commands.dptr import LOCATION
from nvmove.nvme.errors import CommandError
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.seams import DmaError
from nvmove.nvme.spec import (
    CC_IOCQES,
    CC_IOSQES,
    CQE_SIZE,
    FUSE,
    QUEUE_CONTIGUOUS,
    QUEUE_INTERRUPTS,
    SQE_SIZE,
    Admin,
    Status,
    field,
)

CDW10, CDW11 = 40, 44
"""Parameter error locations: bytes in the SQE."""
log = logging.getLogger(__name__)

ABORT_WAIT = 1.0
"""Seconds that an Abort waits for a queue that is lent: a host aborts because a disk hangs, and wants its answer."""
MAX_ABORTED = 256
"""Commands that wait in rings to complete as aborted: they are state, and QEMU carries 1 MiB of it for a device."""
ABORT_NOT_FOUND = 1
"""Bit 0 of Abort's dword 0: the command was not aborted (Base 5.1)."""


def _create_cq(controller: Controller, command: Command) -> None:
    """Base 5.4."""
    cqid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
    vector = command.cdw11 >> 16
    with controller.lock:
        _check_current(command)
        _check_id(controller, cqid, cqid in controller.cqs)
        _check_size(controller, size, field(controller.registers.cc, CC_IOCQES), CQE_SIZE)
        if vector >= (controller.config.msix_qsize if controller.interrupts.msix_enabled else 1):
            raise CommandError(Status.INVALID_INTERRUPT_VECTOR, location=CDW11 + 2)
        address = _ring_address(controller, command)
        irq_enabled = bool(command.cdw11 & QUEUE_INTERRUPTS)
    controller.doorbells.clear(cqid, is_cq=True)
    with controller.lock:
        _check_current(command)
        controller.create_cq(CompletionQueue(cqid, address, size, vector, irq_enabled))
    command.complete()


def _create_sq(controller: Controller, command: Command) -> None:
    """Base 5.5."""
    sqid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
    cqid, priority = command.cdw11 >> 16, command.cdw11 >> 1 & 3
    with controller.lock:
        _check_current(command)
        cq = controller.cqs.get(cqid)
        if cqid == 0 or cqid > controller.config.max_ioqpairs:
            raise CommandError(Status.INVALID_QID, location=CDW11 + 2)
        if cq is None:
            raise CommandError(Status.INVALID_CQ, location=CDW11 + 2)
        _check_id(controller, sqid, sqid in controller.sqs)
        _check_size(controller, size, field(controller.registers.cc, CC_IOSQES), SQE_SIZE)
        address = _ring_address(controller, command)
    controller.doorbells.clear(sqid, is_cq=False)
    with controller.lock:
        _check_current(command)
        try:
            controller.create_sq(SubmissionQueue(sqid, cq, address, size, priority))
        except OSError as error:
            if controller.log_limit.allows():
                log.warning("%s: submission queue %d has no worker: %s", controller.config.serial, sqid, error)
            raise CommandError(Status.INTERNAL_ERROR, dnr=False) from None
    command.complete()


def _check_current(command: Command) -> None:
    """A controller that was disabled meanwhile gets no queue; nobody will see this status."""
    if command.stale:
        raise CommandError(Status.ABORT_REQUESTED)


def _check_id(controller: Controller, qid: int, exists: bool) -> None:
    if qid == 0 or qid > controller.config.max_ioqpairs or exists:
        raise CommandError(Status.INVALID_QID, location=CDW10)


def _check_size(controller: Controller, size: int, entry_shift: int, entry_size: int) -> None:
    """Base 3.1.3.5: a queue made before CC gives the entry size is a queue of an invalid size."""
    if size < 2 or size > controller.config.mqes + 1 or 1 << entry_shift != entry_size:
        raise CommandError(Status.INVALID_QUEUE_SIZE, location=CDW10 + 2)


def _ring_address(controller: Controller, command: Command) -> int:
    if not command.cdw11 & QUEUE_CONTIGUOUS:  # CAP.CQR
        raise CommandError(Status.INVALID_FIELD, location=CDW11)
    address = int.from_bytes(command.dptr[:8], "little")
    if address & (controller.page_size - 1):
        raise CommandError(Status.INVALID_PRP_OFFSET, location=LOCATION)
    return address


def _delete_cq(controller: Controller, command: Command) -> None:
    """Base 5.6."""
    with controller.lock:
        cq = controller.cqs.get(command.cdw10 & 0xFFFF)
        if cq is None or cq.cqid == 0:
            raise CommandError(Status.INVALID_QID, location=CDW10)
        if cq.sqs or cq.reserved:
            raise CommandError(Status.INVALID_QUEUE_DELETION)
        controller.delete_cq(cq)
    command.complete()


def _delete_sq(controller: Controller, command: Command) -> None:
    """Base 5.7: what was fetched completes first, what is held as aborted; what was not fetched is never answered."""
    with controller.lock:
        sq = controller.sqs.get(command.cdw10 & 0xFFFF)
        if sq is None or sq.sqid == 0:
            raise CommandError(Status.INVALID_QID, location=CDW10)
        after = controller.delete_sq(sq, command.complete)
    call(after)


def _abort(controller: Controller, command: Command) -> None:
    """Base 5.1. Event requests, held commands and those still in the ring are found; what is at the disk is not."""
    sqid, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
    sq = controller.sqs.get(sqid)
    if sq is None:
        raise CommandError(Status.INVALID_FIELD)
    if sqid == 0 and controller.abort_event_request(cid):
        command.complete()
        return
    with controller.leases.suspended(sq, timeout=ABORT_WAIT) as is_back:  # what is lent cannot be looked through
        found = is_back and (controller.abort_held(sq, cid) or _abort_waiting(controller, sq, cid))
    if not found:
        controller.abort_failed(sq)
    command.complete(result=0 if found else ABORT_NOT_FOUND)


def _abort_waiting(controller: Controller, sq: SubmissionQueue, cid: int) -> bool:
    """Mark the command `cid` that `sq` has not fetched yet, so that it completes as aborted when it is fetched."""
    with controller.lock:
        runs, first, head = sq.runs(), sq.fetched, sq.head
    try:
        ring = b"".join(controller.memory.read(address, count * SQE_SIZE) for address, count in runs)
    except DmaError:
        return False
    entries = range(0, len(ring), SQE_SIZE)
    index = next((n for n, at in enumerate(entries) if int.from_bytes(ring[at + 2 : at + 4], "little") == cid), None)
    if index is None:
        return False
    with controller.lock:
        if first + index < sq.fetched:  # fetched while the ring was read
            return False
        if sum(len(other.aborted) for other in controller.sqs.values()) >= MAX_ABORTED:
            return False
        sq.aborted.add((head + index) % sq.size)
    return True


def _async_event_request(controller: Controller, command: Command) -> None:
    """Base 5.2: held until there is an event, beyond the limit refused."""
    with controller.lock:
        kept = command.stale or controller.events.request(command.cid)  # a stale one is dropped by park
    if not kept:
        raise CommandError(Status.AER_LIMIT_EXCEEDED)
    controller.park(command)
    controller.engine.kick(0)


def _doorbell_buffer_config(controller: Controller, command: Command) -> None:
    """Base 5.8: each buffer is one memory page."""
    if not controller.doorbells.offered:
        raise CommandError(Status.INVALID_OPCODE)
    dbs, eis = (int.from_bytes(command.dptr[at : at + 8], "little") for at in (0, 8))
    for address, location in ((dbs, LOCATION), (eis, LOCATION + 8)):
        if not address or address & (controller.page_size - 1):
            raise CommandError(Status.INVALID_FIELD, location=location)
    controller.doorbells.configure(command, dbs, eis)
    command.complete()


HANDLERS: dict[int, Callable[[Controller, Command], None]] = {
    Admin.DELETE_SQ: _delete_sq,
    Admin.CREATE_SQ: _create_sq,
    Admin.GET_LOG_PAGE: logs.get_log_page,
    Admin.DELETE_CQ: _delete_cq,
    Admin.CREATE_CQ: _create_cq,
    Admin.IDENTIFY: identify.identify,
    Admin.ABORT: _abort,
    Admin.SET_FEATURES: features.set_features,
    Admin.GET_FEATURES: features.get_features,
    Admin.ASYNC_EVENT_REQUEST: _async_event_request,
    Admin.DOORBELL_BUFFER_CONFIG: _doorbell_buffer_config,
    Admin.NAMESPACE_ATTACHMENT: management.namespace_attachment,
    Admin.FORMAT_NVM: management.format_nvm,
}


def execute(controller: Controller, command: Command) -> None:
    """Run an admin command; raises CommandError."""
    handler = HANDLERS.get(command.opcode)
    if handler is None:
        raise CommandError(Status.INVALID_OPCODE)
    if command.flags & FUSE:
        raise CommandError(Status.INVALID_FIELD)
    handler(controller, command)
