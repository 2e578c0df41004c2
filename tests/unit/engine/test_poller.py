"""The poller: it looks until it is closed, and soon again after it has found something."""

from __future__ import annotations

import threading

import pytest

from nvmove.engine.poller import LONGEST, OFF, SHORTEST, Poller

LONG = 20


def test_it_looks_until_it_is_closed() -> None:
    looks = threading.Semaphore(0)

    def look() -> bool:
        looks.release()
        return True

    watched = Poller(look, "poller")
    watched.start()
    assert all(looks.acquire(timeout=LONG) for _ in range(5))
    watched.close()
    while looks.acquire(blocking=False):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "poller"]


def test_one_that_was_not_started_can_be_closed() -> None:
    Poller(lambda: None, "poller").close()


def test_it_waits_longer_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([True, False, False, None, True, *[False] * 9])
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 14:
            watched.close()

    watched = Poller(lambda: next(found), "poller")
    monkeypatch.setattr("nvmove.engine.poller.time.sleep", sleep)
    watched._run()
    assert waits[:5] == [SHORTEST, 2 * SHORTEST, 4 * SHORTEST, OFF, SHORTEST]
    assert waits[-1] == LONGEST
