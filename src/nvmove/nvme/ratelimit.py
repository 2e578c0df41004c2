"""Log lines that the guest can cause are limited: a guest must not fill the host's disk."""

from __future__ import annotations

from collections.abc import Callable

BURST = 10
PERIOD = 60.0
"""Lines in so many seconds."""


class RateLimit:
    """At most `BURST` lines in `PERIOD` seconds of `clock`. Wants no lock: a line too many does no harm."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._used = 0

    def allows(self) -> bool:
        """Whether a line may be written now; counts it."""
        now = self._clock()
        if now - self._since >= PERIOD:
            self._since, self._used = now, 0
        self._used += 1
        return self._used <= BURST
