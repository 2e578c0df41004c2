"""Saved states to test with: some made by hand, and any that a controller could have."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from nvmove.nvme.state.saved import (
    CompletionQueueState,
    ControllerState,
    DoorbellsState,
    ErrorEntryState,
    EventsState,
    EventState,
    FeaturesState,
    HeldState,
    IdentityState,
    LateState,
    NamespaceState,
    SmartState,
    SubmissionQueueState,
)
from nvmove.nvme.state.vmsd import DeviceState, PciImage

U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
VECTORS = 9


def config_space(vectors: int = VECTORS, seed: int | None = None) -> bytes:
    """PCI configuration space with an MSI-X capability at 40h, the rest random or zero."""
    config = bytearray(4096) if seed is None else bytearray(random.Random(seed).randbytes(4096))
    config[0x34] = 0x40
    config[0x40:0x44] = bytes([0x11, 0x00]) + (0x8000 | vectors - 1).to_bytes(2, "little")
    return bytes(config)


def identity(pairs: int = 8, vectors: int = VECTORS) -> IdentityState:
    """QEMU's defaults, but for the numbers given."""
    return IdentityState(
        serial="S1",
        model="QEMU NVMe Ctrl",
        firmware_version="11.1.3",
        cap=0x004008200F0107FF,
        version=0x20000,
        max_ioqpairs=pairs,
        msix_qsize=vectors,
        mdts=7,
        aerl=3,
        cntlid=0,
        use_intel_id=False,
    )


def fresh() -> DeviceState:
    """A device before the guest enabled it, without a namespace."""
    zero: dict[str, Any] = dict.fromkeys(("cc", "csts", "intms", "aqa", "asq", "acq", "irq_status"), 0)
    controller = ControllerState(
        identity=identity(),
        **zero,
        sqs=[],
        cqs=[],
        events=EventsState(),
        features=FeaturesState(),
        smart=SmartState(),
        error_log=[],
        changed_namespaces=[],
        namespaces=[],
        held=[],
    )
    return DeviceState(PciImage(config_space(), bytes(16 * VECTORS)), controller)


def namespace(nsid: int) -> NamespaceState:
    """A namespace of 1 GiB."""
    return NamespaceState(
        nsid=nsid,
        attached=True,
        blocks=1 << 21,
        block_shift=9,
        uuid=bytes(range(nsid, nsid + 16)),
        nguid=bytes(16),
        eui64=0x5254_0000_0000_0000 | nsid,
        read_only=False,
    )


def busy() -> DeviceState:
    """A device at work: sparse queues, a shared CQ, AERs, events, three namespaces, every counter and list in use."""
    controller = ControllerState(
        identity=identity(),
        cc=0x00460001,
        csts=1,
        intms=0,
        aqa=0x001F001F,
        asq=0x175C4000,
        acq=0x175C3000,
        irq_status=0,
        sqs=[
            SubmissionQueueState(sqid=0, cqid=0, address=0x175C4000, size=32, head=21, tail=21),
            SubmissionQueueState(sqid=1, cqid=1, address=0x17CD0000, size=1024, head=1000, tail=3, aborted=[7, 5]),
            SubmissionQueueState(sqid=3, cqid=1, address=0x17CE0000, size=1024, head=3, tail=3, priority=2),
        ],
        cqs=[
            CompletionQueueState(0, 0x175C3000, 32, head=20, tail=20, phase=1, vector=0, irq_enabled=True),
            CompletionQueueState(1, 0x17CB8000, 1024, head=7, tail=9, phase=0, vector=1, irq_enabled=True),
            CompletionQueueState(4, 0x17CBC000, 2, head=1, tail=0, phase=1, vector=3, irq_enabled=False),
        ],
        events=EventsState(outstanding=[31, 4], queued=[EventState(2, 0, 4), EventState(1, 1, 2)], masked=[0, 2]),
        features=FeaturesState(
            arbitration=3,
            temperature_over=343,
            temperature_under=200,
            volatile_write_cache=0,
            number_of_queues=0x00070007,
            interrupt_coalescing=0x0104,
            coalescing_disabled=[2, 3],
            write_atomicity=1,
            async_event_configuration=0x100,
            timestamp=1_795_000_000_000,
            timestamp_age=1234,
            timestamp_origin=1,
            host_behavior=bytes([1, 0, 1, 0, 0x34, 0x12]) + bytes(506),
        ),
        smart=SmartState(
            bytes_read=1 << 40, bytes_written=4096, read_commands=9, write_commands=1, busy_ns=77, power_on_ms=99,
            unsafe_shutdowns=1, media_errors=2, error_entries=3, temperature=330, critical_warning=4,
        ),
        error_log=[ErrorEntryState(3, 1, 77, 0x4281, 0xFFFF, 1 << 33, 2, 2), ErrorEntryState(2, 0, 1, 2, 40, 0, 0, 6)],
        changed_namespaces=[2, 3],
        namespaces=[namespace(1), namespace(2), namespace(7)],
        held=[],
    )  # fmt: skip
    pci = PciImage(config_space(seed=1), bytes(range(16 * VECTORS)), pending=(1, 8), intx=False)
    return DeviceState(pci, controller)


def pin() -> DeviceState:
    """A device that interrupts by INTx, with a vector beyond the 32 that QEMU's field has, and 4 KiB blocks."""
    state = busy()
    controller = state.controller
    controller.irq_status = 1 << 40 | 2
    controller.namespaces = [namespace(2)]
    controller.namespaces[0].block_shift = 12
    controller.sqs[1].aborted.clear()
    return DeviceState(PciImage(config_space(), bytes(16 * VECTORS), intx=True), controller)


def held() -> DeviceState:
    """As `busy`, with commands held in two queues, one of them aborted."""
    state = busy()
    write = bytes([1, 0, 5, 0, 2, 0, 0, 0]) + bytes(range(16, 72))
    flush = bytes([0, 0, 6, 0, 2]) + bytes(59)
    read = bytes([2, 0, 5, 0, 7]) + bytes(59)
    state.controller.held = [HeldState(1, False, write), HeldState(1, True, flush), HeldState(3, False, read)]
    return state


def shadow() -> DeviceState:
    """As `held`, with shadow doorbells, which the admin queue has not moved to."""
    state = held()
    late = [LateState(0, 2), LateState(1, 1)]
    state.controller.doorbells = DoorbellsState(True, True, 0x17D0_0000, 0x17D0_1000, late)
    return state


SAMPLES = {"fresh": fresh, "busy": busy, "pin": pin, "held": held, "shadow": shadow}


@st.composite
def queue_pairs(draw: st.DrawFn, pairs: int) -> tuple[list[SubmissionQueueState], list[CompletionQueueState]]:
    """Any queues: ids are their own, all else is anything that fits."""
    sqids = sorted(draw(st.sets(st.integers(0, pairs), max_size=4)))
    cqids = sorted(draw(st.sets(st.integers(0, pairs), max_size=4)))
    lists = st.lists(U16, max_size=3)
    sqs = [draw(st.builds(SubmissionQueueState, st.just(i), U16, U64, U32, U32, U32, U8, lists)) for i in sqids]
    phases = st.integers(0, 1)
    cqs = [
        draw(st.builds(CompletionQueueState, st.just(i), U64, U32, U32, U32, phases, U32, st.booleans())) for i in cqids
    ]
    return sqs, cqs


@st.composite
def states(draw: st.DrawFn) -> DeviceState:
    """Any state that the wire form can carry. Every field of every class is drawn, so that none is forgotten."""
    pairs, vectors = draw(st.integers(0, 5)), draw(st.integers(1, 20))
    sqs, cqs = draw(queue_pairs(pairs))
    text = st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=8)
    b512, b16 = st.binary(min_size=512, max_size=512), st.binary(min_size=16, max_size=16)
    vector_sets = st.sets(st.integers(0, vectors - 1)).map(sorted)
    namespace_ids = sorted(draw(st.sets(st.integers(1, 1 << 32 - 1), max_size=3)))
    builds = st.builds(NamespaceState, U32, st.booleans(), U64, U8, b16, b16, U64, st.booleans(), U32)
    drawn = [draw(builds) for _ in namespace_ids]
    for nsid, each in zip(namespace_ids, drawn, strict=True):
        each.nsid = nsid
    events = st.builds(
        EventsState,
        st.lists(U16, max_size=5),
        st.lists(st.builds(EventState, U8, U8, U8), max_size=5),
        st.sets(st.integers(0, 7)).map(sorted),
    )
    wide = st.integers(0, (1 << vectors * 8) - 1)
    features = st.builds(
        FeaturesState, U32, U32, U16, U16, U32, U32, U32, vector_sets, U32, U32, U64, U64, U8, b512, U32
    )
    controller = ControllerState(
        identity=draw(
            st.builds(
                IdentityState, text, text, text, U64, U32, st.just(pairs), st.just(vectors), U8, U8, U16, st.booleans()
            )
        ),
        cc=draw(U32),
        csts=draw(U32),
        intms=draw(U32),
        aqa=draw(U32),
        asq=draw(U64),
        acq=draw(U64),
        irq_status=draw(wide),
        sqs=sqs,
        cqs=cqs,
        events=draw(events),
        features=draw(features),
        smart=draw(st.builds(SmartState, *[U64] * 10, U16, U8)),
        error_log=draw(st.lists(st.builds(ErrorEntryState, U64, U16, U16, U16, U16, U64, U32, U8), max_size=3)),
        changed_namespaces=draw(st.lists(U32, max_size=3)),
        namespaces=drawn,
        held=draw(st.lists(st.builds(HeldState, U16, st.booleans(), st.binary(min_size=64, max_size=64)), max_size=3)),
        doorbells=draw(
            st.builds(
                DoorbellsState,
                st.booleans(),
                st.booleans(),
                U64,
                U64,
                st.lists(st.builds(LateState, U32, U32), max_size=3),
            )
        ),
    )
    table = draw(st.binary(min_size=16 * vectors, max_size=16 * vectors))
    config = config_space(vectors, draw(st.none() | U32))
    return DeviceState(PciImage(config, table, tuple(draw(vector_sets)), draw(st.booleans())), controller)
