"""Waiting for what another thread does."""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE = 20
"""Seconds, at the least."""


def wait(is_so: Callable[[], bool]) -> None:
    """Look every millisecond until it is so."""
    for _ in range(PATIENCE * 1000):
        if is_so():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it does not come")
