"""Doorbells that the guest stores to memory, whatever memory: shadow doorbells, and a page that the client maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nvmove.nvme.spec import Admin, EventType, Nvm, Status
from tests.lines import Lines
from tests.nvme_mapped import MappedHost, mapped
from tests.nvme_shadow import ShadowHost, shadowed

AnyHost = ShadowHost | MappedHost
Ready = Callable[..., AnyHost]


@pytest.fixture(params=[shadowed, mapped])
def ready(request: pytest.FixtureRequest) -> Ready:
    """What returns a host with a queue pair."""
    made: Ready = request.param
    return made


def shadowed_with_intx() -> ShadowHost:
    """A host that turns to INTx when it has configured shadow doorbells, which are not offered with INTx."""
    host = shadowed()
    host.lines.msix_enabled = False
    return host


def mapped_with_intx() -> MappedHost:
    return mapped(lines=Lines(msix=False))


@pytest.fixture(params=[shadowed_with_intx, mapped_with_intx])
def pinned(request: pytest.FixtureRequest) -> AnyHost:
    """A host with a queue pair and without MSI-X."""
    host: AnyHost = request.param()
    return host


def test_a_head_that_makes_room_starts_every_sq_of_the_cq(ready: Ready) -> None:
    host = ready(cq_size=3)
    host.create(2, cqid=1)
    for qid in (1, 2, 1, 2):
        host.submit(qid, Nvm.FLUSH, nsid=1)
    done = 0
    for _ in range(4):
        host.drain()
        done += len(host.reap(1))
    assert done == 4


def test_the_pin_falls_when_the_head_moves(pinned: AnyHost) -> None:
    for _ in range(3):
        pinned.submit(1, Nvm.FLUSH, nsid=1)
        pinned.drain()
        assert pinned.lines.up()
        pinned.reap(1)
        pinned.drain()
        assert not pinned.lines.up()


def test_the_pin_falls_when_the_queue_that_completed_is_gone(pinned: AnyHost) -> None:
    pinned.submit(1, Nvm.FLUSH, nsid=1)
    pinned.drain()
    assert pinned.delete_sq(1).status == Status.SUCCESS
    pinned.drain()
    assert pinned.lines.up()
    pinned.reap(1)
    pinned.drain()
    assert not pinned.lines.up()


@pytest.mark.parametrize(("cell", "value"), [(2, 16), (2, 0xFFFF_FFFF), (3, 1), (3, 5), (3, 16)])
def test_a_value_that_cannot_be_is_one_error_event(pinned: AnyHost, cell: int, value: int) -> None:
    aer = pinned.submit(0, Admin.ASYNC_EVENT_REQUEST)
    pinned.store(cell, value)
    for _ in range(3):
        pinned.look()
        pinned.drain()
    (event,) = [done for done in pinned.reap(0) if done.cid == aer]
    assert event.result & 7 == EventType.ERROR
    assert not pinned.controller.events.queued
    pinned.store(cell, pinned.rings[1].tail if cell == 2 else 0)
    assert pinned.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS
