"""One connection to an NBD export, and the thread that waits for its replies."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvmove.block import libnbd
from nvmove.block.backend import BackendError
from nvmove.block.libnbd import Handle, NbdError

_log = logging.getLogger(__name__)

DEFAULT_MAXIMUM = 32 << 20
"""Bytes of payload that a server takes when it does not say ("Block size constraints" in NBD's proto.md)."""

_EVENTS = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)
"""What to poll for, by libnbd's direction."""

_GOODBYE = 1.0
"""Seconds that the server gets for its part in the end of the connection."""


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says of its export; sizes in bytes."""

    size: int
    read_only: bool
    can_fua: bool
    can_flush: bool
    can_zero: bool
    can_trim: bool
    minimum: int
    """Offsets and lengths are multiples of this."""
    maximum: int
    """No read or write is longer than this, which is a multiple of `minimum`."""


class Connection:
    """Commands may be issued from any thread; they end on this connection's own thread."""

    def __init__(self, uri: str, timeout: float) -> None:
        """Connect within `timeout` seconds; raises BackendError."""
        self._uri = uri
        self._handle = Handle()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._polled = (-1, 0)
        """The socket and the events that `_poll` waits for besides the wake-up."""
        self._poll = self._poll_for(*self._polled)
        try:
            self._connect(timeout)
            self.export = self._look()
        except NbdError as error:
            self._free()
            raise BackendError(f"Could not connect to '{uri}': {error}") from None
        except BackendError:
            self._free()
            raise
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

    def _connect(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._handle.connect(self._uri)
        while not self._handle.is_ready:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendError(f"Could not connect to '{self._uri}': no answer within {timeout:g} s")
            self._wait(left)
            if self._handle.is_lost:
                raise BackendError(f"Could not connect to '{self._uri}': the server closed the connection")

    def _look(self) -> Export:
        handle = self._handle
        minimum = max(1, handle.block_size(libnbd.SIZE_MINIMUM))
        maximum = min(handle.block_size(libnbd.SIZE_MAXIMUM) or DEFAULT_MAXIMUM, DEFAULT_MAXIMUM)
        return Export(
            size=handle.size(),
            read_only=handle.can("is_read_only"),
            can_fua=handle.can("can_fua"),
            can_flush=handle.can("can_flush"),
            can_zero=handle.can("can_zero"),
            can_trim=handle.can("can_trim"),
            minimum=minimum,
            maximum=max(minimum, maximum // minimum * minimum),
        )

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
                self._end_completed()
                self._fail_pending(errno.ENOTCONN)

    def _wait(self, timeout: float | None = None) -> None:
        """Wait until the socket is ready or `timeout` seconds are over, and let libnbd do its work; raises NbdError.

        Not nbd_poll: it cannot be woken, and takes a server that hung up early for its own caller's mistake.
        """
        direction = self._handle.direction
        wanted = _EVENTS[direction & (libnbd.DIRECTION_READ | libnbd.DIRECTION_WRITE)]
        fd = self._handle.fd
        if (fd, wanted) != self._polled:
            self._poll, self._polled = self._poll_for(fd, wanted), (fd, wanted)
        ready = dict(self._poll.poll(None if timeout is None else max(0, int(timeout * 1000))))
        if self._wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
        events = ready.get(fd, 0)
        if direction & libnbd.DIRECTION_READ and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._handle.notify_read()
        elif events:
            self._handle.notify_write()

    def _poll_for(self, fd: int, wanted: int) -> select.poll:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if fd >= 0:
            poll.register(fd, wanted)
        return poll

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

    def _free(self) -> None:
        self._handle.close()
        os.close(self._wakeup)

    def _goodbye(self) -> None:
        deadline = time.monotonic() + _GOODBYE
        try:
            if not self._handle.is_lost:
                self._handle.disconnect()
            while not self._handle.is_lost and time.monotonic() < deadline:
                self._wait(deadline - time.monotonic())
        except NbdError as error:
            _log.debug("nbd: %s", error)
