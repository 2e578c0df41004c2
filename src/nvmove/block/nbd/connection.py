"""A connection to an NBD export that many use, and the thread that waits for its replies."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable

from nvmove.block.nbd import libnbd
from nvmove.block.nbd.libnbd import Handle, NbdError
from nvmove.block.nbd.link import Link

_log = logging.getLogger(__name__)

_GOODBYE = 1.0
"""Seconds that the server gets for its part in the end of the connection."""


class Connection(Link):
    """Commands may be issued from any thread; they end on this connection's own thread."""

    def __init__(self, uri: str, timeout: float, lost: Callable[[], None]) -> None:
        """Connect within `timeout` seconds; raises BackendError. `lost` is called, and never waits, when it ends."""
        super().__init__(uri, timeout, wakeup=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._lost = lost
        self._lock = threading.Lock()
        self._pending: dict[int, Callable[[int], None]] = {}
        self._closing = False
        self._refusal = 0
        """The errno of every command, once the connection is lost or closed."""
        self._thread = threading.Thread(target=self._run, name="nbd", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone: every command fails."""
        return bool(self._refusal)

    def look(self) -> None:
        """Find the connection lost if the server has hung up, before its thread has seen that."""
        with self._lock:
            if not self._closing and (self._handle.is_lost or self._has(select.POLLRDHUP)):
                self._refusal = self._refusal or errno.ENOTCONN

    def issue(self, start: Callable[[Handle], int], done: Callable[[int], None]) -> None:
        """Start a command; `done(errno)` is called once, on this connection's thread or, when it cannot start, here."""
        with self._lock:
            error = self._refusal
            if not error:
                try:
                    self._pending[start(self._handle)] = done
                except NbdError as failure:
                    if self._handle.is_lost:
                        self._refusal = errno.ENOTCONN  # before `done`: who is told ENOTCONN may ask `is_lost`
                    error = self._refusal or failure.errno or errno.EIO
                if self._handle.direction != libnbd.DIRECTION_READ:
                    self._wake()  # the socket is full or gone: the thread waits for the wrong thing
        if error:
            done(error)

    def close(self, refusal: int = errno.ESHUTDOWN) -> None:
        """End the connection. Commands, those under way too, fail with `refusal`. Not for a `done` callback."""
        with self._lock:
            self._refusal = refusal
            if self._closing:
                return
            self._closing = True
            self._wake()
        self._thread.join()
        self._goodbye()
        self._free()
        self._fail_pending(refusal)

    def _goodbye(self) -> None:
        deadline = time.monotonic() + _GOODBYE
        try:
            if not self._handle.is_lost:
                self._handle.disconnect()
            while not self._handle.is_lost and time.monotonic() < deadline:
                self._wait(deadline - time.monotonic())
        except NbdError as error:
            _log.debug("nbd: %s", error)

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._wait()
                except NbdError as error:
                    # The connection just died, as is_lost tells, or another thread's command moved the state on.
                    _log.debug("nbd: %s", error)
                if not self._handle.direction and self._handle.is_lost:
                    break  # `is_lost` before the commands' ends, as in `issue`
                self._end_completed()
        finally:
            with self._lock:
                self._refusal = self._refusal or errno.ENOTCONN
            if not self._closing:
                _log.info("the connection to '%s' is lost", self._uri)
                self._lost()
                self._end_completed()
                self._fail_pending(errno.ENOTCONN)

    def _end_completed(self) -> None:
        while (ended := self._handle.completed()) is not None:
            cookie, error = ended
            with self._lock:
                done = self._pending.pop(cookie)
            done(error)

    def _fail_pending(self, error: int) -> None:
        with self._lock:
            left, self._pending = list(self._pending.values()), {}
        for done in left:
            done(error)
