"""One connection to an NBD export: made, looked at and ended."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from dataclasses import dataclass

from nvmove.block.backend import BackendError
from nvmove.block.nbd import libnbd
from nvmove.block.nbd.libnbd import Handle, NbdError

_log = logging.getLogger(__name__)

DEFAULT_MAXIMUM = 32 << 20
"""Bytes of payload that a server takes when it does not say ("Block size constraints" in NBD's proto.md)."""

_EVENTS = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)
"""What to poll for, by libnbd's direction."""


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says of its export; sizes in bytes."""

    size: int
    read_only: bool
    can_fua: bool
    can_flush: bool
    can_zero: bool
    can_trim: bool
    can_multi_conn: bool
    """Whether several connections are as good as one: a flush on any covers what was written on all."""
    minimum: int
    """Offsets and lengths are multiples of this."""
    maximum: int
    """No read or write is longer than this, which is a multiple of `minimum`."""


class Link:
    """A connection as it is after the handshake."""

    def __init__(self, uri: str, timeout: float, *, simple: bool = False, wakeup: int = -1) -> None:
        """Connect within `timeout` seconds; raises BackendError.

        With `simple` the server is kept to simple replies. `wakeup`: an eventfd that ends a wait, taken over.
        """
        self._uri = uri
        self._wakeup = wakeup
        try:
            self._handle = Handle(simple=simple)
        except BaseException:
            self._close_wakeup()
            raise
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

    @property
    def fd(self) -> int:
        """The socket."""
        return self._handle.fd

    @property
    def is_quiet(self) -> bool:
        """Whether the connection lives and nothing has come from the server."""
        return not self._has(select.POLLIN | select.POLLRDHUP)

    def _has(self, events: int) -> bool:
        """Whether one of `events` is there now, or no socket is."""
        fd = self.fd
        poll = select.poll()
        if fd >= 0:
            poll.register(fd, events)
        return fd < 0 or bool(poll.poll(0))

    def cut(self) -> None:
        """End it at once, whoever uses the socket; it stays open until `leave`."""
        with socket.socket(fileno=os.dup(self.fd)) as end, contextlib.suppress(OSError):  # not connected any more
            end.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Say goodbye where there is somebody to hear it, and wait for no answer; nothing is under way."""
        try:
            if self.is_quiet:
                self._handle.disconnect()
        except NbdError as error:
            _log.debug("nbd: %s", error)
        self._free()

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
            can_multi_conn=handle.can("can_multi_conn"),
            minimum=minimum,
            maximum=max(minimum, maximum // minimum * minimum),
        )

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
        if self._wakeup >= 0:
            poll.register(self._wakeup, select.POLLIN)
        if fd >= 0:
            poll.register(fd, wanted)
        return poll

    def _free(self) -> None:
        self._handle.close()
        self._close_wakeup()

    def _close_wakeup(self) -> None:
        if self._wakeup >= 0:
            os.close(self._wakeup)
