"""Connections for borrowers (block/lend.py): each has one of its own, and gives it back for the next."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

from nvmove.block.nbd.link import Link
from nvmove.block.nbd.revival import Revival

_log = logging.getLogger(__name__)


class Spares:
    """Connecting takes a while, and who borrows does not wait: it comes again."""

    def __init__(self, connect: Callable[[], Link]) -> None:
        """`connect` raises BackendError."""
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._lent: set[Link] = set()
        self._wanted: set[Hashable] = set()
        """Who found none."""
        self._is_closed = False
        self._making = Revival(self._make, name="nbd-spare", after_success=0.0)

    def take(self, who: Hashable) -> Link | None:
        """Return a connection, with nothing under way, until it is given back; None: `who` has to come again."""
        dead: list[Link] = []
        with self._lock:
            if self._is_closed:
                return None
            while self._idle and not self._idle[-1].is_quiet:
                dead.append(self._idle.pop())
            link = self._idle.pop() if self._idle else None
            if link is not None:
                self._lent.add(link)
            else:
                self._wanted.add(who)
        for one in dead:
            one.leave()
        if link is None:
            self._making.want()
        return link

    def give(self, link: Link) -> bool:
        """Take a connection back; return whether it is good for another time."""
        with self._lock:
            is_good = link in self._lent and link.is_quiet and not self._is_closed
            self._lent.discard(link)
            if is_good:
                self._idle.append(link)
        if not is_good:
            link.leave()
        return is_good

    def cut(self) -> None:
        """End what is under way on those that are lent: it fails. They are still to be given back."""
        with self._lock:
            for link in self._lent:
                link.cut()

    def drop(self, *, for_good: bool = False) -> None:
        """Make all anew, or with `for_good` none: no connection from before is lent any more."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._lent.clear()
            self._wanted.clear()
            self._is_closed = self._is_closed or for_good
        for link in idle:
            link.leave()

    def _make(self) -> None:
        """Make one for each who found none; raises BackendError."""
        while True:
            with self._lock:
                if not self._wanted:
                    return
            link = self._connect()
            with self._lock:
                is_wanted = bool(self._wanted) and not self._is_closed
                if is_wanted:
                    self._wanted.pop()
                    self._idle.append(link)
            if not is_wanted:
                link.leave()
