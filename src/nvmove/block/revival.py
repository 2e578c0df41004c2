"""A lost connection is made anew in the background, when somebody needs it."""

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

    def __init__(self, attempt: Callable[[], None]) -> None:
        """`attempt` connects, and may wait; it raises BackendError when that fails."""
        self._attempt = attempt
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
        threading.Thread(target=self._main, name="nbd-reconnect", daemon=True).start()

    def _main(self) -> None:
        said = ""
        try:
            self._attempt()
        except BackendError as error:
            said = str(error)
            if said != self._said:  # once, however long it lasts
                _log.warning("%s", error)
        finally:
            with self._lock:
                self._said = said
                self._next = time.monotonic() + PERIOD
                self._running = False
