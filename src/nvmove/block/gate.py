"""A count of the requests inside, and a door that can be shut behind them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable


class Gate:
    """Lets requests in until it is shut; who shuts it waits until those inside have left."""

    def __init__(self, refusal: int = 0) -> None:
        """`refusal` is what `enter` answers: 0 when open, else an errno."""
        self._condition = threading.Condition(threading.Lock())
        self._inside = 0
        self._refusal = refusal
        self._guests: list[Callable[[], None]] = []

    def enter(self) -> int:
        """Count one request in and return 0; or return the errno it is refused with."""
        with self._condition:
            if not self._refusal:
                self._inside += 1
            return self._refusal

    def leave(self) -> None:
        """Count one request out."""
        with self._condition:
            self._inside -= 1
            if not self._inside:
                self._condition.notify_all()

    def stay(self, revoke: Callable[[], None]) -> int:
        """As `enter`, for long: `revoke` is called when it is time to leave, with `depart`."""
        with self._condition:
            if not self._refusal:
                self._inside += 1
                self._guests.append(revoke)
            return self._refusal

    def depart(self, revoke: Callable[[], None]) -> None:
        """Leave after a `stay`."""
        with self._condition:
            self._guests.remove(revoke)
        self.leave()

    def revoke(self) -> None:
        """Ask those who stay to leave; they may stay again."""
        with self._condition:
            for revoke in self._guests:
                revoke()

    @property
    def refusal(self) -> int:
        """The errno requests are refused with; 0 when they are let in."""
        return self._refusal

    def shut(self, refusal: int = errno.ESHUTDOWN, timeout: float | None = None) -> bool:
        """Refuse requests with `refusal` from now on, and return when nobody is inside any more.

        False when somebody still is after `timeout` seconds.
        """
        with self._condition:
            self._refusal = refusal
            for revoke in self._guests:
                revoke()
            return self._condition.wait_for(lambda: not self._inside, timeout)

    def open(self) -> None:
        """Let requests in again."""
        with self._condition:
            self._refusal = 0
