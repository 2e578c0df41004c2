"""Shadow doorbells: no submission and no freed slot is missed, whatever the order; they end and travel as they must."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest

from nvmove.nvme.cells import Place
from nvmove.nvme.errors import StateError
from nvmove.nvme.spec import CSTS_CFS, DOORBELLS, OACS_DOORBELL_BUFFER_CONFIG, Admin, Nvm, Register, Status
from nvmove.nvme.state.saved import DoorbellsState
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CONFIG, DATA, Entries, Ring, sqe
from tests.nvme_shadow import DBS, EIS, ShadowHost, ShadowRam, shadowed


def meanwhile(host: ShadowHost, *actions: Callable[[], None]) -> None:
    assert isinstance(host.ram, ShadowRam)
    host.ram.meanwhile += actions


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dbs", "eis"), [(0, EIS), (DBS, 0), (DBS + 4, EIS), (DBS, EIS + 0x800)])
def test_a_buffer_at_zero_or_not_at_a_page_is_an_invalid_field(dbs: int, eis: int) -> None:
    host = ShadowHost()
    host.enable()
    assert host.configure(dbs, eis) == Status.INVALID_FIELD
    assert not host.controller.doorbells.enabled


@pytest.mark.parametrize(("dbs", "eis"), [(DBS, 1 << 40), (1 << 40, EIS)])
def test_a_buffer_that_is_not_in_guest_memory_is_a_data_transfer_error(dbs: int, eis: int) -> None:
    host = ShadowHost()
    host.enable()
    host.create()
    assert host.configure(dbs, eis) == Status.DATA_TRANSFER_ERROR
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
    assert host.csts & CSTS_CFS == 0


def test_without_dbcs_the_command_does_not_exist() -> None:
    host = ShadowHost(config=msgspec.structs.replace(CONFIG, dbcs=False))
    host.enable()
    assert host.configure() == Status.INVALID_OPCODE


def test_with_intx_shadow_doorbells_are_not_offered() -> None:
    """QEMU lowers a vfio device's pin when the guest touches the BAR, which this guest would not."""
    host = ShadowHost(lines=Lines(msix=False))
    host.enable()
    assert host.configure() == Status.INVALID_OPCODE
    assert host.admin(Admin.IDENTIFY, cdw10=1, prp1=DATA).status == Status.SUCCESS
    assert not int.from_bytes(host.ram.data[DATA + 256 : DATA + 258], "little") & OACS_DOORBELL_BUFFER_CONFIG


def test_the_buffers_get_the_positions_of_the_queues_that_exist() -> None:
    host = ShadowHost()
    host.enable()
    host.create()
    for _ in range(3):
        host.command(1, Nvm.FLUSH, nsid=1)
    host.store(9, 77)
    assert host.configure() == Status.SUCCESS
    tail = host.rings[0].tail
    assert [host.cell(index) for index in range(10)] == [tail, tail - 1, 3, 3, 0, 0, 0, 0, 0, 0]


def test_a_page_of_buffer_is_not_left_when_there_are_more_queues_than_cells() -> None:
    host = ShadowHost(config=msgspec.structs.replace(CONFIG, max_ioqpairs=1000))
    host.enable()
    host.ram.data[DBS + 4096 : DBS + 4100] = host.ram.data[EIS + 4096 : EIS + 4100] = b"\xff" * 4
    pair = {"prp1": 0x40_0000}, {"prp1": 0x41_0000}
    host.create_cq(600, **pair[0])
    host.create_sq(600, 600, **pair[1])
    assert host.configure() == Status.SUCCESS
    assert host.ram.data[EIS + 4096 : EIS + 4100] == b"\xff" * 4
    assert host.controller.doorbells.source(600, False).place is Place.MESSAGE
    host.shadows = False
    host.cqs[600] = Entries(600, 0x40_0000, 16)
    host.rings[600] = Ring(0x41_0000, 16, host.cqs[600])
    assert host.command(600, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
    host.delete_sq(600)
    assert host.create_sq(600, 600, **pair[1]).status == Status.SUCCESS
    host.rings[600] = Ring(0x41_0000, 16, host.cqs[600])
    assert host.command(600, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_commands_run_at_every_position_of_every_ring() -> None:
    host = shadowed(sq_size=5, cq_size=3)
    for _ in range(40):
        assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
    source = host.controller.doorbells.source(1, False)
    assert source == (Place.GUEST, DBS + 8, EIS + 8)


def test_a_host_that_submits_while_the_worker_is_awake_does_not_ring() -> None:
    host = shadowed()
    cids = [host.submit(1, Nvm.FLUSH, nsid=1)]
    rung = host.rung
    for _ in range(9):  # seen by the looks of one run
        meanwhile(host, lambda: cids.append(host.submit(1, Nvm.FLUSH, nsid=1)))
    host.drain()
    assert [done.cid for done in host.reap(1)] == cids
    assert len(cids) == 10
    assert host.rung <= rung + 2


def test_a_submission_between_the_last_look_and_eventidx_is_found() -> None:
    host = shadowed()
    ram, late = host.ram, list[int]()
    write = ram.write

    def store_then_write(address: int, data: bytes | bytearray | memoryview) -> None:
        if address == EIS + 8 and not late:
            before = host.rung
            late.append(host.submit(1, Nvm.FLUSH, nsid=1))
            assert host.rung == before, "EventIdx lags: the guest has no reason to ring"
        write(address, data)

    ram.write = store_then_write  # type: ignore[method-assign]
    first = host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert [done.cid for done in host.reap(1)] == [first, *late]


def test_a_doorbell_older_than_the_shadow_changes_nothing() -> None:
    host = shadowed()
    for _ in range(5):
        host.command(1, Nvm.FLUSH, nsid=1)
    host.set(DOORBELLS + 8, 2)
    host.set(DOORBELLS + 12, 2)
    host.drain()
    assert host.controller.sqs[1].tail == 5
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_a_full_cq_looks_at_the_shadow_head_before_it_waits() -> None:
    host = shadowed(cq_size=3)
    for _ in range(5):
        host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert len(host.reap(1, doorbell=False)) == 2
    host.store(3, host.cqs[1].head)  # a host that does not ring
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.controller.engine.kick(1)
    host.drain()
    assert len(host.reap(1, doorbell=False)) == 2


def test_a_full_cq_asks_the_host_to_ring_for_its_head() -> None:
    host = shadowed(cq_size=3)
    for _ in range(6):
        host.submit(1, Nvm.FLUSH, nsid=1)
    done = 0
    for _ in range(6):
        host.drain()
        done += len(host.reap(1))
    assert done == 6


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_a_register_value_beyond_the_ring_is_an_error_event() -> None:
    host = shadowed()
    aer = host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.set(DOORBELLS + 8, 16)
    host.drain()
    assert [done.cid for done in host.reap(0)] == [aer]


@pytest.mark.parametrize("page", [DBS, EIS])
def test_a_buffer_that_goes_away_is_fatal_until_the_host_resets(page: int) -> None:
    host = shadowed()
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.ram.holes = [range(page, page + 4096)]
    host.drain()
    assert host.csts & CSTS_CFS
    host.disable()
    host.shadows = False
    host.enable()
    host.create()
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


# --- beginnings and ends ---------------------------------------------------------------------------------------------


def test_enabling_during_io_loses_nothing() -> None:
    disk = Disk(hold=True)
    host = ShadowHost(ram=ShadowRam(), disk=disk)
    host.enable()
    host.create()
    cids = [host.submit(1, Nvm.READ, nsid=1) for _ in range(3)]
    assert host.configure() == Status.SUCCESS
    host.shadows = False
    cids.append(host.submit(1, Nvm.READ, nsid=1))  # rung before the host looked at the completion of the command
    host.drain()
    host.shadows = True
    cids += [host.submit(1, Nvm.READ, nsid=1) for _ in range(2)]
    host.drain()
    disk.finish()
    assert [done.cid for done in host.reap(1)] == cids
    assert host.controller.doorbells.source(1, False).place is Place.GUEST


def test_a_head_that_comes_round_to_where_it_was_when_the_buffers_were_given_is_seen() -> None:
    """The first step is rung: from then on the register is not what counts, though the shadow may look untouched."""
    host = shadowed(cq_size=3)
    done = 0
    for _ in range(12):
        host.submit(1, Nvm.FLUSH, nsid=1)
        host.drain()
        done += len(host.reap(1))
    assert done == 12


@pytest.mark.parametrize("moves", [False, True])
def test_a_first_step_that_was_rung_and_not_looked_at_is_looked_at_first(moves: bool) -> None:
    """Also by the controller that has loaded the state."""
    host = shadowed(sq_size=3, cq_size=3)
    for step in range(9):
        host.controller.pause(0)
        cid = host.submit(1, Nvm.FLUSH, nsid=1)
        if moves and step % 2:
            host.move()
        host.controller.resume()
        host.drain()
        host.controller.pause(0)
        assert [completion.cid for completion in host.reap(1)] == [cid]
        if moves:
            host.move()


def test_the_admin_queue_stays_on_its_register_until_the_host_moves_it() -> None:
    host = shadowed()
    for _ in range(40):
        assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS
    host.store(0, (host.rings[0].tail + 1) % 32)
    host.cid += 1
    host.put(0, sqe(Admin.IDENTIFY, host.cid, cdw10=1))
    host.controller.engine.kick(0)
    host.drain()
    assert [done.cid for done in host.reap(0)] == [host.cid]
    assert host.controller.doorbells.source(0, False).place is Place.GUEST
    assert host.controller.doorbells.source(0, True).place is Place.MESSAGE


def test_a_queue_made_anew_starts_with_an_empty_doorbell() -> None:
    host = shadowed()
    for _ in range(5):
        host.command(1, Nvm.FLUSH, nsid=1)
    host.delete_sq(1)
    host.delete_cq(1)
    host.create()
    assert (host.cell(2), host.cell(3), host.event(2), host.event(3)) == (0, 0, 0, 0)
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_a_queue_whose_shadow_cannot_be_written_is_not_made() -> None:
    host = shadowed()
    host.ram.holes = [range(EIS, EIS + 4096)]
    assert host.create_cq(2).status == Status.DATA_TRANSFER_ERROR
    assert 2 not in host.controller.cqs


@pytest.mark.parametrize("how", ["disable", "reset"])
def test_a_reset_ends_shadow_doorbells(how: str) -> None:
    host = shadowed()
    host.command(1, Nvm.FLUSH, nsid=1)
    if how == "disable":
        host.disable()
    else:
        host.controller.reset(lambda: None)
    before = bytes(host.ram.data[DBS : EIS + 4096])
    host.shadows = False
    host.enable()
    host.create()
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
    assert host.ram.data[DBS : EIS + 4096] == before
    assert host.save().doorbells == DoorbellsState(dbcs=True)


def test_a_reset_during_a_look_ends_without_a_trace() -> None:
    host = shadowed()
    host.submit(1, Nvm.FLUSH, nsid=1)
    gone: list[bool] = []

    def reset() -> None:
        host.controller.reset(lambda: gone.append(True))
        assert not gone, "the look is still under way"
        host.ram.holes = [range(DBS, EIS + 4096)]

    meanwhile(host, reset)
    host.drain()
    assert gone
    assert host.csts == 0


def test_a_queue_is_not_deleted_while_its_worker_looks() -> None:
    host = shadowed()
    cid = host.submit(0, Admin.DELETE_SQ, cdw10=1)
    watched = host.controller.doorbells._enter(1)
    assert watched is not None
    host.controller.run(0)
    assert host.reap(0) == []
    host.controller.doorbells._leave(watched)
    host.drain()
    assert [done.cid for done in host.reap(0)] == [cid]


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pending", [0, 1, 4])
def test_shadow_doorbells_travel_with_io_pending_and_idle(pending: int) -> None:
    host = shadowed()
    host.command(1, Nvm.FLUSH, nsid=1)
    host.controller.pause(0)
    cids = [host.submit(1, Nvm.FLUSH, nsid=1) for _ in range(pending)]
    state = host.move()
    assert state.doorbells == DoorbellsState(True, True, DBS, EIS, state.doorbells.late)
    assert {late.cell for late in state.doorbells.late} == {0, 1, 3}  # nobody had to look at the head
    host.drain()
    assert [done.cid for done in host.reap(1)] == cids
    for _ in range(20):
        assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
        assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS


def test_a_shadow_written_after_the_load_and_not_rung_is_found_on_resume() -> None:
    host = shadowed()
    state = host.save()
    host.replace()
    host.controller.load(state)
    host.store(2, 1)
    host.put(1, sqe(Nvm.FLUSH, 77, nsid=1))
    host.controller.resume()
    host.drain()
    assert [done.cid for done in host.reap(1)] == [77]


def test_a_queue_that_was_deleted_leaves_nothing_in_the_state() -> None:
    host = shadowed()
    host.delete_sq(1)
    host.delete_cq(1)
    assert {late.cell for late in host.move().doorbells.late} == {0, 1}


@pytest.mark.parametrize("offered", [True, False])
def test_whether_the_command_is_offered_comes_from_the_state(offered: bool) -> None:
    host = ShadowHost(config=msgspec.structs.replace(CONFIG, dbcs=offered))
    host.enable()
    state = host.save()
    host.config = msgspec.structs.replace(CONFIG, dbcs=not offered)
    host.replace()
    host.controller.load(state)
    assert host.controller.config.dbcs is offered
    host.controller.resume()
    assert (host.configure() == Status.SUCCESS) is offered


def test_a_state_with_shadows_is_refused_when_its_controller_is_not_ready() -> None:
    host = ShadowHost()
    state = dataclasses.replace(host.save(), doorbells=DoorbellsState(True, True, DBS, EIS))
    with pytest.raises(StateError, match="doorbells: enabled, and csts is not ready"):
        host.controller.load(state)


def test_register_writes_are_counted() -> None:
    host = shadowed()
    before = host.controller.inspect()["live"]["doorbell_writes"]
    host.set(DOORBELLS + 8, 0)
    assert host.controller.inspect()["live"]["doorbell_writes"] == before + 1
    assert host.get(Register.CSTS) & 1


def test_a_host_that_has_freed_a_whole_round_is_seen_though_its_shadow_is_as_it_was() -> None:
    host = shadowed(sq_size=8, cq_size=8)
    done = list[int]()

    def consume() -> None:
        found = host.reap(1)
        done.extend(completion.cid for completion in found)
        if not found:
            meanwhile(host, consume)

    for n in range(40):
        meanwhile(host, consume)  # sooner than the worker looks for the next command
        host.submit(1, Nvm.FLUSH, nsid=1)
        host.drain()
        assert len(done) == n + 1
