"""Shutdown processing (Base 3.6): before CSTS.SHST says complete, every write cache is on stable storage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from nvmove.block.backend import Backend, Operation, Request


def flush_all(backends: Iterable[Backend], done: Callable[[], None]) -> None:
    """Flush every back end that can be written; call `done` once, when the last has answered, whatever it answered.

    A flush that fails here has nobody to be told: the host has asked for a shutdown, not for a status.
    """
    writable = [backend for backend in backends if not backend.read_only]
    lock = threading.Lock()
    rest = len(writable) + 1

    def one_done(_errno: int) -> None:
        nonlocal rest
        with lock:
            rest -= 1
            is_last = rest == 0
        if is_last:
            done()

    for backend in writable:
        backend.submit(Request(Operation.FLUSH, one_done))
    one_done(0)
