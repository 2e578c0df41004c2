"""The compiled engine: I/O queues run in C, without the GIL, whenever their controller lends them (nvme/leases.py).

Raises ImportError where the compiled loop was not built; `nvmove.engine.choice` chooses.
"""

from __future__ import annotations

from collections.abc import Callable

from nvmove.engine import loop
from nvmove.engine.plain import PlainEngine, Worker
from nvmove.nvme.seams import Lender, Lending

SPIN_US = 100
"""The longest busy wait for the next command; seldom where it was in vain, never without a command before. A guest that
takes longer had better ring: that costs less than the wait (docs/performance.md)."""
MANY = 16
"""Commands that Python runs before the loop is tried again, where the loop got nowhere."""


class CompiledEngine(PlainEngine):
    """`nvme.seams.Engine` that runs what is common in C and the rest as the plain one."""

    def __init__(self, name: str = "nvme", spin_us: int = SPIN_US) -> None:
        super().__init__(name)
        self._spin_us = spin_us
        self._lender: Lender | None = None
        self._bells = loop.Bells()
        self.receiver = self._bells  # doorbells of queues that are lent do not come to Python

    def bind(self, run: Callable[[int], None], lender: Lender | None = None) -> None:
        """`run(sqid)` is what runs a queue that `lender` does not lend; called once, before any `attach`."""
        super().bind(run)
        self._lender = lender

    def _worker(self, sqid: int) -> Worker:
        if sqid == 0 or self._lender is None or self._run is None:  # admin commands are never the loop's
            return super()._worker(sqid)
        ring = loop.Ring(self._spin_us, self._bells)
        return RingWorker(sqid, self._run, self._lender, ring, f"{self._name}-sq{sqid}")


class RingWorker(Worker):
    """One queue's thread: in C as long as possible."""

    def __init__(self, sqid: int, run: Callable[[int], None], lender: Lender, ring: loop.Ring, name: str = "") -> None:
        super().__init__(sqid, run, name)
        self._lender = lender
        self._ring = ring

    def kick(self) -> None:
        """There may be something to do."""
        self._ring.kick()

    def stop(self) -> None:
        """End as soon as what is under way is done; a queue pair that is lent was revoked before."""
        self.stopping = True
        self._ring.revoke()
        self._ring.kick()

    def wait(self) -> None:
        """Wait for a kick."""
        self._ring.wait()

    def turn(self) -> None:
        """Run the queue pair while it is lent; then whatever made it come back, in Python."""
        while not self.stopping:
            lending = self._lender.lend(self.sqid, self._ring)
            if lending is Lending.REFUSED:
                self._run(self.sqid)
            if lending is not Lending.LENT:
                return
            run_lent(self._ring, self._lender, self.sqid)


def run_lent(ring: loop.Ring, lender: Lender, sqid: int, *, may_wait: bool = True) -> bool:
    """Run a queue pair that was lent until it is given back; return whether it is lent still: there was nothing to do.

    That is so only without `may_wait`: with it, the loop waits then.
    """
    while (reason := ring.run(may_wait)) == loop.MARK:
        lender.mark(ring)
    if reason == loop.IDLE:
        return True
    if reason != loop.GONE:  # who took it has ended the lease
        has_done = any(requests for counts in ring.counts().values() for requests, _ in counts)
        lender.give_back(ring)
        if reason == loop.ODD:
            lender.step(sqid, 1 if has_done else MANY)
    return False
