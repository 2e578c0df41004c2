"""All of a controller's state that is saved, as plain data, and nothing else.

None of these types is used by the live controller. `nvmove.nvme.state.vmsd` gives them their wire form.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CompletionQueueState:
    """A completion queue; positions in entries."""

    cqid: int
    address: int
    size: int
    head: int
    tail: int
    phase: int
    vector: int
    irq_enabled: bool


@dataclass(slots=True)
class SubmissionQueueState:
    """A submission queue; positions in entries."""

    sqid: int
    cqid: int
    address: int
    size: int
    head: int
    tail: int
    priority: int = 0
    aborted: list[int] = field(default_factory=list)
    """Ring positions, between head and tail, of commands that an Abort found; ascending."""


@dataclass(slots=True)
class HeldState:
    """A command that failed at the back end and is to be tried again."""

    sqid: int
    aborted: bool
    """An Abort hit it: it completes as aborted instead."""
    sqe: bytes
    """The submission queue entry, 64 bytes; its data pointer is the guest's."""


@dataclass(slots=True)
class EventState:
    """An asynchronous event: type, information, log page."""

    kind: int
    info: int
    log: int


@dataclass(slots=True)
class EventsState:
    """Asynchronous event requests and events."""

    outstanding: list[int] = field(default_factory=list)
    """Command ids of the host's requests, oldest first."""
    queued: list[EventState] = field(default_factory=list)
    """Events not delivered yet, oldest first."""
    masked: list[int] = field(default_factory=list)
    """Event types delivered whose log page was not read since."""


@dataclass(slots=True)
class FeaturesState:
    """Feature values, by Base 5.27.1's names; raw dword 11 values where not said otherwise."""

    arbitration: int = 0
    power_management: int = 0
    temperature_over: int = 0
    temperature_under: int = 0
    """Kelvin."""
    volatile_write_cache: int = 1
    number_of_queues: int = 0
    interrupt_coalescing: int = 0
    coalescing_disabled: list[int] = field(default_factory=list)
    """Vectors with Coalescing Disable set."""
    write_atomicity: int = 0
    async_event_configuration: int = 0
    timestamp: int = 0
    """Milliseconds; what the host set, or 0."""
    timestamp_age: int = 0
    """Milliseconds since the host set it, or since power-on."""
    timestamp_origin: int = 0
    """0: not set since reset; 1: by the host."""
    host_behavior: bytes = bytes(512)
    command_set_profile: int = 0


@dataclass(slots=True)
class SmartState:
    """The counters of the SMART log, and what is measured."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_commands: int = 0
    write_commands: int = 0
    busy_ns: int = 0
    power_cycles: int = 1
    power_on_ms: int = 0
    unsafe_shutdowns: int = 0
    media_errors: int = 0
    error_entries: int = 0
    temperature: int = 323
    """Kelvin."""
    critical_warning: int = 0


@dataclass(slots=True)
class ErrorEntryState:
    """One Error Information log entry."""

    count: int
    sqid: int
    cid: int
    status: int
    location: int
    lba: int
    nsid: int
    opcode: int = 0


@dataclass(slots=True)
class NamespaceState:
    """A namespace: its identity must be the destination's, its format and attachment travel."""

    nsid: int
    attached: bool
    blocks: int
    block_shift: int
    """log2 of the logical block size in bytes."""
    uuid: bytes
    nguid: bytes
    eui64: int
    read_only: bool
    error_recovery: int = 0
    """Feature 05h of this namespace."""


@dataclass(slots=True)
class IdentityState:
    """What the destination must be configured with alike, because the guest has seen it."""

    serial: str
    model: str
    firmware_version: str
    cap: int
    version: int
    max_ioqpairs: int
    msix_qsize: int
    mdts: int
    aerl: int
    cntlid: int
    use_intel_id: bool


@dataclass(slots=True)
class LateState:
    """A shadow doorbell that the host has not used yet."""

    cell: int
    """Its index in the buffer."""
    value: int
    """What the controller has put there."""


@dataclass(slots=True)
class DoorbellsState:
    """Doorbell Buffer Config; the buffers themselves are the guest's memory."""

    dbcs: bool = False
    """Whether the command is offered: the guest has seen it."""
    enabled: bool = False
    dbs: int = 0
    """Guest address of the shadow doorbells."""
    eis: int = 0
    """Guest address of EventIdx."""
    late: list[LateState] = field(default_factory=list)
    """In ascending order."""


@dataclass(slots=True)
class ControllerState:
    """Everything."""

    identity: IdentityState
    cc: int
    csts: int
    intms: int
    aqa: int
    asq: int
    acq: int
    irq_status: int
    """INTx: vectors with completions pending, before INTMS."""
    sqs: list[SubmissionQueueState]
    cqs: list[CompletionQueueState]
    events: EventsState
    features: FeaturesState
    smart: SmartState
    error_log: list[ErrorEntryState]
    """Newest first."""
    changed_namespaces: list[int]
    namespaces: list[NamespaceState]
    held: list[HeldState]
    """By queue, each in the order of submission."""
    doorbells: DoorbellsState = field(default_factory=DoorbellsState)
