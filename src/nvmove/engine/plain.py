"""The engine in plain Python: a thread for each submission queue, woken by kicks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

POLL = 50e-6
"""Seconds that a worker looks at a doorbell in memory after its last command (docs/performance.md)."""


class PlainEngine:
    """`nvme.seams.Engine` with a daemon thread for each queue."""

    def __init__(self, name: str = "nvme", poll: float = POLL) -> None:
        self.poll = poll
        self._name = name
        self._lock = threading.Lock()
        self._workers: dict[int, _Worker] = {}
        self._all: set[_Worker] = set()
        self._run: Callable[[int], None] | None = None

    def bind(self, run: Callable[[int], None]) -> None:
        """`run(sqid)` is what runs a queue; called once, before any `attach`."""
        self._run = run

    def attach(self, sqid: int) -> None:
        """Start a worker for queue `sqid`."""
        if self._run is None:
            raise RuntimeError("attach before bind")
        with self._lock:
            # The worker of a queue of the same id may still be on its last command: the new one waits for its end.
            before = [worker for worker in self._all if worker.sqid == sqid]
            worker = _Worker(sqid, self._run, before, self._ended, f"{self._name}-sq{sqid}")
            self._workers[sqid] = worker
            self._all.add(worker)
        worker.thread.start()

    def kick(self, sqid: int) -> None:
        """Wake the worker of queue `sqid`, if there is such a queue."""
        with self._lock:
            worker = self._workers.get(sqid)
        if worker is not None:
            worker.wake.set()

    def detach(self, sqid: int) -> None:
        """End the worker of queue `sqid` as soon as it is done with what it does; never waits."""
        with self._lock:
            worker = self._workers.pop(sqid, None)
        if worker is not None:
            worker.stop()

    def close(self) -> None:
        """Stop all workers and wait for them. Not for a worker's own thread."""
        with self._lock:
            workers = list(self._all)
            self._workers.clear()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.thread.join()

    def _ended(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)


class _Worker:
    """One queue's thread."""

    def __init__(
        self,
        sqid: int,
        run: Callable[[int], None],
        before: list[_Worker],
        ended: Callable[[_Worker], None],
        name: str,
    ) -> None:
        self.sqid = sqid
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._run = run
        self._before = before
        self._ended = ended
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True
        self.wake.set()

    def _main(self) -> None:
        for worker in self._before:
            worker.thread.join()
        self._before = []
        while True:
            self.wake.wait()
            # Cleared before the run: a kick during the run makes another one.
            self.wake.clear()
            if self._stopping:
                break
            try:
                self._run(self.sqid)
            except Exception:
                log.exception("queue %d", self.sqid)
        self._ended(self)
