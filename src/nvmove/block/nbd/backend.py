"""NBD exports: QEMU's own for every format but raw, or any other server's. Requests end on the connection's thread."""

from __future__ import annotations

import ctypes
import errno
import logging
import threading
import urllib.parse
from collections.abc import Callable, Sequence

from nvmove.block.backend import BackendError, Operation, Request, refusal
from nvmove.block.config import OpenOptions
from nvmove.block.gate import Gate
from nvmove.block.lend import ASK, NOTHING, LentExport, LentFile, LentSpace, Loan
from nvmove.block.linux import address_of
from nvmove.block.nbd import libnbd
from nvmove.block.nbd.connection import Connection
from nvmove.block.nbd.libnbd import Handle
from nvmove.block.nbd.link import Export, Link
from nvmove.block.nbd.revival import Revival
from nvmove.block.nbd.spares import Spares
from nvmove.block.nbd.turns import Turn, Turns
from nvmove.block.transfer import gather, scatter
from nvmove.block.zeroes import detect_zeroes

_log = logging.getLogger(__name__)

SECTOR = 512
"""An export's size is a multiple of this."""

CONNECT_TIMEOUT = 10.0
"""Seconds a server gets to answer."""

DRAIN_TIMEOUT = 10.0
"""Seconds that requests under way get when the back end is closed or connected anew."""

CUT_TIMEOUT = 5.0
"""Seconds that borrowers get then to notice that their connection has ended."""

_LONGEST_RANGE = 1 << 30
"""Bytes that one zero or trim covers; they carry no data."""

_SCHEMES = ("nbd", "nbd+unix")
_ZEROES = bytearray(1 << 20)


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
        _Job(self._connection, self._turns, self._gate, self._options, request).start()

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


class _Job:
    """One request, in as many commands as the server wants."""

    def __init__(self, connection: Connection, turns: Turns, gate: Gate, options: OpenOptions, request: Request):
        self._connection = connection
        self._export = connection.export
        self._turns = turns
        self._turn: Turn | None = None
        self._gate = gate
        self._options = options
        self._request = detect_zeroes(request, options)
        self._pinned: list[ctypes.c_char] = []
        """Keeps the memory that libnbd reads and writes from being unmapped."""
        self._lock = threading.Lock()
        self._left = 0
        self._error = 0

    def start(self) -> None:
        """Issue the first commands; the rest follows from their ends."""
        request = self._request
        match request.operation:
            case Operation.FLUSH:
                self._flush_or_finish(not self._options.no_flush and not self._options.read_only)
            case _ if not request.length:
                self._finish()
            case Operation.READ:
                self._read()
            case Operation.DISCARD:
                self._in_turn(alone=False, go=self._discard)
            case Operation.WRITE | Operation.WRITE_ZEROES:
                self._in_turn(alone=not self._is_aligned, go=self._change)

    @property
    def _is_aligned(self) -> bool:
        return (self._request.offset | self._request.length) % self._export.minimum == 0

    @property
    def _blocks(self) -> tuple[int, int]:
        """Offset and length of the export's blocks that the request touches."""
        offset, minimum = self._request.offset, self._export.minimum
        first = offset // minimum * minimum
        return first, -(-(offset + self._request.length) // minimum) * minimum - first

    @property
    def _fua(self) -> bool:
        return (self._request.fua or not self._options.writeback) and not self._options.no_flush

    def _in_turn(self, alone: bool, go: Callable[[], None]) -> None:
        """Call `go` when the range may be written; at once where every request is aligned anyway."""
        if self._export.minimum == 1:
            go()
            return
        first, length = self._blocks
        self._turn = Turn(first, first + length, alone, lambda _: go())
        self._turns.take(self._turn)

    def _read(self) -> None:
        request = self._request
        address = self._pin(request.buffers) if self._is_aligned else None
        if address is not None:
            self._transfer(Handle.pread, address, request.offset, request.length, self._finish)
            return
        first, length = self._blocks
        copy = bytearray(length)

        def store() -> None:
            if not self._error:
                skipped = request.offset - first
                scatter(memoryview(copy)[skipped : skipped + request.length], request.buffers)
            self._finish()

        self._transfer(Handle.pread, self._pin_copy(copy), first, length, store)

    def _change(self) -> None:
        if not self._is_aligned:
            self._read_modify_write()
        elif self._request.operation is Operation.WRITE_ZEROES:
            self._write_zeroes()
        else:
            request = self._request
            address = self._pin(request.buffers)
            if address is None:
                copy = bytearray(request.length)
                gather(request.buffers, memoryview(copy))
                address = self._pin_copy(copy)
            self._write(address, request.offset, request.length)

    def _read_modify_write(self) -> None:
        """Read the blocks that the request touches, change them and write them back."""
        request = self._request
        first, length = self._blocks
        copy = bytearray(length)
        address = self._pin_copy(copy)

        def modify() -> None:
            if self._error:
                self._finish()
                return
            skipped = request.offset - first
            part = memoryview(copy)[skipped : skipped + request.length]
            if request.operation is Operation.WRITE:
                gather(request.buffers, part)
            else:
                part[:] = bytes(len(part))
            self._write(address, first, length)

        self._transfer(Handle.pread, address, first, length, modify)

    def _write(self, address: int, offset: int, length: int) -> None:
        flags = libnbd.CMD_FLAG_FUA if self._fua and self._export.can_fua else 0

        def pwrite(handle: Handle, address: int, length: int, offset: int) -> int:
            return handle.pwrite(address, length, offset, flags)

        self._transfer(pwrite, address, offset, length, self._after_write)

    def _after_write(self) -> None:
        self._flush_or_finish(self._fua and not self._export.can_fua)

    def _write_zeroes(self) -> None:
        request = self._request
        flags = 0 if request.may_unmap and self._options.unmap else libnbd.CMD_FLAG_NO_HOLE
        if self._fua and self._export.can_fua:
            flags |= libnbd.CMD_FLAG_FUA
        if self._export.can_zero:
            longest = _LONGEST_RANGE
            command: Callable[[Handle, int, int], int] = lambda handle, n, at: handle.zero(n, at, flags)  # noqa: E731
        else:
            longest = min(len(_ZEROES), self._export.maximum)
            address = self._pin_copy(_ZEROES)
            flags &= libnbd.CMD_FLAG_FUA
            command = lambda handle, n, at: handle.pwrite(address, n, at, flags)  # noqa: E731
        self._commands(_pieces(request.offset, request.length, longest), command, self._after_write)

    def _discard(self) -> None:
        """Trim the whole blocks in the range; the rest of it stays, as it may."""
        request, minimum = self._request, self._export.minimum
        first = -(-request.offset // minimum) * minimum
        length = (request.offset + request.length) // minimum * minimum - first
        if length <= 0 or not (self._options.unmap and self._export.can_trim):
            self._finish()
            return
        self._commands(_pieces(first, length, _LONGEST_RANGE), lambda h, n, at: h.trim(n, at), self._finish)

    def _flush_or_finish(self, wanted: bool) -> None:
        if wanted and not self._error and self._export.can_flush:
            self._commands([(0, 0)], lambda handle, _length, _offset: handle.flush(), self._finish)
        else:
            self._finish()

    def _transfer(
        self,
        command: Callable[[Handle, int, int, int], int],
        address: int,
        offset: int,
        length: int,
        then: Callable[[], None],
    ) -> None:
        """Read or write memory in pieces that the server takes."""
        pieces = _pieces(offset, length, self._export.maximum)
        self._commands(pieces, lambda h, n, at: command(h, address + at - offset, n, at), then)

    def _commands(
        self,
        pieces: Sequence[tuple[int, int]],
        command: Callable[[Handle, int, int], int],
        then: Callable[[], None],
    ) -> None:
        """Issue a command for each (offset, length); `then` when all are over, with the first errno in `_error`."""
        if not pieces:
            then()
            return
        self._left = len(pieces)

        def done(error: int) -> None:
            with self._lock:
                self._error = self._error or error
                self._left -= 1
                last = not self._left
            if last:
                then()

        for offset, length in pieces:
            self._connection.issue(lambda handle, n=length, at=offset: command(handle, n, at), done)  # type: ignore[misc]

    def _finish(self) -> None:
        self._pinned.clear()
        if self._turn is not None:
            self._turns.end(self._turn)
        self._gate.leave()
        self._request.done(self._error)

    def _pin(self, buffers: Sequence[memoryview]) -> int | None:
        """Return the address of memory that is one run, and hold it; None when it is scattered or read-only."""
        run: int | None = None
        end = None
        for buffer in filter(len, buffers):
            address = address_of(buffer)
            if address is None or (end is not None and address != end):
                return None
            run = address if run is None else run
            end = address + len(buffer)
        self._pinned += [ctypes.c_char.from_buffer(buffer) for buffer in buffers if len(buffer)]
        return run

    def _pin_copy(self, copy: bytearray) -> int:
        pinned = ctypes.c_char.from_buffer(copy)
        self._pinned.append(pinned)
        return ctypes.addressof(pinned)


def _pieces(offset: int, length: int, longest: int) -> list[tuple[int, int]]:
    """Cut a range into (offset, length) of at most `longest` bytes."""
    return [(at, min(longest, offset + length - at)) for at in range(offset, offset + length, longest)]


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
