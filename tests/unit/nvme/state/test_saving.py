"""Save and load: what the guest had, it has again; what contradicts itself or this device is refused untouched."""

from __future__ import annotations

import dataclasses
import errno
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from nvmove.nvme.commands.command import Command
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.controller import Controller
from nvmove.nvme.errors import StateError
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.registers import Registers
from nvmove.nvme.spec import (
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_OCCURRING,
    Admin,
    EventType,
    Feature,
    Log,
    Nvm,
    Register,
    Status,
)
from nvmove.nvme.state.saved import (
    CompletionQueueState,
    ControllerState,
    DoorbellsState,
    EventState,
    LateState,
    NamespaceState,
    SubmissionQueueState,
)
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CC, CONFIG, DATA, Host


def ready(**arguments: object) -> Host:
    host = Host(**arguments)  # type: ignore[arg-type]
    host.enable()
    host.create()
    return host


# --- what travels ----------------------------------------------------------------------------------------------------


def test_a_restored_controller_accepts_doorbells_and_admin_commands() -> None:
    host = ready()
    host.move()
    assert host.csts == CSTS_RDY
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS
    host.create(2)
    assert host.command(2, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_after_restore_every_queue_has_its_worker() -> None:
    host = ready()
    host.create(5, cqid=1)
    host.move()
    assert host.engine.attached == {0, 1, 5}  # type: ignore[attr-defined]


def test_a_doorbell_rung_before_resume_is_not_lost() -> None:
    host = ready()
    state = host.save()
    cid = host.submit(1, Nvm.FLUSH, nsid=1)
    host.replace()
    host.controller.load(state)
    host.ring_sq(1)
    host.drain()
    assert host.peek(1) is None
    host.controller.resume()
    host.drain()
    assert [c.cid for c in host.reap(1)] == [cid]


def test_a_tail_saved_with_the_state_is_scanned_on_resume() -> None:
    host = ready()
    host.controller.pause(0)
    cid = host.submit(1, Nvm.FLUSH, nsid=1)
    host.move()
    host.drain()
    assert [c.cid for c in host.reap(1)] == [cid]


def test_csts_travels_ten_times() -> None:
    host = ready()
    for _ in range(10):
        host.move()
        assert host.csts == CSTS_RDY
        assert host.command(1, Nvm.READ, nsid=1).status == Status.SUCCESS
    host.set(Register.CC, CC | 1 | 1 << 14)
    host.drain()
    host.move()
    assert host.csts == CSTS_RDY | CSTS_SHST_COMPLETE
    host.disable()
    host.set(Register.AQA, 0)
    host.set(Register.CC, CC | 1)
    host.move()
    assert host.csts == CSTS_CFS


def test_a_shutdown_asked_for_before_the_save_is_completed_after_the_load() -> None:
    host = ready()
    host.controller.pause(0)
    host.set(Register.CC, CC | 1 | 1 << 14)
    host.drain()
    host.move()
    assert host.csts == CSTS_RDY | CSTS_SHST_OCCURRING
    host.drain()
    assert host.csts == CSTS_RDY | CSTS_SHST_COMPLETE


def test_event_requests_travel_in_order_and_do_not_hold_up_a_save() -> None:
    host = ready()
    cids = [host.submit(0, Admin.ASYNC_EVENT_REQUEST) for _ in range(3)]
    host.drain()
    state = host.move()
    assert state.events.outstanding == cids
    host.controller.raise_event(EventType.ERROR, 0, Log.ERROR_INFORMATION)
    host.controller.raise_event(EventType.ERROR, 1, Log.ERROR_INFORMATION)
    host.drain()
    assert [(c.cid, c.result) for c in host.reap(0)] == [(cids[0], 0x1_0000)]
    state = host.move()  # one delivered and masked, one queued
    assert (state.events.masked, len(state.events.queued)) == ([EventType.ERROR], 1)
    host.submit(0, Admin.GET_LOG_PAGE, cdw10=15 << 16 | Log.ERROR_INFORMATION)
    host.drain()
    assert (cids[1], 0x1_0100) in [(c.cid, c.result) for c in host.reap(0)]


def test_a_create_sq_is_not_completed_twice() -> None:
    host = ready()
    host.submit(0, Admin.CREATE_SQ, prp1=0xB_0000, cdw10=15 << 16 | 3, cdw11=1 << 16 | 1)
    host.drain()
    host.move()
    host.drain()
    assert len(host.reap(0)) == 1


def test_a_full_cq_travels() -> None:
    host = Host()
    host.enable()
    host.create(cq_size=3)
    cids = [host.submit(1, Nvm.FLUSH, nsid=1) for _ in range(5)]
    host.drain()
    host.move()
    host.drain()
    assert [c.cid for c in host.reap(1)] == cids[:2]
    host.drain()
    host.move()
    assert [c.cid for c in host.reap(1)] == cids[2:4]
    host.drain()
    assert [c.cid for c in host.reap(1)] == cids[4:]


def test_sparse_queue_ids_a_shared_cq_and_a_cq_without_an_sq_travel() -> None:
    host = Host()
    host.enable()
    for qid in (1, 2, 3):
        host.create(qid)
    host.delete_sq(2)
    host.create(5, cqid=3)
    host.move()
    assert sorted(host.controller.sqs) == [0, 1, 3, 5]
    assert sorted(host.controller.cqs) == [0, 1, 2, 3]
    assert host.controller.cqs[3].sqs == {3, 5}
    for qid in (1, 3, 5):
        assert host.command(qid, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
    assert host.delete_cq(2).status == Status.SUCCESS
    assert host.delete_cq(3).status == Status.INVALID_QUEUE_DELETION


@pytest.mark.parametrize("turns", range(9))
def test_phase_and_positions_travel_at_every_wrap_position(turns: int) -> None:
    host = Host()
    host.enable()
    host.create(sq_size=3, cq_size=4)
    for _ in range(turns):
        host.command(1, Nvm.FLUSH, nsid=1)
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    host.move()
    assert len(host.reap(1)) == 1
    for _ in range(5):
        assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_vectors_with_completions_are_signalled_on_resume() -> None:
    host = Host()
    host.enable()
    host.create(1, vector=1)
    host.create(2, vector=2)
    host.submit(2, Nvm.FLUSH, nsid=1)
    host.drain()
    host.move()
    assert host.lines.signals == [2]


def test_intms_and_the_pin_travel() -> None:
    host = ready(lines=Lines(msix=False))
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    host.set(Register.INTMS, 1)
    state = host.move()
    assert state.irq_status == 1
    assert not host.lines.up()
    host.set(Register.INTMC, 1)
    assert host.lines.up()
    host.move()
    assert host.lines.up()


def test_abort_marks_travel() -> None:
    host = Host()
    host.enable()
    host.create(cq_size=2)
    cids = [host.submit(1, Nvm.FLUSH, nsid=1) for _ in range(3)]
    host.drain()
    host.admin(Admin.ABORT, cdw10=cids[1] << 16 | 1)
    host.move()
    host.reap(1)
    host.drain()
    assert [(c.cid, c.status) for c in host.reap(1)] == [(cids[1], Status.ABORT_REQUESTED)]


def test_features_counters_and_logs_travel() -> None:
    host = ready()
    host.command(1, Nvm.WRITE, nsid=1)
    host.command(1, Nvm.READ, nsid=1)
    host.admin(Admin.SET_FEATURES, cdw10=Feature.ASYNC_EVENT_CONFIGURATION, cdw11=0x11F)
    host.ram.data[DATA] = 1
    host.admin(Admin.SET_FEATURES, cdw10=Feature.HOST_BEHAVIOR_SUPPORT)
    host.admin(Admin.IDENTIFY, cdw10=0xFF)
    host.controller.logs.changed.add(7)
    host.move()
    logs, features = host.controller.logs, host.controller.features
    assert (logs.smart.read_commands, logs.smart.write_commands, logs.smart.bytes_written) == (1, 1, 512)
    assert (logs.errors.count, len(logs.errors.entries), logs.changed) == (1, 1, {7})
    assert features.async_event_configuration == 0x11F
    assert features.host_behavior[0] == 1


def test_save_before_the_guest_enabled_and_without_a_namespace() -> None:
    host = Host(config=ControllerConfig(serial="S"))
    host.set(Register.ASQ, 0x5000, 8)
    host.move()
    assert host.get(Register.ASQ, 8) == 0x5000
    host.enable()
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS


def test_identify_after_a_restore_is_what_it_was_before_it() -> None:
    host = ready()
    host.admin(Admin.IDENTIFY, cdw10=1)
    before = bytes(host.ram.data[DATA : DATA + 4096])
    host.config = msgspec.structs.replace(host.config, firmware_version="12.0.0")
    host.move()
    host.admin(Admin.IDENTIFY, cdw10=1)
    assert before == host.ram.data[DATA : DATA + 4096]


def test_loading_into_a_controller_in_use_drops_what_it_had() -> None:
    host = ready()
    state = host.save()
    host.controller.resume()
    host.create(4)
    host.command(1, Nvm.FLUSH, nsid=1)
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    host.controller.pause(0)
    host.controller.load(state)
    assert sorted(host.controller.sqs) == [0, 1]
    assert host.controller.save() == state


def test_a_device_reset_and_a_load_while_paused() -> None:
    """What QEMU does during loadvm."""
    host = ready()
    state = host.save()
    done: list[bool] = []
    host.controller.reset(lambda: done.append(True))
    assert done == [True]
    host.controller.load(state)
    host.controller.resume()
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_the_guest_resets_between_save_and_the_end_of_a_failed_migration() -> None:
    host = ready()
    host.save()
    host.controller.resume()
    host.disable()
    host.enable()
    host.create()
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_save_and_load_want_a_paused_and_idle_controller() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    with pytest.raises(RuntimeError, match="save"):
        host.controller.save()
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    host.controller.pause(0)
    with pytest.raises(RuntimeError, match="save"):
        host.controller.save()
    disk.finish()
    state = host.save()
    host.controller.resume()
    with pytest.raises(RuntimeError, match="load"):
        host.controller.load(state)


def test_inspect_shows_a_running_controller() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    tree = host.controller.inspect()
    assert tree["live"] == {
        "runs": True,
        "paused": False,
        "resetting": False,
        "doorbell_writes": 5,
        "lent": [],
        "in_flight": {0: 0, 1: 1},
    }
    assert tree["sqs"][1]["sqid"] == 1
    msgspec.json.encode(tree)


# --- nothing is forgotten --------------------------------------------------------------------------------------------

SAVED_OR_DERIVED = {
    Controller: {
        "saved": {"registers", "sqs", "cqs", "events", "features", "logs", "namespaces", "config", "doorbells"},
        "seams": {"memory", "interrupts", "engine", "lock", "on_error", "on_wait"},
        "nothing while paused and idle": {
            "activity",
            "resetting",
            "paused",
            "leases",
            "_deleting",
            "_aborting",
        },
        "only compared": {"epoch"},
        "of this process": {"log_limit", "errors"},
        "parts without state": {
            *("_enabling", "_doorbell_registers"),
            *("run", "step", "complete", "hold", "park", "abort_event_request"),
        },
    },
    SubmissionQueue: {
        "saved": {"sqid", "cq", "address", "size", "priority", "head", "tail", "aborted", "held"},
        "nothing while paused and idle": {"in_flight", "on_idle", "borrower"},
        "only compared": {"epoch", "fetched"},
    },
    CompletionQueue: {
        "saved": {"cqid", "address", "size", "vector", "irq_enabled", "head", "tail", "phase"},
        "nothing while paused and idle": {"reserved", "posting", "borrower"},
        "from the submission queues": {"sqs"},
    },
    Registers: {"saved": {"cap", "vs", "intms", "cc", "csts", "aqa", "asq", "acq"}},
}


@pytest.mark.parametrize("kind", SAVED_OR_DERIVED)
def test_all_live_state_is_saved_or_derived(kind: type) -> None:
    host = ready()
    live: dict[type, object] = {
        Controller: host.controller,
        SubmissionQueue: host.controller.sqs[1],
        CompletionQueue: host.controller.cqs[1],
        Registers: host.controller.registers,
    }
    found = live[kind]
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set(vars(found))
    assert names == set().union(*SAVED_OR_DERIVED[kind].values())


def test_commands_hold_no_state_that_a_save_would_need() -> None:
    assert "completed" in Command.__slots__
    assert not {"progress", "held"} & set(Command.__slots__)


# --- what is refused -------------------------------------------------------------------------------------------------

Change = Callable[[ControllerState], None]


def setting(path: str, value: object) -> Change:
    """A change of one field, as `sqs.1.head`."""

    def change(state: ControllerState) -> None:
        *parents, name = path.split(".")
        at: Any = state
        for parent in parents:
            at = at[int(parent)] if parent.isdigit() else getattr(at, parent)
        setattr(at, name, value)

    return change


def appending(name: str, value: object) -> Change:
    return lambda state: getattr(state, name).append(value)


def shadows(*late: LateState) -> DoorbellsState:
    return DoorbellsState(True, True, 0x1000, 0x2000, list(late))


CQ9 = CompletionQueueState(cqid=9, address=0x5000, size=16, head=0, tail=0, phase=1, vector=0, irq_enabled=True)
NAMESPACE = NamespaceState(
    nsid=2, attached=True, blocks=1, block_shift=9, uuid=bytes(16), nguid=bytes(16), eui64=0, read_only=False
)

REFUSED: list[tuple[Change, str]] = [
    (setting("identity.serial", "S2"), "serial is 'S1' here, and was 'S2' when saved"),
    (setting("identity.model", "x"), "model"),
    (setting("identity.cap", 0), "cap is 0x"),
    (setting("identity.version", 0x10400), "version is 0x20000 here, and was 0x10400"),
    (setting("identity.max_ioqpairs", 8), "max_ioqpairs is 64 here, and was 8"),
    (setting("identity.msix_qsize", 9), "msix_qsize"),
    (setting("identity.mdts", 5), "mdts is 7 here, and was 5"),
    (setting("identity.aerl", 9), "aerl"),
    (setting("identity.cntlid", 9), "cntlid"),
    (setting("identity.use_intel_id", True), "use_intel_id"),
    (setting("identity.firmware_version", "123456789"), "firmware_version"),
    (setting("cc", 0x8000_0001), "cc is 0x80000001, with reserved bits"),
    (setting("cc", CC), "csts is ready, and cc not enabled"),
    (setting("cc", CC | 1 | 9 << 7), "csts is ready, and yet CC.MPS"),
    (setting("csts", 0x41), "csts is 0x41, with reserved bits"),
    (setting("csts", 0xD), "reserved shutdown status"),
    (setting("csts", 0), "there are queues, and csts is not ready"),
    (setting("intms", 1 << 32), "intms"),
    (setting("aqa", 0xF000_0000), "aqa is 0xf0000000, with reserved bits"),
    (setting("aqa", 0x1F_000F), "sq 0 is not where aqa and asq say"),
    (setting("asq", 0x7000), "sq 0 is not where aqa and asq say"),
    (setting("asq", -4096), "asq"),
    (setting("acq", 0x7000), "cq 0 is not where aqa and acq say"),
    (setting("sqs", []), "no admin sq"),
    (setting("sqs.1.sqid", 0), "sqs are not in ascending order"),
    (setting("sqs.1.sqid", 65), "sqs is 65"),
    (setting("sqs.1.cqid", 2), "sq 1: cqid is 2, which does not exist"),
    (setting("sqs.1.cqid", 0), "sq 1: cqid is 0"),
    (setting("sqs.1.size", 1), "sq 1: size is 1"),
    (setting("sqs.1.size", 2049), "sq 1: size is 2049"),
    (setting("sqs.1.head", 16), "sq 1: head is 16, outside 0…15"),
    (setting("sqs.1.tail", 16), "sq 1: tail"),
    (setting("sqs.1.address", 0x8001), "sq 1: address 0x8001 is not aligned"),
    (setting("sqs.1.address", 1 << 64), "sq 1: address"),
    (setting("sqs.1.priority", 4), "sq 1: priority"),
    (setting("sqs.1.aborted", [0]), "sq 1: aborted 0 is not between head and tail"),
    (setting("sqs.1.aborted", [99]), "sq 1: aborted"),
    (setting("cqs.1.head", 16), "cq 1: head"),
    (setting("cqs.1.tail", -1), "cq 1: tail"),
    (setting("cqs.1.phase", 2), "cq 1: phase"),
    (setting("cqs.1.vector", 65), "cq 1: vector"),
    (setting("cqs.1.cqid", 7), "cqid is 1, which does not exist"),
    (lambda state: state.cqs.insert(0, CQ9), "cq 0 is not where|ascending"),
    (appending("cqs", dataclasses.replace(CQ9, cqid=1)), "cqs are not in ascending order"),
    (setting("events.outstanding", [1, 2, 3, 4, 5]), "more requests outstanding than aerl"),
    (setting("events.outstanding", [1 << 16]), "events: outstanding"),
    (setting("events.queued", [EventState(0, 0, 1)] * 65), "more queued"),
    (setting("events.queued", [EventState(7, 0, 1)]), "type 7"),
    (setting("events.queued", [EventState(0, 256, 1)]), "information"),
    (setting("events.queued", [EventState(0, 0, 256)]), "log page"),
    (setting("events.masked", [5]), "masked type 5"),
    (setting("doorbells.enabled", True), "doorbells: enabled, dbs and eis contradict"),
    (setting("doorbells.dbs", 0x1000), "doorbells: enabled, dbs and eis contradict"),
    (setting("doorbells.late", [LateState(0, 0)]), "doorbells: late ones, and not enabled"),
    (setting("doorbells", DoorbellsState(False, True, 0x1000, 0x2000)), "doorbells: enabled, and not offered"),
    (setting("doorbells", DoorbellsState(True, True, 0x1800, 0x2000)), "doorbells: dbs 0x1800 is not aligned"),
    (setting("doorbells", DoorbellsState(True, True, 0x1000, 1 << 64)), "doorbells: eis"),
    (setting("doorbells", shadows(LateState(4, 0))), "doorbells: there is no queue for the late one 4"),
    (setting("doorbells", shadows(LateState(2, 16))), "doorbells: late 2 is 16"),
    (setting("doorbells", shadows(LateState(2, 0), LateState(1, 0))), "late ones are not in ascending order"),
    (setting("features.host_behavior", b""), "host_behavior"),
    (setting("features.volatile_write_cache", 2), "volatile_write_cache"),
    (setting("features.temperature_over", 1 << 16), "temperature_over"),
    (setting("features.async_event_configuration", -1), "async_event_configuration"),
    (setting("features.coalescing_disabled", [70]), "coalescing_disabled"),
    (setting("smart.bytes_read", -1), "smart: bytes_read"),
    (setting("changed_namespaces", [0]), "changed_namespaces"),
    (setting("changed_namespaces", [1] * 2000), "changed_namespaces has too many"),
    (setting("namespaces", []), "namespace 1 is here, and was not when saved"),
    (appending("namespaces", NAMESPACE), "namespace 2 is not here"),
    (setting("namespaces.0.uuid", bytes(16)), "namespace 1: uuid"),
    (setting("namespaces.0.eui64", 5), "namespace 1: eui64 is 0x0 here, and was 0x5"),
    (setting("namespaces.0.blocks", 1), "namespace 1 has 2048 blocks here, and had 1"),
    (setting("namespaces.0.block_shift", 10), "namespace 1: a block size of 2\\^10"),
    (setting("namespaces.0.read_only", True), "namespace 1 is writable here, and was read-only"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[f"{n}-{m[:40]}" for n, (_, m) in enumerate(REFUSED)])
def test_a_state_that_is_refused_leaves_all_as_it_was(change: Change, message: str) -> None:
    host = ready()
    state = host.save()
    before = host.save()
    change(state)
    with pytest.raises(StateError, match=message) as caught:
        host.controller.load(state)
    assert "\n" not in str(caught.value)
    assert host.controller.save() == before
    host.controller.resume()
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_a_state_whose_queue_gets_no_worker_leaves_a_reset_controller_that_can_load_it_later() -> None:
    host = ready()
    state = host.save()
    host.replace()
    attach = host.engine.attach

    def refuse_second(sqid: int) -> None:
        if sqid:
            raise OSError(errno.EAGAIN, "can't start new thread")
        attach(sqid)

    host.engine.attach = refuse_second  # type: ignore[method-assign]
    with pytest.raises(StateError, match=r"^a submission queue has no worker: can't start new thread$"):
        host.controller.load(state)
    assert not host.controller.sqs and not host.controller.cqs
    assert (host.csts, host.get(Register.CC)) == (0, 0)
    host.engine.attach = attach  # type: ignore[method-assign]
    host.controller.load(state)
    assert host.controller.save() == state


def test_event_requests_without_an_enabled_controller_are_refused() -> None:
    host = Host()
    state = host.save()
    state.events.outstanding = [1]
    with pytest.raises(StateError, match="event requests"):
        host.controller.load(state)
    state.events.outstanding = []
    state.cc = CC | 1
    with pytest.raises(StateError, match="neither ready nor failed"):
        host.controller.load(state)


def test_another_set_of_namespaces_is_refused_by_name() -> None:
    state = ready().save()
    config = msgspec.structs.replace(
        CONFIG, namespaces=(*CONFIG.namespaces, NamespaceConfig(nsid=2, drive="d0", uuid=uuid.UUID(int=2)))
    )
    host = Host(config=config)
    host.controller.pause(0)
    with pytest.raises(StateError, match="namespace 2 is here, and was not when saved"):
        host.controller.load(state)


def test_a_queue_state_names_all_fields() -> None:
    saved = ready().save().sqs[1]
    assert isinstance(saved, SubmissionQueueState)
    assert (saved.sqid, saved.cqid, saved.size, saved.address) == (1, 1, 16, 0x9_0000)
