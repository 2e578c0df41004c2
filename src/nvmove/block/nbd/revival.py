"""A connection that is lost, or that there is none of yet, is made in the background, when somebody needs it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from nvmove.block.backend import BackendError

_log = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between one attempt's end and the next."""


class Revival:
    """At most one attempt at a time, in a thread that is there only for it."""

    def __init__(
        self, attempt: Callable[[], None], *, name: str = "nbd-reconnect", after_success: float = PERIOD
    ) -> None:
        """`attempt` connects, and may wait; it raises BackendError when that fails.

        `after_success`: seconds until the next attempt when it did not fail.
        """
        self._attempt = attempt
        self._name = name
        self._after_success = after_success
        self._lock = threading.Lock()
        self._running = False
        self._next = 0.0
        self._said = ""

    def want(self) -> None:
        """Start an attempt, unless one is under way or was a moment ago; returns at once."""
        with self._lock:
            if self._running or time.monotonic() < self._next:
                return
            self._running = True
        try:
            threading.Thread(target=self._main, name=self._name, daemon=True).start()
        except RuntimeError as error:  # there is no thread to be had: an attempt that failed
            self._end(str(error))

    def _main(self) -> None:
        said = ""
        try:
            self._attempt()
        except BackendError as error:
            said = str(error)
        finally:
            self._end(said)

    def _end(self, said: str) -> None:
        """An attempt is over; `said` is why it failed."""
        if said and said != self._said:  # once, however long it lasts
            _log.warning("%s", said)
        with self._lock:
            self._said = said
            self._next = time.monotonic() + (PERIOD if said else self._after_success)
            self._running = False
