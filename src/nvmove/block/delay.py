"""Work that waits for its time, in a thread that is there only when there is some."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass(order=True, slots=True)
class _Work:
    due: float
    order: int
    group: int = field(compare=False)
    go: Callable[[], None] = field(compare=False)


class Delays:
    """Runs functions later, one after the other, in the order of their times."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._condition = threading.Condition()
        self._waiting: list[_Work] = []
        self._order = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, seconds: float, group: int, go: Callable[[], None]) -> None:
        """Run `go` in `seconds`; now after `close`, or where there is no thread to wait in."""
        with self._condition:
            if not self._closed and self._has_thread():
                self._order += 1
                heapq.heappush(self._waiting, _Work(time.monotonic() + seconds, self._order, group, go))
                self._condition.notify()
                return
        go()

    def _has_thread(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._main, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("%s: a request that should be late is not: %s", self._name, error)
                return False
            self._thread = thread
        return True

    def hasten(self, group: int) -> None:
        """Let what waits in `group` wait no longer; returns at once."""
        with self._condition:
            for work in self._waiting:
                if work.group == group:
                    work.due = 0.0
            heapq.heapify(self._waiting)
            self._condition.notify()

    def close(self) -> None:
        """Run all that waits, and return when it has run. Not for the thread that runs it."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _main(self) -> None:
        while (work := self._next()) is not None:
            try:
                work.go()
            except Exception:
                log.exception("%s: a delayed request", self._name)

    def _next(self) -> _Work | None:
        """Wait for the next that is due; None when all is done after `close`."""
        with self._condition:
            while True:
                if not self._waiting:
                    if self._closed:
                        return None
                    self._condition.wait()
                elif self._closed or (left := self._waiting[0].due - time.monotonic()) <= 0:
                    return heapq.heappop(self._waiting)
                else:
                    self._condition.wait(left)
