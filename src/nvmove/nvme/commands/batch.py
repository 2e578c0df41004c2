"""Several block requests as one: a bounded number at a time, and one answer when the last is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nvmove.block.backend import Backend, Operation, Request

DEPTH = 16
"""Requests of one command under way at a time."""


class Failure(NamedTuple):
    """A request that failed."""

    operation: Operation
    errno: int
    offset: int
    backend: Backend


class Part(NamedTuple):
    """One request to make: `backend`, and the fields of `Request`."""

    backend: Backend
    operation: Operation
    offset: int = 0
    length: int = 0
    buffers: tuple[memoryview, ...] = ()
    fua: bool = False
    may_unmap: bool = False


class Batch:
    """Runs `parts` and calls `done(failure)` once, on the thread of the last one, with the first failure or None.

    A request that failed counts as done when `ignores(failure)`. None is started after a failure, nor once
    `is_stale()`: that is no failure, `done` has to look for itself.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        done: Callable[[Failure | None], None],
        *,
        depth: int = DEPTH,
        is_stale: Callable[[], bool] = lambda: False,
        ignores: Callable[[Failure], bool] = lambda _failure: False,
        count: Callable[[Part, int], None] = lambda _part, _errno: None,
    ) -> None:
        """`count(part, errno)` is told of each request that has ended, errno 0: well."""
        self._parts = iter(parts)
        self._done = done
        self._depth = depth
        self._is_stale = is_stale
        self._ignores = ignores
        self._count = count
        self._lock = threading.Lock()
        self._under_way = 0
        self._exhausted = False
        self._pumping = False
        self._is_over = False
        self._failure: Failure | None = None

    def start(self) -> None:
        """Start; `done` may have been called on return."""
        self._pump()

    def _pump(self) -> None:
        """Submit as long as there is room. Requests that end inside `submit` come back here as one more turn."""
        with self._lock:
            if self._pumping:
                return
            self._pumping = True
        while True:
            with self._lock:
                part = self._next()
                if part is None:
                    self._pumping = False
                    ends_here = self._exhausted and not self._under_way and not self._is_over
                    self._is_over |= ends_here
                    break
            self._submit(part)
        if ends_here:
            self._done(self._failure)

    def _next(self) -> Part | None:
        if self._failure is not None or self._is_stale():
            self._exhausted = True
        if self._exhausted or self._under_way >= self._depth:
            return None
        part = next(self._parts, None)
        if part is None:
            self._exhausted = True
        else:
            self._under_way += 1
        return part

    def _submit(self, part: Part) -> None:
        def ended(errno: int) -> None:
            self._count(part, errno)
            failure = Failure(part.operation, errno, part.offset, part.backend) if errno else None
            if failure is not None and self._ignores(failure):
                failure = None
            with self._lock:
                self._under_way -= 1
                self._failure = self._failure or failure
            self._pump()

        part.backend.submit(
            Request(part.operation, ended, part.offset, part.length, part.buffers, part.fua, part.may_unmap)
        )
