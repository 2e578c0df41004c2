"""QEMU's throttle of events that a guest can cause: one in a period for each key, and the last of each period."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping
from typing import Any

PERIOD = 1.0
"""Seconds."""

Event = Mapping[str, Any]


class Throttle:
    """Passes an event on at once when its key was quiet for a period; else the last one, when the period ends."""

    def __init__(self, emit: Callable[[Event], None], period: float = PERIOD) -> None:
        self._emit = emit
        self._period = period
        self._waiting: dict[Hashable, Event | None] = {}
        """By the keys of running periods: the event that ends it."""

    def send(self, key: Hashable, event: Event) -> None:
        """Pass `event` on, now or later; it should carry its own timestamp."""
        if key in self._waiting:
            self._waiting[key] = event
        else:
            self._emit(event)
            self._begin(key)

    def _begin(self, key: Hashable) -> None:
        self._waiting[key] = None
        asyncio.get_running_loop().call_later(self._period, self._end, key)

    def _end(self, key: Hashable) -> None:
        event = self._waiting.pop(key)
        if event is not None:
            self._emit(event)
            self._begin(key)
