"""The device's saved state as a section `nvme`: plain state (state.py) → tree → stream, and back.

QEMU's fields are filled as QEMU would, as far as our state knows them; what QEMU lacks is in our subsections
(vmsd_ours.py). Loading builds the state from the tree, and then the tree from the state again: a field that
says something else than the rest, or uses what we do not have (CMB, PMR, metadata), is refused by its
name. A later version that fills more of QEMU's fields must allow for what older ones wrote there; the golden files show
when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nvmove.nvme.state import vmsd_ours as ours
from nvmove.nvme.state.saved import (
    CompletionQueueState,
    ControllerState,
    EventsState,
    EventState,
    FeaturesState,
    NamespaceState,
    SubmissionQueueState,
)
from nvmove.nvme.state.vmsd_qemu import FIELDS, QEMU_NVME, msix_vectors
from nvmove.vmstate import stream
from nvmove.vmstate.fields import Array, Bool, Buffer, Int, Struct
from nvmove.vmstate.schema import StateError, VMStateDescription
from nvmove.vmstate.tree import Tree

NVME = VMStateDescription("nvme", 1, 1, FIELDS, ours.SUBSECTIONS)
DESCRIPTIONS = {NVME.name: NVME}

CC_EN = 1
CC_MPS_SHIFT = 7
"""Base 3.1.3.5."""
AER_OPCODE = 0x0C
"""Base 5: Asynchronous Event Request."""
NAMESPACE_ID = 1
"""The namespace that QEMU's section has room for: the controller's own."""


@dataclass(frozen=True, slots=True)
class PciImage:
    """The PCI function around the controller, as saved."""

    config: bytes
    """Configuration space, 4096 bytes, BARs, COMMAND and MSI-X control as the guest wrote them."""
    msix_table: bytes
    """The MSI-X table, 16 bytes a vector."""
    pending: tuple[int, ...] = ()
    """Vectors with a message not sent, in ascending order."""
    intx: bool = False
    """The level of the INTx pin."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """All that is saved of a device."""

    pci: PciImage
    controller: ControllerState


def dump(state: DeviceState) -> bytes:
    """Return `state` as a stream of one section."""
    return stream.dump([(stream.Section(NVME.name, to_tree(state)), NVME)])


def load(data: bytes) -> DeviceState:
    """Return the state in a stream that `dump` wrote; raise StateError, one line that names what is wrong."""
    sections = stream.load(data, DESCRIPTIONS)
    if len(sections) != 1:
        raise StateError("the state has no section 'nvme'")
    return from_tree(sections[0].tree)


def zeroes(description: VMStateDescription) -> Tree:
    """Return the tree of a structure that is all zeroes."""
    tree: Tree = {}
    for field in description.fields:
        match field:
            case Int():
                tree[field.name] = 0
            case Bool():
                tree[field.name] = False
            case Buffer(size=int(size)):
                tree[field.name] = bytes(size)
            case Struct():
                tree[field.name] = zeroes(field.description)
            case Array(element=Int()):
                tree[field.name] = [0] * field.count
            case Array(element=VMStateDescription() as element):
                tree[field.name] = [zeroes(element) for _ in range(field.count)]
            case _:
                raise TypeError(f"{description.name}.{field.name} is of no fixed size")
    return tree


def _struct(name: str, within: VMStateDescription = QEMU_NVME) -> VMStateDescription:
    return next(f.description for f in within.fields if isinstance(f, Struct) and f.name == name)


ZERO_BAR = zeroes(_struct("bar"))
ZERO_NAMESPACE = zeroes(_struct("namespace"))
ZERO_ATOMIC = zeroes(_struct("atomic"))
ZERO_REQUEST = zeroes(next(f for f in FIELDS if f.name == "aer_reqs").description)  # type: ignore[attr-defined]


def to_tree(state: DeviceState) -> Tree:
    """Return `state` as a tree of the section `nvme`, all subsections included."""
    return {**_pci_tree(state.pci), **_controller_tree(state.controller), **ours.to_subsections(state.controller)}


def _pci_tree(pci: PciImage) -> Tree:
    vectors = msix_vectors(pci.config)
    pending = sum(1 << vector for vector in pci.pending).to_bytes((vectors + 7) // 8, "little")
    return {
        "parent_obj[0]": {
            "version_id": 2,
            "config[1]": pci.config,
            "irq_state": pci.intx.to_bytes(4, "big") + bytes(12),
        },
        "parent_obj[1]": {"msix": pci.msix_table + pending},
    }


def _controller_tree(c: ControllerState) -> Tree:
    page_bits = 12 + (c.cc >> CC_MPS_SHIFT & 0xF) if c.cc & CC_EN else 0
    pairs = c.identity.max_ioqpairs
    sqs = {sq.sqid: _sq_tree(sq) for sq in c.sqs}
    cqs = {cq.cqid: _cq_tree(cq) for cq in c.cqs}
    return {
        "bar": ZERO_BAR
        | {"cap": c.identity.cap, "vs": c.identity.version, "intms": c.intms, "intmc": c.intms}
        | {"cc": c.cc, "csts": c.csts, "aqa": c.aqa, "asq": c.asq, "acq": c.acq},
        "qs_created": any(cq.cqid for cq in c.cqs),
        "page_size": 1 << page_bits if page_bits else 0,
        "page_bits": page_bits,
        "max_prp_ents": (1 << page_bits >> 3) & 0xFFFF,
        "max_q_ents": 0,
        "outstanding_aers": min(len(c.events.outstanding), ours.MAX_AERS),
        "irq_status": c.irq_status & 0xFFFF_FFFF,
        "cq_pending": sum(cq.irq_enabled and cq.head != cq.tail for cq in c.cqs),
        "host_timestamp": c.features.timestamp,
        "timestamp_set_qemu_clock_ms": 0,
        "starttime_ms": 0,
        "temperature": c.smart.temperature,
        "smart_critical_warning": c.smart.critical_warning,
        "conf_msix_qsize": c.identity.msix_qsize,
        "conf_ioqpairs": pairs,
        "dbbuf_dbs": c.doorbells.dbs,
        "dbbuf_eis": c.doorbells.eis,
        "dbbuf_enabled": c.doorbells.enabled,
        "aer_mask": sum(1 << kind for kind in c.events.masked),
        "aer_reqs": [_aer_tree(cid) for cid in c.events.outstanding[: ours.MAX_AERS]],
        "aer_queue": [_event_tree(event) for event in c.events.queued],
        "aer_queued": len(c.events.queued),
        "namespace": _namespace_tree(c),
        "sq": [sqs.get(index) for index in range(pairs + 1)],
        "cq": [cqs.get(index) for index in range(pairs + 1)],
        "features.temp_thresh_hi": c.features.temperature_over,
        "features.temp_thresh_low": c.features.temperature_under,
        "features.async_config": c.features.async_event_configuration,
        "features.hbs": _host_behavior_tree(c.features),
        "dn": c.features.write_atomicity,
        "atomic": ZERO_ATOMIC,
    }


def _sq_tree(sq: SubmissionQueueState) -> Tree:
    return {
        "sqid": sq.sqid,
        "cqid": sq.cqid,
        "head": sq.head,
        "tail": sq.tail,
        "size": sq.size,
        "dma_addr": sq.address,
    }


def _cq_tree(cq: CompletionQueueState) -> Tree:
    return {
        "phase": cq.phase,
        "cqid": cq.cqid,
        "irq_enabled": int(cq.irq_enabled),
        "head": cq.head,
        "tail": cq.tail,
        "vector": cq.vector,
        "size": cq.size,
        "dma_addr": cq.address,
        "req_list": [],
    }


def _aer_tree(cid: int) -> Tree:
    command = ZERO_REQUEST["cmd"] | {"opcode": AER_OPCODE, "cid": cid}
    return ZERO_REQUEST | {"cqe": ZERO_REQUEST["cqe"] | {"cid": cid}, "cmd": command}


def _event_tree(event: EventState) -> Tree:
    return {"result": {"event_type": event.kind, "event_info": event.info, "log_page": event.log, "resv": 0}}


def _namespace_tree(c: ControllerState) -> Tree:
    own = next((namespace for namespace in c.namespaces if namespace.nsid == NAMESPACE_ID), None)
    tree = ZERO_NAMESPACE | {"tmp": {"enable_write_cache": bool(c.features.volatile_write_cache & 1)}}
    return tree if own is None else tree | _own_namespace_tree(own)


def _own_namespace_tree(own: NamespaceState) -> Tree:
    sizes = {"nsze": own.blocks, "ncap": own.blocks, "nuse": own.blocks}
    return {
        "id_ns": ZERO_NAMESPACE["id_ns"] | sizes | {"nguid": own.nguid, "eui64": own.eui64},
        "lbaf": {"ms": 0, "ds": own.block_shift, "rp": 0},
        "features.err_rec": own.error_recovery,
    }


def _host_behavior_tree(features: FeaturesState) -> Tree:
    raw = features.host_behavior
    return {
        "acre": raw[0],
        "etdas": raw[1],
        "lbafee": raw[2],
        "rsvd3": raw[3],
        "cdfe": int.from_bytes(raw[4:6], "little"),
        "rsvd6": raw[6:],
    }


def from_tree(tree: Tree) -> DeviceState:
    """Return the state in a tree of the section `nvme`; raise StateError when it contradicts itself or us."""
    if missing := [s.name for s in ours.SUBSECTIONS if s.name not in tree and s.name not in ours.DEFAULTS]:
        raise StateError(f"nvme: subsection {missing[0]!r} is missing: this state is not nvmove's")
    tree = ours.DEFAULTS | tree
    state = DeviceState(_pci_from(tree), _controller_from(tree))
    if state.controller.identity.msix_qsize != (vectors := msix_vectors(state.pci.config)):
        asked = state.controller.identity.msix_qsize
        raise StateError(f"nvme.conf_msix_qsize: {asked}, but the MSI-X capability has {vectors}")
    _refuse_difference("nvme", tree, to_tree(state))
    return state


def _pci_from(tree: Tree) -> PciImage:
    config, msix = tree["parent_obj[0]"]["config[1]"], tree["parent_obj[1]"]["msix"]
    vectors = msix_vectors(config)
    bits = int.from_bytes(msix[16 * vectors :], "little")
    if bits >> vectors:
        raise StateError(f"nvme.parent_obj[1].msix: a message pending for vector {bits.bit_length() - 1} of {vectors}")
    return PciImage(
        config=config,
        msix_table=msix[: 16 * vectors],
        pending=tuple(vector for vector in range(vectors) if bits >> vector & 1),
        intx=tree["parent_obj[0]"]["irq_state"][3] == 1,
    )


def _controller_from(tree: Tree) -> ControllerState:
    bar = tree["bar"]
    sqs = [_sq_from(index, sq) for index, sq in enumerate(tree["sq"]) if sq is not None]
    ours.set_queue_extras(tree, sqs)
    return ControllerState(
        identity=ours.identity(
            tree,
            cap=bar["cap"],
            version=bar["vs"],
            max_ioqpairs=tree["conf_ioqpairs"],
            msix_qsize=tree["conf_msix_qsize"],
        ),
        cc=bar["cc"],
        csts=bar["csts"],
        intms=bar["intms"],
        aqa=bar["aqa"],
        asq=bar["asq"],
        acq=bar["acq"],
        irq_status=ours.irq_status(tree),
        sqs=sqs,
        cqs=[_cq_from(index, cq) for index, cq in enumerate(tree["cq"]) if cq is not None],
        events=_events_from(tree),
        features=_features_from(tree),
        smart=ours.smart(tree, temperature=tree["temperature"], critical_warning=tree["smart_critical_warning"]),
        error_log=ours.error_log(tree),
        changed_namespaces=ours.changed_namespaces(tree),
        namespaces=ours.namespaces(tree),
        held=ours.held(tree),
        doorbells=ours.doorbells(tree, enabled=tree["dbbuf_enabled"], dbs=tree["dbbuf_dbs"], eis=tree["dbbuf_eis"]),
    )


def _sq_from(index: int, sq: Tree) -> SubmissionQueueState:
    if sq["sqid"] != index:
        raise StateError(f"nvme.sq[{index}].sqid: {sq['sqid']}, not its index")
    return SubmissionQueueState(
        sqid=index, cqid=sq["cqid"], address=sq["dma_addr"], size=sq["size"], head=sq["head"], tail=sq["tail"]
    )


def _cq_from(index: int, cq: Tree) -> CompletionQueueState:
    if cq["cqid"] != index:
        raise StateError(f"nvme.cq[{index}].cqid: {cq['cqid']}, not its index")
    if cq["req_list"]:
        raise StateError(f"nvme.cq[{index}].req_list: completions that were not posted are not known here")
    return CompletionQueueState(
        cqid=index,
        address=cq["dma_addr"],
        size=cq["size"],
        head=cq["head"],
        tail=cq["tail"],
        phase=cq["phase"],
        vector=cq["vector"],
        irq_enabled=cq["irq_enabled"] != 0,
    )


def _events_from(tree: Tree) -> EventsState:
    if None in tree["aer_reqs"]:
        raise StateError("nvme.aer_reqs: a request that is not there")
    return EventsState(
        outstanding=[request["cmd"]["cid"] for request in tree["aer_reqs"]] + ours.more_aers(tree),
        queued=[
            EventState(kind=result["event_type"], info=result["event_info"], log=result["log_page"])
            for result in (event["result"] for event in tree["aer_queue"])
        ],
        masked=[kind for kind in range(8) if tree["aer_mask"] >> kind & 1],
    )


def _features_from(tree: Tree) -> FeaturesState:
    hbs = tree["features.hbs"]
    return ours.features(
        tree,
        temperature_over=tree["features.temp_thresh_hi"],
        temperature_under=tree["features.temp_thresh_low"],
        write_atomicity=tree["dn"],
        async_event_configuration=tree["features.async_config"],
        timestamp=tree["host_timestamp"],
        host_behavior=bytes([hbs["acre"], hbs["etdas"], hbs["lbafee"], hbs["rsvd3"]])
        + hbs["cdfe"].to_bytes(2, "little")
        + hbs["rsvd6"],
    )


def _refuse_difference(path: str, found: Any, meant: Any) -> None:
    """Raise StateError for the first field in `found` that is not what the state as a whole means."""
    if found == meant:
        return
    if isinstance(found, dict) and isinstance(meant, dict):
        for name in found:
            _refuse_difference(name if name.startswith(ours.PREFIX) else f"{path}.{name}", found[name], meant[name])
    elif isinstance(found, list) and isinstance(meant, list) and len(found) == len(meant):
        for index, pair in enumerate(zip(found, meant, strict=True)):
            _refuse_difference(f"{path}[{index}]", *pair)
    else:
        raise StateError(f"{path}: {_shown(found)}, which the rest of the state or this version rules out")


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        at = next((index for index, byte in enumerate(value) if byte), 0)
        return f"byte {at} is {value[at]:#04x}" if value else "empty"
    return repr(value) if isinstance(value, int | str) else f"{len(value)} entries"
