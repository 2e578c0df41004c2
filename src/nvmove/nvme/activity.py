"""What is in flight over all queues, and what waits for its end: disable, reset and pause.

Nothing waits as a thread but `pause`. Everything here wants the controller's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from nvmove.nvme.queue import SubmissionQueue

Callback = Callable[[], None]


def call(callbacks: list[Callback]) -> None:
    """Call what `Activity` returned; the lock must be released."""
    for callback in callbacks:
        callback()


class Activity:
    """Counts commands fetched and not completed, and other work that may touch guest memory or the disks."""

    def __init__(self, lock: threading.RLock) -> None:
        self.count = 0
        self._idle = threading.Condition(lock)
        self._actions: list[Callable[[], Callback | None]] = []

    def enter(self, sq: SubmissionQueue | None = None, count: int = 1) -> None:
        """`count` things more, of submission queue `sq`."""
        self.count += count
        if sq is not None:
            sq.in_flight += count

    def leave(self, sq: SubmissionQueue | None = None, count: int = 1) -> list[Callback]:
        """`count` things less; return what the caller must call when it has released the lock."""
        after: list[Callback] = []
        if sq is not None:
            sq.in_flight -= count
            if sq.in_flight == 0 and sq.on_idle is not None:
                after.append(sq.on_idle)
                sq.on_idle = None
        self.count -= count
        return after + self._settle()

    def when_idle(self, action: Callable[[], Callback | None]) -> list[Callback]:
        """Run `action` with the lock held as soon as nothing is in flight, now or on the last one's thread.

        What it returns is called after the lock was released. Returns what the caller must call so.
        """
        self._actions.append(action)
        return self._settle()

    def _settle(self) -> list[Callback]:
        after: list[Callback] = []
        while self.count == 0 and self._actions:
            callback = self._actions.pop(0)()
            if callback is not None:
                after.append(callback)
        if self.count == 0:
            self._idle.notify_all()
        return after

    def wait(self, timeout: float | None) -> bool:
        """Wait until nothing is in flight; return whether that came within `timeout` seconds."""
        return self._idle.wait_for(lambda: self.count == 0, timeout)
