"""One request to an NBD export: what commands it takes there, and where the data lies meanwhile.

A request may be longer than the server takes at once, begin or end within a block of the export, or want what the
server has no command for. `Job` issues as many commands as that takes, and answers the request when all are over.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

from nvmove.block.backend import Operation, Request
from nvmove.block.config import OpenOptions
from nvmove.block.gate import Gate
from nvmove.block.linux import address_of
from nvmove.block.nbd import libnbd
from nvmove.block.nbd.connection import Connection
from nvmove.block.nbd.libnbd import Handle
from nvmove.block.nbd.turns import Turn, Turns
from nvmove.block.transfer import gather, scatter
from nvmove.block.zeroes import detect_zeroes

_LONGEST_RANGE = 1 << 30
"""Bytes that one zero or trim covers; they carry no data."""

_ZEROES = bytearray(1 << 20)


class Job:
    """One request, in as many commands as the server wants."""

    def __init__(
        self, connection: Connection, turns: Turns, gate: Gate, options: OpenOptions, request: Request
    ) -> None:
        """`request` has entered `gate`, and leaves it with its answer."""
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
