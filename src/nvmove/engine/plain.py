"""The engine in plain Python: a thread for each submission queue, woken by kicks."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable

from nvmove.nvme.seams import Lender
from nvmove.vfio.receive import PlainReceiver, Receiver

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
POLL = 50e-6
"""Seconds that a worker looks at a doorbell in memory after its last command (docs/performance-doorbells.md)."""


class PlainEngine:
    """`nvme.seams.Engine` with a daemon thread for each queue."""

    def __init__(self, name: str = "nvme", poll: float = POLL) -> None:
        self.poll = poll
        self.receiver: Receiver = PlainReceiver()
        """Who receives the messages of the client whose queues these are."""
        self._name = name
        self._lock = threading.Lock()
        self._workers: dict[int, Worker] = {}
        self._all: set[Worker] = set()
        self._run: Callable[[int], None] | None = None

    def bind(self, run: Callable[[int], None], lender: Lender | None = None) -> None:
        """`run(sqid)` is what runs a queue; called once, before any `attach`. This engine borrows nothing."""
        self._run = run

    def attach(self, sqid: int) -> None:
        """Start a worker for queue `sqid`; raises OSError when there is no thread to be had, or nothing else."""
        if self._run is None:
            raise RuntimeError("attach before bind")
        with self._lock:
            # The worker of a queue of the same id may still be on its last command: the new one waits for its end.
            before = [worker for worker in self._all if worker.sqid == sqid]
            worker = self._worker(sqid)
            worker.before = before
            worker.ended = self._ended
            self._workers[sqid] = worker
            self._all.add(worker)
        try:
            worker.thread.start()
        except RuntimeError as error:
            self.detach(sqid)
            self._ended(worker)
            raise OSError(errno.EAGAIN, str(error)) from None

    def kick(self, sqid: int) -> None:
        """Wake the worker of queue `sqid`, if there is such a queue."""
        with self._lock:
            worker = self._workers.get(sqid)
        if worker is not None:
            worker.kick()

    def detach(self, sqid: int) -> None:
        """End the worker of queue `sqid` as soon as it is done with what it does; never waits."""
        with self._lock:
            worker = self._workers.pop(sqid, None)
        if worker is not None:
            worker.stop()

    def close(self) -> None:
        """Stop all workers, and wait for them a few seconds: a disk may hold one up. Not for a worker's own thread."""
        with self._lock:
            workers = list(self._all)
            self._workers.clear()
        for worker in workers:
            worker.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
        if any(worker.thread.is_alive() for worker in workers):
            log.error("%s: I/O is still under way after %g s", self._name, CLOSE_SECONDS)

    def _worker(self, sqid: int) -> Worker:
        """Return what shall run queue `sqid`, not started."""
        assert self._run is not None
        return Worker(sqid, self._run, f"{self._name}-sq{sqid}")

    def _ended(self, worker: Worker) -> None:
        with self._lock:
            self._all.discard(worker)


class Worker:
    """One queue's thread."""

    def __init__(self, sqid: int, run: Callable[[int], None], name: str) -> None:
        self.sqid = sqid
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.before: list[Worker] = []
        """Workers whose end this one waits for."""
        self.ended: Callable[[Worker], None] = lambda _worker: None
        self.stopping = False
        self._run = run
        self._wake = threading.Event()

    def kick(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def stop(self) -> None:
        """End as soon as what is under way is done."""
        self.stopping = True
        self.kick()

    def wait(self) -> None:
        """Wait for a kick."""
        self._wake.wait()
        # Cleared before the turn: a kick during the turn makes another one.
        self._wake.clear()

    def turn(self) -> None:
        """Do what there is to do."""
        self._run(self.sqid)

    def _main(self) -> None:
        for worker in self.before:
            worker.thread.join()
        self.before = []
        while True:
            self.wait()
            if self.stopping:
                break
            try:
                self.turn()
            except Exception:
                log.exception("queue %d", self.sqid)
        self.ended(self)
