"""NBD exports: QEMU's own for every format but raw, or any other server's. Requests end on the connection's thread."""

from __future__ import annotations

import errno
import logging
import threading
import urllib.parse
from collections.abc import Callable

from nvmove.block.backend import BackendError, Request, refusal
from nvmove.block.config import OpenOptions
from nvmove.block.gate import Gate
from nvmove.block.lend import ASK, NOTHING, LentExport, LentFile, LentSpace, Loan
from nvmove.block.nbd import libnbd
from nvmove.block.nbd.connection import Connection
from nvmove.block.nbd.job import Job
from nvmove.block.nbd.link import Export, Link
from nvmove.block.nbd.revival import Revival
from nvmove.block.nbd.spares import Spares
from nvmove.block.nbd.turns import Turns

_log = logging.getLogger(__name__)

SECTOR = 512
"""An export's size is a multiple of this."""

CONNECT_TIMEOUT = 10.0
"""Seconds a server gets to answer."""

DRAIN_TIMEOUT = 10.0
"""Seconds that requests under way get when the back end is closed or connected anew."""

CUT_TIMEOUT = 5.0
"""Seconds that borrowers get then to notice that their connection has ended."""

_SCHEMES = ("nbd", "nbd+unix")


class NbdBackend:
    """An export, over one connection with any number of requests under way; who borrows it has another."""

    def __init__(self, uri: str, options: OpenOptions, timeout: float = CONNECT_TIMEOUT) -> None:
        """Connect; raises BackendError."""
        self._uri = uri
        self._options = options
        self._timeout = timeout
        self._gate = Gate()
        self._lifecycle = threading.Lock()
        """One reconnect or close at a time."""
        self._lock = threading.Lock()
        self._waiting: list[Request] = []
        """What came while the connection was being replaced."""
        self._turns = Turns()
        self._revival = Revival(self.recover)
        self._spares = Spares(lambda: Link(uri, timeout, simple=True))
        self._connection = self._connect()

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._connection.export.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (with EROFS)."""
        return self._options.read_only or self._connection.export.read_only

    @property
    def supports_discard(self) -> bool:
        """Whether DISCARD is passed on."""
        return self._options.unmap and self._connection.export.can_trim and not self.read_only

    @property
    def request_alignment(self) -> int:
        """The export's smallest block: what is not a multiple of it takes a read before the write."""
        return self._connection.export.minimum

    @property
    def is_connected(self) -> bool:
        """Whether the connection lives. When it does not, requests fail with ENOTCONN, and later ones find a new one.

        As with QEMU's own client (`reconnect-delay=0`).
        """
        return not self._connection.is_lost

    def submit(self, request: Request) -> None:
        """Start `request`; `done` is called on the connection's thread, or here when it cannot start."""
        with self._lock:
            error = self._gate.enter()
            if error == errno.EAGAIN:
                self._waiting.append(request)
                return
        if error:
            request.done(error)
            return
        error = refusal(request, self.size, self.read_only)
        if error:
            self._gate.leave()
            request.done(error)
            return
        if self._connection.is_lost:
            self._revival.want()
        Job(self._connection, self._turns, self._gate, self._options, request).start()

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """Lend a connection, as `LendsFile`: where several are as good as one, and requests go out as they are."""
        connection, options = self._connection, self._options
        export = connection.export
        if options.detect_zeroes != "off" or connection.is_lost or not export.can_multi_conn:
            return None
        if export.can_fua and not export.can_flush:  # some of what is to be durable could be so, some not
            return None
        if self._gate.stay(revoke):
            return None
        link = self._spares.take(revoke)
        if link is None or link.export != export:
            if link is not None:
                self._spares.give(link)
            self._gate.depart(revoke)
            return None

        def release() -> None:
            if not self._spares.give(link):
                connection.look()
            self._gate.depart(revoke)

        return Loan(
            link.fd,
            release,
            writable=not self.read_only,
            syncs=export.can_flush and not (options.no_flush or options.read_only),
            durable=not options.writeback,
            space=self._space(export),
            alignment=export.minimum,
            export=LentExport(export.can_fua, export.maximum),
        )

    def _space(self, export: Export) -> LentSpace:
        zeroes = libnbd.CMD_WRITE_ZEROES | libnbd.CMD_FLAG_NO_HOLE << 16 if export.can_zero else ASK
        unmapped = libnbd.CMD_WRITE_ZEROES if self._options.unmap and export.can_zero else zeroes
        return LentSpace(zeroes, unmapped, libnbd.CMD_TRIM if self.supports_discard else NOTHING)

    def sync_failed(self, code: int) -> None:
        """As `LendsFile`: what it means for later ones is the server's to know."""

    def refresh_size(self) -> int:
        """Ask the server for the size again and return it: servers tell it only at connect, so this is a `reconnect`.

        When that fails the old size is returned, and `is_connected` is False.
        """
        try:
            self.reconnect()
        except BackendError as error:
            _log.warning("%s", error)
        return self.size

    def recover(self) -> None:
        """Connect again if the connection is lost; raises BackendError."""
        with self._lifecycle:
            if not self.is_connected:
                self._reconnect()

    def reconnect(self) -> None:
        """Disconnect, if that is still to do, and connect again; raises BackendError, and may then be called again.

        What is under way ends first (on a lost connection it has failed already); what comes meanwhile waits. Not for
        a `done` callback. The old connection ends before the new one begins: qemu-nbd takes one client at a time.
        """
        with self._lifecycle:
            self._reconnect()

    def _reconnect(self) -> None:
        if self._gate.refusal:
            raise BackendError(f"'{self._uri}' is closed")
        self._shut(errno.EAGAIN)
        self._spares.drop()
        try:
            self._connection.close(errno.ENOTCONN)
            self._connection = self._connect()
        finally:
            with self._lock:
                self._gate.open()
                waiting, self._waiting = self._waiting, []
            for request in waiting:
                self.submit(request)

    def close(self) -> None:
        """Finish what is under way, within DRAIN_TIMEOUT, and disconnect. Requests are refused with ESHUTDOWN."""
        with self._lifecycle:
            self._shut(errno.ESHUTDOWN)
            self._spares.drop(for_good=True)
            self._connection.close()

    def _shut(self, refusal: int) -> None:
        """Refuse requests, and wait until those under way have ended: those of borrowers, too."""
        if not self._gate.shut(refusal, DRAIN_TIMEOUT):
            self._spares.cut()
            self._gate.shut(refusal, CUT_TIMEOUT)

    def _connect(self) -> Connection:
        connection = Connection(self._uri, self._timeout, self._gate.revoke)
        export = connection.export
        problem = ""
        block = max(SECTOR, export.minimum)
        if export.size % block:
            problem = f"its size, {export.size} bytes, is not a multiple of {block}"
        elif export.read_only and not (self._options.read_only or self._options.auto_read_only):
            problem = "the export is read-only (readonly=on opens it for reading only)"
        if problem:
            connection.close()
            raise BackendError(f"Could not use '{self._uri}': {problem}")
        return connection


def nbd_unix_uri(socket: str, export: str = "") -> str:
    """Return the URI of an export on a Unix socket."""
    return f"nbd+unix:///{urllib.parse.quote(export, safe='')}?socket={urllib.parse.quote(socket)}"


def open_nbd(uri: str, *, options: OpenOptions | None = None, timeout: float = CONNECT_TIMEOUT) -> NbdBackend:
    """Connect to an NBD export within `timeout` seconds; raises BackendError, one line.

    `uri`: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.
    """
    scheme = uri.partition("://")[0]
    if scheme not in _SCHEMES or "://" not in uri:
        raise BackendError(f"'{uri}': only nbd:// and nbd+unix:// are spoken, without TLS")
    return NbdBackend(uri, options or OpenOptions(), timeout)
