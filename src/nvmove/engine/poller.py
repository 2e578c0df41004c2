"""Looks at memory that somebody else writes without a word: often while it changes, seldom while it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SHORTEST, LONGEST = 100e-6, 5e-3
"""Seconds between two looks; an idle device sees a doorbell after the longest (docs/performance-doorbells.md)."""
OFF = 20e-3
"""The same while nothing can be rung."""


class Poller:
    """Calls `look` from `start` to `close`. It returns whether there was anything, None when there can be nothing."""

    def __init__(self, look: Callable[[], bool | None], name: str) -> None:
        self._look = look
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopping = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End; waits for a look that is under way. Also where there was no `start`."""
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        interval = SHORTEST
        while not self._stopping:
            found = self._look()
            interval = min(2 * interval, LONGEST) if found is False else SHORTEST
            time.sleep(OFF if found is None else interval)
