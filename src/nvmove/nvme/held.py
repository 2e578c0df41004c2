"""The commands of one submission queue that failed at the back end and wait to be tried again.

Everything here wants the controller's lock. Nothing looks at all of them but who saves, or lets all of them go: a queue
may have 65,535.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True, order=True)
class HeldCommand:
    """All that is kept of a command that failed and is to be tried again: no memory, no permit, nothing in flight."""

    order: int
    """Which command of its queue it was: they are tried again in this order."""
    sqe: bytes = field(compare=False)
    ready: bool = field(default=False, compare=False)
    """Its turn has come: the VM ran again since it failed, or an Abort hit it."""
    aborted: bool = field(default=False, compare=False)
    """An Abort hit it: it completes as aborted instead."""

    @property
    def cid(self) -> int:
        """Its command id (SQE, bytes 2 and 3)."""
        return int.from_bytes(self.sqe[2:4], "little")


class HeldCommands:
    """At most one for each command id, in the order in which they were submitted."""

    def __init__(self) -> None:
        self._by_cid: dict[int, HeldCommand] = {}
        self._ready: list[HeldCommand] = []
        """A heap."""

    def __len__(self) -> int:
        return len(self._by_cid)

    def __contains__(self, cid: int) -> bool:
        return cid in self._by_cid

    def __iter__(self) -> Iterator[HeldCommand]:
        return iter(sorted(self._by_cid.values()))

    @property
    def ready(self) -> int:
        """How many have their turn."""
        return len(self._ready)

    def add(self, command: HeldCommand) -> None:
        """Keep a command whose id is not there."""
        self._by_cid[command.cid] = command
        if command.ready:
            heapq.heappush(self._ready, command)

    def let_go(self) -> None:
        """It is the turn of all of them."""
        self._ready = sorted(self._by_cid.values())
        for command in self._ready:
            command.ready = True

    def abort(self, cid: int) -> bool:
        """Let the command `cid` complete as aborted, at once; return whether it is there."""
        command = self._by_cid.get(cid)
        if command is None:
            return False
        command.aborted = True
        if not command.ready:
            command.ready = True
            heapq.heappush(self._ready, command)
        return True

    def take(self, count: int) -> list[HeldCommand]:
        """Remove the first `count` commands whose turn has come, and return them; there are so many."""
        taken = [heapq.heappop(self._ready) for _ in range(count)]
        for command in taken:
            del self._by_cid[command.cid]
        return taken

    def clear(self) -> None:
        """Forget all of them."""
        self._by_cid.clear()
        self._ready.clear()
