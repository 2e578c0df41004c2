"""Whose turn it is to write to a byte range, without waiting in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Turn:
    """A claim on the bytes from `start` to `end`; an `alone` one shares them with nobody."""

    start: int
    end: int
    alone: bool
    go: Callable[[Turn], None]

    def conflicts(self, other: Turn) -> bool:
        """Whether the two must not happen at once."""
        return (self.alone or other.alone) and self.start < other.end and other.start < self.end


class Turns:
    """Lets claims go in the order in which they came, each when no earlier one conflicts with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: list[Turn] = []
        """All that have not ended, in order."""
        self._waiting: set[Turn] = set()

    def take(self, turn: Turn) -> None:
        """Call `turn.go` now or when it is its turn, on whatever thread ended the last that was in its way."""
        with self._lock:
            waits = any(turn.conflicts(earlier) for earlier in self._claims)
            self._claims.append(turn)
            if waits:
                self._waiting.add(turn)
        if not waits:
            turn.go(turn)

    def end(self, turn: Turn) -> None:
        """Give the range up."""
        with self._lock:
            self._claims.remove(turn)
            free = [waiting for waiting in self._claims if waiting in self._waiting and self._may_go(waiting)]
            self._waiting.difference_update(free)
        for waiting in free:
            waiting.go(waiting)

    def _may_go(self, turn: Turn) -> bool:
        for earlier in self._claims:
            if earlier is turn:
                return True
            if turn.conflicts(earlier):
                return False
        return True
