"""Pages the device wrote are marked dirty: a command's before it completes, the others when the VM has stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from nvmove.nvme.seams import DmaError, Segment
from nvmove.vfio.dirty import PAGE, RUN, DirtyPages, runs, span, split
from nvmove.vfio.memory import GuestMemory
from nvmove.vfio.message import Buffer
from nvmove.vfio.writing import Writing
from tests.unit.vfio.test_memory import FakeClient, add, unmapped
from tests.waiting import ended, in_thread

Write = tuple[int, int]
"""Guest address and length of a DMA_WRITE."""


def tracked(size: int = 16 * PAGE) -> tuple[GuestMemory, FakeClient]:
    """Mapped memory from address 0, with a client and marking on."""
    memory, client = GuestMemory(), FakeClient()
    memory.client = client
    add(memory, 0, size)
    memory.dirty.start_marking()
    return memory, client


def writes(client: FakeClient) -> list[Write]:
    """The messages since the last call."""
    found = [(address, length) for kind, address, length in client.calls if kind == "write"]
    client.calls.clear()
    return found


def transfer(memory: GuestMemory, *segments: tuple[int, int], commit: bool = True, to_guest: bool = True) -> None:
    taken = memory.acquire([Segment(*segment) for segment in segments], to_guest)
    for buffer in taken.buffers:
        if to_guest:
            buffer[:] = b"d" * len(buffer)
    taken.finish(commit)


def touched(written: list[Write]) -> list[int]:
    return sorted({page for at, length in written for page in range(at // PAGE, (at + length - 1) // PAGE + 1)})


def test_nothing_is_sent_while_nobody_asks() -> None:
    memory, client = tracked()
    memory.dirty.stop_marking()
    transfer(memory, (0, PAGE))
    memory.write(0, b"cqe")
    assert client.calls == []
    assert memory.mark_dirty().pages == 0
    assert client.calls == []


def test_a_transfers_pages_are_marked_when_it_finishes_with_what_it_wrote() -> None:
    memory, client = tracked()
    transfer(memory, (PAGE, PAGE), (5 * PAGE + 512, 3 * PAGE))
    written = writes(client)
    assert touched(written) == [1, 5, 6, 7, 8]
    assert sum(length for _, length in written) < 3 * PAGE
    assert set(client.ram.values()) == {ord("d")}
    assert memory.mark_dirty().pages == 0


def test_only_bytes_of_the_transfer_itself_are_written_again() -> None:
    memory, client = tracked()
    for start, length in [(100, 8), (PAGE - 1, 2), (PAGE - 8, PAGE + 16), (3 * PAGE, 1), (512, 4 * PAGE)]:
        transfer(memory, (start, length))
        written = writes(client)
        assert all(start <= at and at + count <= start + length for at, count in written)
        assert touched(written) == touched([(start, length)])


def test_a_transfer_begun_before_tracking_is_marked() -> None:
    memory, client = tracked()
    memory.dirty.stop_marking()
    early = memory.acquire([Segment(0, PAGE)], to_guest=True)
    memory.dirty.start_marking()
    early.finish()
    assert touched(writes(client)) == [0]


def test_what_is_read_from_the_guest_is_not_marked() -> None:
    memory, client = tracked()
    transfer(memory, (0, PAGE), to_guest=False)
    memory.read(0, 8)
    assert client.calls == []
    assert memory.mark_dirty().pages == 0


def test_a_write_without_completion_and_a_failed_transfer_wait_for_the_switch_over() -> None:
    memory, client = tracked()
    memory.write(PAGE + 16, b"cqe")
    memory.write(2 * PAGE - 4, b"two pages")
    transfer(memory, (8 * PAGE, 2 * PAGE), commit=False)
    assert client.calls == []
    report = memory.mark_dirty()
    assert touched(writes(client)) == [1, 2, 8, 9]
    assert report.pages == 4
    assert 0 < report.bytes < PAGE
    assert memory.mark_dirty().pages == 0


def test_a_write_across_regions_waits_for_the_switch_over_too() -> None:
    memory, client = tracked(PAGE)
    add(memory, PAGE, PAGE)
    memory.write(PAGE - 2, b"abcd")
    assert client.calls == []
    memory.mark_dirty()
    assert touched(writes(client)) == [0, 1]


def test_the_switch_over_sends_what_is_there_then() -> None:
    memory, client = tracked()
    memory.write(0, b"old")
    memory.write(0, b"new")
    memory.mark_dirty()
    assert client.ram[0] == ord("n")


def test_runs_are_coalesced_up_to_a_mebibyte() -> None:
    memory, client = tracked(4 * RUN)
    for page in range(0, 3 * RUN, PAGE):
        memory.write(page, b"x")
    memory.write(3 * RUN + 8 * PAGE, b"x")
    report = memory.mark_dirty()
    written = writes(client)
    assert len(written) == 4
    assert max(length for _, length in written) <= RUN
    assert report.pages == len(touched(written)) == 3 * RUN // PAGE + 1
    assert report.bytes == sum(length for _, length in written)


def test_memory_by_message_is_marked_by_its_messages() -> None:
    memory, client = tracked(PAGE)
    memory.map(PAGE, PAGE, None, 0, True, True)
    transfer(memory, (PAGE - 8, 16))
    assert writes(client) == [(PAGE, 8), (PAGE - 8, 1)]
    memory.write(PAGE, b"x")
    assert writes(client) == [(PAGE, 1)]
    assert memory.mark_dirty().pages == 0


def test_a_failed_marking_does_not_fail_the_transfer_and_waits_for_the_switch_over() -> None:
    memory, client = tracked()
    client.limit = 0
    transfer(memory, (PAGE, PAGE))
    memory.client = None
    transfer(memory, (2 * PAGE, PAGE))
    with pytest.raises(DmaError, match="no client"):
        memory.mark_dirty()
    memory.client = client
    with pytest.raises(DmaError, match="refused"):
        memory.mark_dirty()
    client.limit = 1 << 63
    writes(client)
    assert memory.mark_dirty().pages == 2
    assert touched(writes(client)) == [1, 2]


def test_a_failed_write_by_message_leaves_the_mapped_rest_to_the_switch_over() -> None:
    memory, client = tracked(PAGE)
    memory.map(PAGE, PAGE, None, 0, True, True)
    client.limit = PAGE
    taken = memory.acquire([Segment(PAGE - 8, 16)], to_guest=True)
    with pytest.raises(DmaError):
        taken.finish()
    writes(client)
    assert memory.mark_dirty().pages == 1
    assert touched(writes(client)) == [0]


def test_pages_of_memory_that_went_away_are_left_out() -> None:
    memory, client = tracked()
    memory.write(0, b"x")
    memory.write(4 * PAGE, b"x")
    assert unmapped(memory, 4 * PAGE, PAGE) == [0]
    assert memory.mark_dirty().pages == 1
    assert touched(writes(client)) == [0]


def test_tracking_anew_forgets_what_was_recorded() -> None:
    memory, client = tracked()
    memory.write(0, b"x")
    memory.dirty.stop_marking()
    memory.write(PAGE, b"x")
    memory.dirty.start_marking()
    memory.write(2 * PAGE, b"x")
    memory.mark_dirty()
    assert touched(writes(client)) == [2]


def test_an_unmap_ends_a_marking() -> None:
    """A client in an unmap answers our messages when that is done: waiting for them would be for ever."""
    memory, client = tracked()
    marking, unmap = threading.Event(), threading.Event()

    def dma_write_all(runs: Iterable[tuple[int, Buffer]], writing: Writing | None = None) -> None:
        marking.set()
        assert unmap.wait(5)
        raise DmaError("cancelled")

    def cancel(writing: Writing) -> None:
        assert writing.gone
        unmap.set()

    client.dma_write_all = dma_write_all  # type: ignore[method-assign]
    client.cancel = cancel  # type: ignore[method-assign]
    worker = in_thread(lambda: transfer(memory, (0, PAGE)))
    assert marking.wait(5)
    answers = unmapped(memory, 0, PAGE)
    ended(worker)
    assert answers == [0]


def test_recording_from_several_threads_loses_nothing() -> None:
    pages, found = DirtyPages(), set[int]()

    def record(first: int) -> None:
        for page in range(first, 4000, 4):
            pages.add(page * PAGE, 1)

    threads = [threading.Thread(target=record, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.update(pages.take())
    found.update(pages.take())
    assert found == set(range(4000))


def test_runs_spans_and_splits() -> None:
    assert list(runs([])) == []
    assert list(runs([1, 2, 4])) == [(PAGE, 3 * PAGE), (4 * PAGE, 5 * PAGE)]
    assert list(split(PAGE + 1, RUN)) == [(PAGE + 1, PAGE + RUN), (PAGE + RUN, PAGE + RUN + 1)]
    assert span(0, PAGE) == (0, 1)
    assert span(8, 2 * PAGE) == (PAGE - 1, PAGE + 1)
