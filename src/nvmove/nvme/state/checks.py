"""Checking a controller's state before it is loaded: is it whole, and does it fit here?

A state is refused when it contradicts itself, or was saved by a controller of another configuration. All of it is
looked at before anything is touched. Each check raises StateError with the name of what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from nvmove.nvme.core import Controller
from nvmove.nvme.errors import StateError
from nvmove.nvme.held import HeldCommand
from nvmove.nvme.registers import Registers
from nvmove.nvme.spec import (
    CC_WRITABLE,
    CHANGED_NAMESPACES_MAX,
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST,
    ERROR_ENTRIES,
    HOST_BEHAVIOR_SIZE,
    MAX_NAMESPACES,
    SQE_SIZE,
    EventType,
)
from nvmove.nvme.state.saved import (
    CompletionQueueState,
    ControllerState,
    NamespaceState,
    SubmissionQueueState,
)
from nvmove.nvme.state.saving import ADOPTED, identity_of

U16, U32, U64 = 1 << 16, 1 << 32, 1 << 64


def check(controller: Controller, state: ControllerState) -> None:
    """Raise StateError unless `state` is whole and fits `controller`."""
    _check_identity(controller, state)
    _check_registers(controller, state)
    _check_queues(controller, state)
    _check_held(state)
    _check_doorbells(controller, state)
    _check_events(controller, state)
    _check_data(state)
    _check_namespaces(controller, state.namespaces)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise StateError(what)


def _range(name: str, value: int, end: int, start: int = 0) -> None:
    if not start <= value < end:
        raise StateError(f"{name} is {value}, outside {start}…{end - 1}")


def _check_identity(controller: Controller, state: ControllerState) -> None:
    """The guest has seen these: they must be here what they were there."""
    here = asdict(identity_of(controller))
    for name, value in asdict(state.identity).items():
        if name in ADOPTED:
            _require(len(value) <= 8 and value.isascii(), f"{name} is {value!r}, not 8 ASCII characters")
        elif value != here[name]:
            raise StateError(f"{name} is {_text(name, here[name])} here, and was {_text(name, value)} when saved")


def _text(name: str, value: object) -> str:
    return f"{value:#x}" if name in {"cap", "version"} else repr(value)


def _check_registers(controller: Controller, state: ControllerState) -> None:
    _require(state.cc & ~CC_WRITABLE == 0, f"cc is {state.cc:#x}, with reserved bits")
    _require(state.csts & ~(CSTS_RDY | CSTS_CFS | CSTS_SHST) == 0, f"csts is {state.csts:#x}, with reserved bits")
    _require(state.csts & CSTS_SHST != CSTS_SHST, "csts has the reserved shutdown status")
    _range("intms", state.intms, U32)
    _range("asq", state.asq, U64)
    _range("acq", state.acq, U64)
    registers = Registers(controller.config)
    registers.write_aqa(state.aqa)
    _require(registers.aqa == state.aqa, f"aqa is {state.aqa:#x}, with reserved bits")
    registers.cc, registers.asq, registers.acq = state.cc, state.asq, state.acq
    if not state.csts & CSTS_RDY:
        _require(not state.sqs and not state.cqs, "there are queues, and csts is not ready")
        _require(not state.events.outstanding, "there are event requests, and csts is not ready")
        failed = bool(state.csts & CSTS_CFS)
        _require(not registers.enabled or failed, "cc is enabled, and csts neither ready nor failed")
        return
    _require(registers.enabled, "csts is ready, and cc not enabled")
    fault = registers.enable_fault()
    _require(fault is None, f"csts is ready, and yet {fault}")
    sizes = registers.admin_sizes
    for name, queues, address, size in (("sq", state.sqs, state.asq, sizes[0]), ("cq", state.cqs, state.acq, sizes[1])):
        _require(bool(queues), f"csts is ready, and there is no admin {name}")
        admin = queues[0]
        found = (admin.address, admin.size)
        _require(found == (address, size), f"{name} 0 is not where aqa and a{name} say")


def _check_queues(controller: Controller, state: ControllerState) -> None:
    limit = controller.config.max_ioqpairs + 1
    _check_order("cqs", [cq.cqid for cq in state.cqs], limit)
    _check_order("sqs", [sq.sqid for sq in state.sqs], limit)
    page = controller.registers.page_size_of(state.cc)
    for cq in state.cqs:
        name = f"cq {cq.cqid}"
        _check_ring(controller, name, cq, page, is_admin=cq.cqid == 0)
        _range(f"{name}: phase", cq.phase, 2)
        _range(f"{name}: vector", cq.vector, controller.config.msix_qsize)
    cqids = {cq.cqid for cq in state.cqs}
    for sq in state.sqs:
        name = f"sq {sq.sqid}"
        _check_ring(controller, name, sq, page, is_admin=sq.sqid == 0)
        _require(sq.cqid in cqids, f"{name}: cqid is {sq.cqid}, which does not exist")
        _require((sq.sqid == 0) == (sq.cqid == 0), f"{name}: cqid is {sq.cqid}")
        _range(f"{name}: priority", sq.priority, 4)
        waiting = (sq.tail - sq.head) % sq.size
        for position in sq.aborted:
            _range(f"{name}: aborted", position, sq.size)
            _require(
                (position - sq.head) % sq.size < waiting, f"{name}: aborted {position} is not between head and tail"
            )


def _check_order(name: str, ids: list[int], limit: int) -> None:
    for qid in ids:
        _range(name, qid, limit)
    _require(ids == sorted(set(ids)), f"{name} are not in ascending order")
    _require(not ids or ids[0] == 0, f"{name} lack the admin queue")


def _check_ring(
    controller: Controller, name: str, queue: SubmissionQueueState | CompletionQueueState, page: int, is_admin: bool
) -> None:
    limit = 4096 if is_admin else controller.config.mqes + 1
    _range(f"{name}: size", queue.size, limit + 1, 2)
    _range(f"{name}: head", queue.head, queue.size)
    _range(f"{name}: tail", queue.tail, queue.size)
    _range(f"{name}: address", queue.address, U64)
    _require(queue.address % page == 0, f"{name}: address {queue.address:#x} is not aligned to a memory page")


def _check_held(state: ControllerState) -> None:
    sqids = [held.sqid for held in state.held]
    _require(sqids == sorted(sqids), "held: the commands are not in the order of their queues")
    for sqid in sorted(set(sqids) - {sq.sqid for sq in state.sqs}):
        raise StateError(f"held: there is no submission queue {sqid}")
    seen = {(0, cid) for cid in state.events.outstanding}
    for held in state.held:
        _require(len(held.sqe) == SQE_SIZE, f"held: an entry of {len(held.sqe)} bytes")
        key = held.sqid, HeldCommand(0, held.sqe).cid
        _require(key not in seen, f"held: command id {key[1]} of submission queue {key[0]} is there twice")
        seen.add(key)


def _check_doorbells(controller: Controller, state: ControllerState) -> None:
    doorbells = state.doorbells
    mapped = controller.config.mapped_doorbells
    _require(not (doorbells.dbcs and mapped), "doorbells: dbcs was on when saved, and is not with x-doorbells=mapped")
    found = (doorbells.enabled, doorbells.dbs != 0, doorbells.eis != 0)
    _require(len(set(found)) == 1, "doorbells: enabled, dbs and eis contradict each other")
    if not doorbells.enabled:
        _require(not doorbells.late, "doorbells: late ones, and not enabled")
        return
    _require(doorbells.dbcs, "doorbells: enabled, and not offered")
    _require(bool(state.csts & CSTS_RDY), "doorbells: enabled, and csts is not ready")
    page = controller.registers.page_size_of(state.cc)
    for name, address in (("dbs", doorbells.dbs), ("eis", doorbells.eis)):
        _range(f"doorbells: {name}", address, U64)
        _require(address % page == 0, f"doorbells: {name} {address:#x} is not aligned to a memory page")
    sizes = {2 * sq.sqid: sq.size for sq in state.sqs} | {2 * cq.cqid + 1: cq.size for cq in state.cqs}
    for late in doorbells.late:
        _require(late.cell in sizes, f"doorbells: there is no queue for the late one {late.cell}")
        _range(f"doorbells: late {late.cell}", late.value, sizes[late.cell])
    cells = [late.cell for late in doorbells.late]
    _require(cells == sorted(set(cells)), "doorbells: the late ones are not in ascending order")


def _check_events(controller: Controller, state: ControllerState) -> None:
    events = state.events
    _require(len(events.outstanding) <= controller.events.limit, "events: more requests outstanding than aerl allows")
    _require(len(events.queued) <= controller.events.max_queued, "events: more queued than aer_max_queued allows")
    for cid in events.outstanding:
        _range("events: outstanding", cid, U16)
    kinds = {int(kind) for kind in EventType}
    for event in events.queued:
        _require(event.kind in kinds, f"events: queued type {event.kind} does not exist")
        _range("events: information", event.info, 256)
        _range("events: log page", event.log, 256)
    for kind in events.masked:
        _require(kind in kinds, f"events: masked type {kind} does not exist")


def _check_data(state: ControllerState) -> None:
    features = state.features
    _require(len(features.host_behavior) == HOST_BEHAVIOR_SIZE, "features: host_behavior is not 512 bytes")
    _range("features: volatile_write_cache", features.volatile_write_cache, 2)
    for name in ("temperature_over", "temperature_under", "interrupt_coalescing"):
        _range(f"features: {name}", getattr(features, name), U16)
    _range("features: async_event_configuration", features.async_event_configuration, U32)
    for vector in features.coalescing_disabled:
        _range("features: coalescing_disabled", vector, state.identity.max_ioqpairs + 1)
    _all_positive("smart", asdict(state.smart))
    _require(len(state.error_log) <= ERROR_ENTRIES, "error_log has too many entries")
    for entry in state.error_log:
        _all_positive("error_log", asdict(entry))
    _require(len(state.changed_namespaces) <= CHANGED_NAMESPACES_MAX, "changed_namespaces has too many entries")
    for nsid in state.changed_namespaces:
        _range("changed_namespaces", nsid, MAX_NAMESPACES + 1, 1)


def _all_positive(name: str, values: dict[str, int]) -> None:
    for field, value in values.items():
        _range(f"{name}: {field}", value, 1 << 128)


def _check_namespaces(controller: Controller, saved: Iterable[NamespaceState]) -> None:
    here = {namespace.nsid: namespace for namespace in controller.namespaces}
    for state in saved:
        name = f"namespace {state.nsid}"
        live = here.pop(state.nsid, None)
        if live is None:
            twice = controller.namespaces.get(state.nsid) is not None
            raise StateError(f"{name} is twice in the state" if twice else f"{name} is not here, and was when saved")
        now = live.save()
        for field in ("uuid", "nguid", "eui64"):
            there, this = getattr(state, field), getattr(now, field)
            _require(there == this, f"{name}: {field} is {_identity(this)} here, and was {_identity(there)} when saved")
        _require(
            state.read_only == now.read_only,
            f"{name} is {_access(now.read_only)} here, and was {_access(state.read_only)} when saved",
        )
        shifts = {entry.shift for entry in live.formats if entry.shift}
        _require(
            state.block_shift in shifts, f"{name}: a block size of 2^{state.block_shift} bytes is not offered here"
        )
        blocks = live.backend.size >> state.block_shift
        _require(state.blocks == blocks, f"{name} has {blocks} blocks here, and had {state.blocks} when saved")
    for nsid in here:
        raise StateError(f"namespace {nsid} is here, and was not when saved")


def _identity(value: bytes | int) -> str:
    return value.hex() if isinstance(value, bytes) else f"{value:#x}"


def _access(read_only: bool) -> str:
    return "read-only" if read_only else "writable"
