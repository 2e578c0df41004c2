"""Rings: permits, doorbells and phases, at every position."""

from __future__ import annotations

import pytest

from nvmove.nvme.queue import CompletionQueue, SubmissionQueue


def make_cq(size: int = 4) -> CompletionQueue:
    return CompletionQueue(1, 0x1000, size, 0, True)


def make_sq(size: int = 4) -> SubmissionQueue:
    return SubmissionQueue(1, make_cq(), 0x2000, size)


def test_a_cq_has_one_permit_less_than_slots() -> None:
    cq = make_cq()
    assert cq.reserve(9) == 3
    assert cq.reserve() == 0
    cq.release()
    assert cq.free == 1


def test_a_permit_becomes_an_entry_and_the_doorbell_frees_it() -> None:
    cq = make_cq()
    assert cq.reserve() == 1
    assert cq.tail_address == 0x1000
    cq.advance()
    assert (cq.used, cq.reserved, cq.free, cq.tail_address) == (1, 0, 2, 0x1010)
    assert cq.set_head(1)
    assert (cq.is_empty, cq.free) == (True, 3)


@pytest.mark.parametrize("turns", range(9))
def test_phase_and_free_slots_at_every_wrap_position(turns: int) -> None:
    cq = make_cq()
    for turn in range(turns):
        cq.reserve()
        cq.advance()
        assert cq.set_head((turn + 1) % 4)
    assert (cq.tail, cq.phase, cq.free) == (turns % 4, 1 ^ (turns // 4) % 2, 3)
    assert cq.reserve(3) == 3


def test_a_cq_head_beyond_the_tail_or_the_ring_is_refused() -> None:
    cq = make_cq()
    cq.reserve(2)
    cq.advance()
    assert not cq.set_head(2)
    assert not cq.set_head(4)
    assert cq.head == 0
    assert cq.set_head(0)


def test_an_sq_tail_that_overruns_the_head_is_refused() -> None:
    sq = make_sq()
    assert sq.set_tail(2)
    assert not sq.set_tail(4)
    assert not sq.set_tail(1)
    assert sq.set_tail(3)
    assert sq.waiting == 3
    assert not sq.set_tail(0)
    sq.advance(1)
    assert sq.set_tail(0)


def test_what_waits_is_contiguous_up_to_the_end_of_the_ring() -> None:
    sq = make_sq()
    sq.head, sq.tail = 3, 2
    assert (sq.waiting, sq.contiguous, sq.head_address) == (3, 1, 0x20C0)
    assert sq.runs() == [(0x20C0, 1), (0x2000, 2)]


def test_an_abort_mark_is_used_up_by_its_fetch() -> None:
    sq = make_sq()
    sq.set_tail(3)
    sq.aborted = {1}
    assert sq.advance(2) == [False, True]
    assert sq.aborted == set()
    assert (sq.head, sq.fetched) == (2, 2)
