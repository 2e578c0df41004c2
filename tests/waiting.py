"""Waiting for what another thread does."""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE = 20
"""Seconds, at the least."""


def wait(is_so: Callable[[], bool], patience: int = PATIENCE) -> None:
    """Look every millisecond until it is so, for `patience` seconds at the least."""
    for _ in range(patience * 1000):
        if is_so():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it does not come")
