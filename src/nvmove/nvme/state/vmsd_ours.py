"""Subsections of the section `nvme` that are ours: what QEMU's fields do not hold.

Each is written only when it says something: when it differs from what a fresh controller has. An absent one stands for
that default. A new kind of state gets a new subsection, so that a state which does not use it stays loadable by
older versions; a subsection that has been released never changes but by its version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from nvmove.nvme.state.saved import (
    ControllerState,
    DoorbellsState,
    ErrorEntryState,
    FeaturesState,
    HeldState,
    IdentityState,
    LateState,
    NamespaceState,
    SmartState,
    SubmissionQueueState,
)
from nvmove.vmstate.fields import Blob, Bool, Buffer, Counted, Int, Text
from nvmove.vmstate.schema import Field, StateError, VMStateDescription
from nvmove.vmstate.tree import Tree

PREFIX = "nvme/nvmove/"
IDENTITY = PREFIX + "identity"
NAMESPACES = PREFIX + "namespaces"
QUEUES = PREFIX + "submission-queues"
FEATURES = PREFIX + "features"
SMART = PREFIX + "smart"
ERROR_LOG = PREFIX + "error-log"
CHANGED = PREFIX + "changed-namespaces"
IRQ_STATUS = PREFIX + "irq-status"
REQUESTS = PREFIX + "more-aers"
HELD = PREFIX + "held"
DOORBELLS = PREFIX + "doorbells"

MAX_QUEUES = 1 << 16
MAX_NAMESPACES = 256
"""QEMU's limit, and ours."""
MAX_CHANGED = 1024
"""Entries of the Changed Namespace List (Base 5.16.1.5)."""
MAX_ERRORS = 256
"""Entries of the Error Information log: ELPE is a byte (Base 5.17.2.1)."""
MAX_AERS = 0xFF
"""QEMU counts outstanding AERs in a byte; with `aerl=255` there can be one more."""
MAX_HELD = 1 << 24
"""A bound on the count only: every queue can hold as many commands as there are command ids."""
MAX_VECTORS = 2048
"""MSI-X vectors (PCI 3.0, 6.8.2.3)."""


def _structure(name: str, *wire: Field) -> VMStateDescription:
    return VMStateDescription(name, fields=wire)


def _default(value: Any) -> Callable[[Tree], bool]:
    """Return a `needed` that says whether a tree differs from `value`."""
    return lambda tree: bool(tree != value)


IDENTITY_FIELDS: tuple[Field, ...] = (
    Text("serial", 80),
    Text("model", 160),
    Text("firmware_version", 32),
    Int("mdts", 1),
    Int("aerl", 1),
    Int("cntlid", 2),
    Bool("use_intel_id"),
)
NAMESPACE = _structure(
    "nvme/nvmove/namespace",
    Int("nsid", 4),
    Bool("attached"),
    Int("blocks", 8),
    Int("block_shift", 1),
    Buffer("uuid", 16),
    Buffer("nguid", 16),
    Int("eui64", 8),
    Bool("read_only"),
    Int("error_recovery", 4),
)
NUMBER = _structure("nvme/nvmove/number", Int("value", 4))
QUEUE = _structure(
    "nvme/nvmove/submission-queue", Int("sqid", 2), Int("priority", 1), Counted("aborted", NUMBER, MAX_QUEUES)
)
LATE = _structure("nvme/nvmove/late-doorbell", Int("cell", 4), Int("value", 4))
HELD_COMMAND = _structure("nvme/nvmove/held-command", Int("sqid", 2), Bool("aborted"), Buffer("sqe", 64))
FEATURES_FIELDS: tuple[Field, ...] = (
    *(Int(name, 4) for name in ("arbitration", "power_management", "volatile_write_cache", "number_of_queues")),
    *(Int(name, 4) for name in ("interrupt_coalescing", "command_set_profile")),
    Counted("coalescing_disabled", NUMBER, MAX_VECTORS),
    Int("timestamp_age", 8),
    Int("timestamp_origin", 1),
)
SMART_FIELDS: tuple[Field, ...] = (
    *(Int(name, 8) for name in ("bytes_read", "bytes_written", "read_commands", "write_commands", "busy_ns")),
    *(Int(name, 8) for name in ("power_cycles", "power_on_ms", "unsafe_shutdowns", "media_errors", "error_entries")),
)
ERROR = _structure(
    "nvme/nvmove/error",
    Int("count", 8),
    *(Int(name, 2) for name in ("sqid", "cid", "status", "location")),
    Int("lba", 8),
    Int("nsid", 4),
    Int("opcode", 1),
)


def _numbers(values: Sequence[int]) -> list[Tree]:
    return [{"value": value} for value in values]


def _plain(trees: Sequence[Tree]) -> list[int]:
    return [tree["value"] for tree in trees]


def _chosen(source: Any, wire: Sequence[Field]) -> Tree:
    return {f.name: getattr(source, f.name) for f in wire}


def _each(sources: Sequence[Any], structure: VMStateDescription) -> list[Tree]:
    return [_chosen(source, structure.fields) for source in sources]


def features_tree(state: FeaturesState) -> Tree:
    """Return what of the features QEMU's fields do not hold."""
    tree = _chosen(state, FEATURES_FIELDS)
    return tree | {"coalescing_disabled": _numbers(state.coalescing_disabled)}


def smart_tree(state: SmartState) -> Tree:
    """Return what of SMART QEMU's fields do not hold."""
    return _chosen(state, SMART_FIELDS)


def queues_tree(queues: Sequence[SubmissionQueueState]) -> Tree:
    """Return what of the submission queues QEMU's fields do not hold, of those that have any of it."""
    return {
        "queues": [
            {"sqid": sq.sqid, "priority": sq.priority, "aborted": _numbers(sq.aborted)}
            for sq in queues
            if sq.priority or sq.aborted
        ]
    }


EMPTY_QUEUES: Tree = {"queues": []}
EMPTY_ERRORS: Tree = {"entries": []}
EMPTY_CHANGED: Tree = {"namespaces": []}
NO_HIGH_VECTORS: Tree = {"high": b""}
NO_MORE_AERS: Tree = {"cids": []}
NONE_HELD: Tree = {"commands": []}
NO_DOORBELL_BUFFERS: Tree = {"dbcs": False, "late": []}
DEFAULTS: dict[str, Tree] = {
    FEATURES: features_tree(FeaturesState()),
    SMART: smart_tree(SmartState()),
    QUEUES: EMPTY_QUEUES,
    ERROR_LOG: EMPTY_ERRORS,
    CHANGED: EMPTY_CHANGED,
    IRQ_STATUS: NO_HIGH_VECTORS,
    REQUESTS: NO_MORE_AERS,
    HELD: NONE_HELD,
    DOORBELLS: NO_DOORBELL_BUFFERS,
}
"""What an absent subsection stands for; those not listed are always there."""


def _subsection(name: str, *wire: Field) -> VMStateDescription:
    needed = _default(DEFAULTS[name]) if name in DEFAULTS else lambda _: True
    return VMStateDescription(name, fields=wire, needed=needed)


SUBSECTIONS = (
    _subsection(IDENTITY, *IDENTITY_FIELDS),
    _subsection(NAMESPACES, Counted("namespaces", NAMESPACE, MAX_NAMESPACES)),
    _subsection(QUEUES, Counted("queues", QUEUE, MAX_QUEUES)),
    _subsection(FEATURES, *FEATURES_FIELDS),
    _subsection(SMART, *SMART_FIELDS),
    _subsection(ERROR_LOG, Counted("entries", ERROR, MAX_ERRORS)),
    _subsection(CHANGED, Counted("namespaces", NUMBER, MAX_CHANGED)),
    _subsection(IRQ_STATUS, Blob("high", MAX_VECTORS // 8)),
    _subsection(REQUESTS, Counted("cids", NUMBER, MAX_QUEUES)),
    _subsection(HELD, Counted("commands", HELD_COMMAND, MAX_HELD)),
    _subsection(DOORBELLS, Bool("dbcs"), Counted("late", LATE, 2 * MAX_QUEUES)),
)


def to_subsections(state: ControllerState) -> Tree:
    """Return every subsection of `state` by name, the ones at their defaults too."""
    high = state.irq_status >> 32
    return {
        IDENTITY: _chosen(state.identity, IDENTITY_FIELDS),
        NAMESPACES: {"namespaces": _each(state.namespaces, NAMESPACE)},
        QUEUES: queues_tree(state.sqs),
        FEATURES: features_tree(state.features),
        SMART: smart_tree(state.smart),
        ERROR_LOG: {"entries": _each(state.error_log, ERROR)},
        CHANGED: {"namespaces": _numbers(state.changed_namespaces)},
        IRQ_STATUS: {"high": high.to_bytes((high.bit_length() + 7) // 8, "little")},
        REQUESTS: {"cids": _numbers(state.events.outstanding[MAX_AERS:])},
        HELD: {"commands": _each(state.held, HELD_COMMAND)},
        DOORBELLS: {"dbcs": state.doorbells.dbcs, "late": _each(state.doorbells.late, LATE)},
    }


def identity(tree: Tree, **of_qemu: Any) -> IdentityState:
    """Return the identity: its subsection, and what QEMU's fields hold of it."""
    return IdentityState(**tree[IDENTITY], **of_qemu)


def namespaces(tree: Tree) -> list[NamespaceState]:
    """Return the namespaces; raise StateError when their ids do not ascend from 1."""
    found = [NamespaceState(**namespace) for namespace in tree[NAMESPACES]["namespaces"]]
    ids = [namespace.nsid for namespace in found]
    if ids != sorted(set(ids)) or 0 in ids:
        raise StateError(f"{NAMESPACES}: the ids {ids} do not ascend from 1")
    return found


def features(tree: Tree, **of_qemu: Any) -> FeaturesState:
    """Return the features: their subsection, and what QEMU's fields hold of them."""
    ours = dict(tree[FEATURES])
    ours["coalescing_disabled"] = _plain(ours["coalescing_disabled"])
    return FeaturesState(**ours, **of_qemu)


def smart(tree: Tree, **of_qemu: Any) -> SmartState:
    """Return SMART: its subsection, and what QEMU's fields hold of it."""
    return SmartState(**tree[SMART], **of_qemu)


def error_log(tree: Tree) -> list[ErrorEntryState]:
    """Return the error log."""
    return [ErrorEntryState(**entry) for entry in tree[ERROR_LOG]["entries"]]


def changed_namespaces(tree: Tree) -> list[int]:
    """Return the changed-namespace list."""
    return _plain(tree[CHANGED]["namespaces"])


def more_aers(tree: Tree) -> list[int]:
    """Return the outstanding AERs that QEMU's fields have no room for."""
    return _plain(tree[REQUESTS]["cids"])


def held(tree: Tree) -> list[HeldState]:
    """Return the commands that are to be tried again."""
    return [HeldState(**command) for command in tree[HELD]["commands"]]


def doorbells(tree: Tree, **of_qemu: Any) -> DoorbellsState:
    """Return Doorbell Buffer Config: its subsection, and what QEMU's fields hold of it."""
    own = tree[DOORBELLS]
    return DoorbellsState(dbcs=own["dbcs"], late=[LateState(**late) for late in own["late"]], **of_qemu)


def irq_status(tree: Tree) -> int:
    """Return the INTx status of all vectors; QEMU's field has the first 32."""
    return int(tree["irq_status"]) | int.from_bytes(tree[IRQ_STATUS]["high"], "little") << 32


def set_queue_extras(tree: Tree, queues: Sequence[SubmissionQueueState]) -> None:
    """Set what QEMU's fields do not hold in `queues`; raise StateError for a queue that does not exist."""
    by_id = {sq.sqid: sq for sq in queues}
    for extra in tree[QUEUES]["queues"]:
        if extra["sqid"] not in by_id:
            raise StateError(f"{QUEUES}: there is no submission queue {extra['sqid']}")
        sq = by_id[extra["sqid"]]
        sq.priority, sq.aborted = extra["priority"], _plain(extra["aborted"])


assert {f.name for f in fields(NamespaceState)} == {f.name for f in NAMESPACE.fields}
assert {f.name for f in fields(ErrorEntryState)} == {f.name for f in ERROR.fields}
assert {f.name for f in fields(LateState)} == {f.name for f in LATE.fields}
assert {f.name for f in fields(HeldState)} == {f.name for f in HELD_COMMAND.fields}
