"""Threads of a test, and waiting for what they do."""

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


def in_thread(call: Callable[[], object]) -> threading.Thread:
    """Call it on a thread of its own."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> None:
    """Wait until the thread ends."""
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it does not end"
