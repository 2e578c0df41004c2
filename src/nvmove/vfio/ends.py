"""Several things that end by themselves, and what is done when all have."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Ends:
    """Calls `done` when all have ended that there are, from any thread."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done
        self._lock = threading.Lock()
        self._left = 1  # `no_more`

    def one_more(self) -> Callable[[], None]:
        """There is one more; return what is to be called at its end."""
        with self._lock:
            self._left += 1
        return self._end

    def no_more(self) -> None:
        """There are all."""
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._done()
