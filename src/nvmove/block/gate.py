"""A count of the requests inside, and a door that can be shut behind them."""

from __future__ import annotations

import errno
import threading


class Gate:
    """Lets requests in until it is shut; who shuts it waits until those inside have left."""

    def __init__(self, refusal: int = 0) -> None:
        """`refusal` is what `enter` answers: 0 when open, else an errno."""
        self._condition = threading.Condition(threading.Lock())
        self._inside = 0
        self._refusal = refusal

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
            return self._condition.wait_for(lambda: not self._inside, timeout)

    def open(self) -> None:
        """Let requests in again."""
        with self._condition:
            self._refusal = 0
