"""An engine without threads, for tests and tools: kicks are noted, and `drain` runs them in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable

from nvmove.nvme.seams import Lender


class InlineEngine:
    """`nvme.seams.Engine` that runs when it is told to, queue by queue in the order of the kicks."""

    poll = 0.0

    def __init__(self) -> None:
        self.attached: set[int] = set()
        self._kicked: dict[int, None] = {}
        self._run: Callable[[int], None] = lambda _sqid: None

    def bind(self, run: Callable[[int], None], lender: Lender | None = None) -> None:
        """`run(sqid)` is what runs a queue."""
        self._run = run

    def attach(self, sqid: int) -> None:
        """Queue `sqid` exists from now on."""
        self.attached.add(sqid)

    def kick(self, sqid: int) -> None:
        """Note that queue `sqid` has work."""
        if sqid in self.attached:
            self._kicked[sqid] = None

    def detach(self, sqid: int) -> None:
        """Queue `sqid` is gone, and its kicks with it."""
        self.attached.discard(sqid)
        self._kicked.pop(sqid, None)

    def close(self) -> None:
        """Forget all queues."""
        self.attached.clear()
        self._kicked.clear()

    def drain(self) -> None:
        """Run kicked queues until no kick is left."""
        while self._kicked:
            sqid = next(iter(self._kicked))
            del self._kicked[sqid]
            self._run(sqid)
