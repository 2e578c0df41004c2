"""The throttle of events: what passes, and when."""

from __future__ import annotations

import asyncio
from typing import Any

from nvmove.vm.monitor.throttle import Event, Throttle


class Clock:
    """The event loop's timers, by hand."""

    def __init__(self, monkeypatch: Any) -> None:
        self.calls: list[tuple[float, Any]] = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def call_later(self, delay: float, call: Any, *arguments: Any) -> None:
        self.calls.append((delay, lambda: call(*arguments)))

    def tick(self) -> None:
        """All periods that run end."""
        calls, self.calls = self.calls, []
        for _, call in calls:
            call()


def test_the_first_event_passes_at_once_and_of_those_in_its_period_the_last(monkeypatch: Any) -> None:
    clock, seen = Clock(monkeypatch), list[Event]()
    throttle = Throttle(seen.append)
    for number in range(4):
        throttle.send("d0", {"n": number})
    assert seen == [{"n": 0}]
    clock.tick()
    assert seen == [{"n": 0}, {"n": 3}]


def test_what_ends_a_period_begins_the_next(monkeypatch: Any) -> None:
    clock, seen = Clock(monkeypatch), list[Event]()
    throttle = Throttle(seen.append)
    throttle.send("d0", {"n": 0})
    throttle.send("d0", {"n": 1})
    clock.tick()
    throttle.send("d0", {"n": 2})
    assert [event["n"] for event in seen] == [0, 1]
    clock.tick()
    assert [event["n"] for event in seen] == [0, 1, 2]
    clock.tick()
    assert clock.calls == [], "a quiet key has no timer"
    throttle.send("d0", {"n": 3})
    assert [event["n"] for event in seen] == [0, 1, 2, 3]


def test_keys_do_not_hold_each_other_up(monkeypatch: Any) -> None:
    Clock(monkeypatch)
    seen: list[Event] = []
    throttle = Throttle(seen.append)
    throttle.send("d0", {"n": 0})
    throttle.send("d1", {"n": 1})
    assert len(seen) == 2
