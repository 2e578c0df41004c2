"""Doorbells in a page that the client writes unseen: nothing is missed, the page says what the queues say."""

from __future__ import annotations

import ctypes

import pytest

from nvmove.nvme.cells import Place
from nvmove.nvme.errors import StateError
from nvmove.nvme.spec import DOORBELLS, Admin, Nvm, Status
from nvmove.nvme.state.saved import DoorbellsState
from tests.nvme_host import Host, sqe
from tests.nvme_mapped import MappedHost, mapped


def test_commands_run_at_every_position_of_every_ring_and_no_message_comes() -> None:
    host = mapped(sq_size=5, cq_size=3)
    for _ in range(40):
        assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
        assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS
    assert host.controller.doorbells.writes == 0


def test_a_source_is_the_address_of_its_cell() -> None:
    host = mapped()
    host.page[2] = 77
    source = host.controller.doorbells.source(1, False)
    assert source.place is Place.PAGE
    assert ctypes.c_uint32.from_address(source.address).value == 77
    assert ctypes.c_uint32.from_address(source.event).value == 0
    host.controller.doorbells.scan()
    assert ctypes.c_uint32.from_address(source.event).value == 77


def test_a_worker_that_is_awake_finds_what_nobody_scanned() -> None:
    host = mapped()
    host.put(1, sqe(Nvm.FLUSH, 5, nsid=1))
    host.page[2] = 1
    host.controller.engine.kick(1)
    host.drain()
    assert [done.cid for done in host.reap(1)] == [5]


def test_a_whole_round_between_two_scans_is_not_taken_for_silence() -> None:
    host = mapped(sq_size=4)
    host.submit(1, Nvm.FLUSH, nsid=1)
    for _ in range(3):  # seen by a worker that is awake
        host.drain()
        host.put(1, sqe(Nvm.FLUSH, nsid=1))
        host.page[2] = host.rings[1].tail
        host.controller.engine.kick(1)
    host.drain()
    host.put(1, sqe(Nvm.FLUSH, 99, nsid=1))
    host.page[2] = host.rings[1].tail
    assert host.page[2] == 1, "as at the last scan"
    assert host.controller.doorbells.scan() is True
    host.drain()
    assert host.reap(1)[-1].cid == 99


def test_a_doorbell_that_comes_by_message_counts_and_is_in_the_page() -> None:
    host = mapped()
    host.put(1, sqe(Nvm.FLUSH, 5, nsid=1))
    host.set(DOORBELLS + 8, 1)
    host.drain()
    assert [done.cid for done in host.reap(1)] == [5]
    assert host.page[2] == 1
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_a_scan_says_whether_to_look_again_soon() -> None:
    host = MappedHost()
    assert host.controller.doorbells.scan() is None
    host.enable()
    host.controller.doorbells.scan()
    assert host.controller.doorbells.scan() is False
    host.page[0] = 1
    assert host.controller.doorbells.scan() is True
    host.controller.pause(0)
    assert host.controller.doorbells.scan() is None


def test_an_enabled_controller_and_a_new_queue_start_with_empty_doorbells() -> None:
    host = mapped()
    host.command(1, Nvm.FLUSH, nsid=1)
    host.disable()
    for cell in range(8):
        host.page[cell] = 9
    host.enable()
    assert list(host.page[:2]) == [0, 0]
    host.create()
    assert list(host.page[2:4]) == [0, 0]
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_a_doorbell_that_nobody_saw_before_the_save_travels() -> None:
    host = mapped()
    host.command(1, Nvm.FLUSH, nsid=1)
    host.controller.pause(0)
    host.put(1, sqe(Nvm.FLUSH, 77, nsid=1))
    host.page[2] = 2
    state = host.controller.save()
    assert state.sqs[1].tail == 2
    assert state.doorbells == DoorbellsState()
    host.replace()
    host.share()
    host.controller.load(state)
    assert list(host.page[2:4]) == [2, 1]
    assert host.page[0] == host.rings[0].tail
    host.controller.resume()
    host.drain()
    assert [done.cid for done in host.reap(1)] == [77]
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS


def test_a_state_of_a_controller_that_offered_shadow_doorbells_is_refused() -> None:
    other = Host()
    other.enable()
    state = other.save()
    host = MappedHost()
    host.controller.pause(0)
    with pytest.raises(StateError, match="dbcs was on when saved"):
        host.controller.load(state)


def test_doorbell_buffer_config_is_not_offered_beside_the_page() -> None:
    assert mapped().admin(Admin.DOORBELL_BUFFER_CONFIG, prp1=0x3000, prp2=0x4000).status == Status.INVALID_OPCODE
