"""Guest memory by message: many under way at once, refusals, and what is left after them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from nvmove.nvme.seams import DmaError
from nvmove.vfio.dma import DmaChannel
from nvmove.vfio.writing import Writing
from tests.vfio_peer import PlainDevice, ask_until, connected, noting
from tests.waiting import ended, in_thread

PAGE = 4096


def begin(call: Callable[..., None], *arguments: object) -> tuple[list[str], threading.Thread]:
    """Run a call of a channel off the control thread; the list gets what it fails with."""
    failures: list[str] = []
    return failures, in_thread(noting(failures, lambda: call(*arguments)))


def complete(call: Callable[..., None], *arguments: object) -> list[str]:
    """Do the same to its end."""
    failures, thread = begin(call, *arguments)
    ended(thread)
    return failures


def channel_of(device: PlainDevice) -> DmaChannel:
    assert isinstance(device.client, DmaChannel)
    return device.client


def test_thousands_of_writes_go_in_one_call_and_in_order() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, 64 * PAGE, shared=False)
        runs = [(n % 64 * PAGE, n.to_bytes(4, "little")) for n in range(3000)]
        assert complete(channel_of(device).dma_write_all, runs) == []
        assert [int.from_bytes(ram.view[at : at + 4], "little") for at in (0, 63 * PAGE)] == [2944, 2943]


def test_small_and_large_writes_mix() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, 8 << 20, shared=False)
        big = bytes(range(256)) * (3 << 12)
        assert complete(channel_of(device).dma_write_all, [(0, b"x"), (PAGE, big), (PAGE - 1, b"y")]) == []
        assert ram.view[0] == ord("x")
        assert ram.view[PAGE - 1] == ord("y")
        assert bytes(ram.view[PAGE : PAGE + len(big)]) == big


def test_one_refused_write_fails_the_call_and_the_others_are_done() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, PAGE, shared=False)
        (failure,) = complete(channel_of(device).dma_write_all, [(0, b"a"), (1 << 40, b"b"), (1, b"c")])
        assert "refused DMA_WRITE" in str(failure)
        assert bytes(ram.view[:2]) == b"ac"


def test_nothing_to_write_is_done_at_once() -> None:
    device = PlainDevice()
    with connected(device):
        assert complete(channel_of(device).dma_write_all, []) == []


@pytest.mark.parametrize("count", [1, 40, 500])
def test_a_refusal_fails_what_waits_and_costs_nothing_afterwards(count: int) -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        channel = channel_of(device)
        for _ in range(5):
            client.answers_dma = False
            failures, thread = begin(channel.dma_write_all, [(0, b"x")] * count)
            ask_until(client, lambda: client.unanswered)
            channel.refuse("for a while")
            ended(thread)
            assert failures == ["for a while"]
            channel.admit()
            client.answer_dma()
        assert complete(channel.dma_write_all, [(0, b"y")] * 200) == []
        ask_until(client, lambda: not channel._exchanges)  # late answers are taken too
        assert channel._unread == 0


def soon(
    channel: DmaChannel, runs: list[tuple[int, bytes]], writing: Writing | None = None
) -> queue.SimpleQueue[DmaError | None]:
    """Write without waiting; what `done` is called with comes into the queue."""
    results: queue.SimpleQueue[DmaError | None] = queue.SimpleQueue()
    channel.dma_write_soon(runs, results.put, writing)
    return results


def test_one_answer_stands_for_all_writes_of_a_call() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, 64 * PAGE, shared=False)
        client.answers_dma = False
        results = soon(channel_of(device), [(n * PAGE, b"x") for n in range(40)])
        ask_until(client, lambda: len(client.unanswered) >= 40)
        assert [header.wants_reply for header, _ in client.unanswered] == [False] * 39 + [True]
        assert results.empty()
        client.answer_dma()
        assert results.get(timeout=20) is None
        assert [ram.view[n * PAGE] for n in range(40)] == [ord("x")] * 40
        assert channel_of(device)._exchanges == {}
        assert channel_of(device)._unread == 0


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_write_that_is_refused_is_told_though_no_reply_was_wanted(bad: int) -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        runs = [(n, b"x") for n in range(3)]
        runs[bad] = (1 << 40, b"x")
        failure = soon(channel_of(device), runs).get(timeout=20)
        assert "refused DMA_WRITE" in str(failure)
        assert channel_of(device)._exchanges == {}


def test_calls_that_do_not_wait_take_their_turns_when_there_is_room() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, 64 * PAGE, shared=False)
        client.answers_dma = False
        calls = [soon(channel_of(device), [(n * PAGE, b"y") for n in range(40)]) for _ in range(5)]
        ask_until(client, lambda: client.unanswered)
        assert len(client.unanswered) <= 64
        client.answer_dma()
        assert [results.get(timeout=20) for results in calls] == [None] * 5
        assert ram.view[39 * PAGE] == ord("y")


def test_a_refusal_ends_calls_that_do_not_wait_sent_or_not() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        channel = channel_of(device)
        client.answers_dma = False
        calls = [soon(channel, [(0, b"x")] * 40) for _ in range(3)]
        channel.refuse("for a while")
        calls.append(soon(channel, [(0, b"x")]))
        assert [str(results.get(timeout=20)) for results in calls] == ["for a while"] * 4
        channel.admit()
        client.answer_dma()
        assert soon(channel, [(0, b"z")]).get(timeout=20) is None


def test_what_is_cancelled_fails_sent_or_not_and_nothing_else_does() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        channel = channel_of(device)
        client.answers_dma = False
        runs = [(0, b"x")] * 40
        writings = [Writing(runs) for _ in range(4)]
        results = [soon(channel, runs, writing) for writing in writings]  # all but the first wait for room
        for writing in (writings[0], writings[2]):
            writing.gone = True
            channel.cancel(writing)
        assert str(results[0].get(timeout=20)) == "the client has unmapped the memory"
        client.answer_dma()
        assert str(results[2].get(timeout=20)) == "the client has unmapped the memory"
        assert [results[n].get(timeout=20) for n in (1, 3)] == [None, None]
        failures = complete(channel.dma_write_all, runs, writings[0])
        assert failures == ["the client has unmapped the memory"]
        assert channel._exchanges == {}
        assert channel._unread == 0


def test_nothing_to_write_soon_is_done_at_once() -> None:
    device = PlainDevice()
    with connected(device):
        assert soon(channel_of(device), []).get(timeout=0) is None
