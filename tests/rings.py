"""The compiled engine without threads, and what it needs lent: for tests that say what happens when."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import cast

from nvmove.block import linux
from nvmove.block.backend import Operation, Request
from nvmove.block.lend import NOTHING, LentExport, LentSpace, Loan
from nvmove.block.nbd import libnbd
from nvmove.engine.compiled import run_lent
from nvmove.engine.inline import InlineEngine
from nvmove.engine.loop import Bells, Ring
from nvmove.nvme.seams import Lender, Lending, LentRegion
from nvmove.nvme.spec import Nvm
from tests.disk import Disk
from tests.lines import Lines
from tests.nbd_server import Server
from tests.nvme_host import Host
from tests.ram import Ram

PUNCH = linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE


class InlineRings(InlineEngine):
    """The rings run when `drain` says so; between two drains they are lent, and sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.bells = Bells()
        self.rings: dict[int, Ring] = {}
        self.lent: set[int] = set()
        self.runs: list[int] = []
        """Queues that Python ran."""
        self._lender: Lender | None = None
        self._runs: Callable[[int], None] = lambda _sqid: None

    def bind(self, run: Callable[[int], None], lender: Lender | None = None) -> None:
        self._lender = lender
        self._runs = run
        super().bind(self._turn)

    def attach(self, sqid: int) -> None:
        super().attach(sqid)
        self.rings[sqid] = Ring(0, self.bells)
        self.lent.discard(sqid)

    def detach(self, sqid: int) -> None:
        super().detach(sqid)
        self.lent.discard(sqid)

    def _turn(self, sqid: int) -> None:
        assert self._lender is not None
        while True:
            if sqid not in self.attached:
                return
            if sqid not in self.lent:
                lending = Lending.REFUSED if sqid == 0 else self._lender.lend(sqid, self.rings[sqid])
                if lending is Lending.SOON:
                    return
                if lending is Lending.REFUSED:
                    self.runs.append(sqid)
                    self._runs(sqid)
                    return
                self.lent.add(sqid)
            if run_lent(self.rings[sqid], self._lender, sqid, may_wait=False):
                return
            self.lent.discard(sqid)

    def drain(self) -> None:
        """Run all queues until nothing is left to do."""
        super().drain()
        for sqid in list(self.lent):
            self._turn(sqid)
        super().drain()


class LentRam(Ram):
    """Guest memory that can be lent; what `holes` take away must be revoked by `punch`."""

    def __init__(self, size: int = 8 << 20) -> None:
        super().__init__(0)
        self.data = mmap.mmap(-1, size)  # type: ignore[assignment]  # begins on a page, as O_DIRECT wants it
        self.loans: list[_MemoryLoan] = []
        self.lends = True

    def lend(self, revoke: Callable[[], None]) -> _MemoryLoan | None:
        if not self.lends:
            return None
        self.loans.append(_MemoryLoan(self, revoke))
        return self.loans[-1]

    @property
    def regions(self) -> Sequence[LentRegion]:
        view, found, start = memoryview(self.data), list[LentRegion](), 0
        for hole in sorted(self.holes, key=lambda hole: hole.start):
            if hole.start > start:
                found.append(LentRegion(start, view[start : hole.start], True, True))
            start = max(start, hole.stop)
        if start < len(self.data):
            found.append(LentRegion(start, view[start:], True, True))
        return found

    def punch(self, hole: range) -> None:
        """Unmap `hole`: what is lent comes back with the next drain."""
        self.holes.append(hole)
        for loan in self.loans:
            loan.revoke()


class _MemoryLoan:
    """The memory, as it is when it is lent."""

    marks = False

    def __init__(self, ram: LentRam, revoke: Callable[[], None]) -> None:
        self.revoke, self.regions, self._ram = revoke, ram.regions, ram

    def mark(self, runs: Sequence[tuple[int, int]], done: Callable[[], None]) -> None:
        raise AssertionError("nothing is to be marked")

    def release(self) -> None:
        self._ram.loans.remove(self)


class _Line:
    def __init__(self, lines: LentLines, fd: int, vector: int, revoke: Callable[[], None]) -> None:
        self.fd, self.vector, self.revoke, self._lines = fd, vector, revoke, lines

    def release(self) -> None:
        self._lines.collect(self)
        self._lines.lent.remove(self)
        os.close(self.fd)


class LentLines(Lines):
    """Interrupt lines that can be lent; `signals` has what went through eventfds as one of each, once looked at."""

    def __init__(self, msix: bool = True) -> None:
        super().__init__(msix)
        self.lent: list[_Line] = []

    def lend(self, vector: int, revoke: Callable[[], None]) -> _Line:
        line = _Line(self, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), vector, revoke)
        self.lent.append(line)
        return line

    def collect(self, line: _Line) -> None:
        try:
            os.eventfd_read(line.fd)
        except BlockingIOError:
            return
        self.signals.append(line.vector)

    def look(self) -> list[int]:
        """Return the vectors that were signalled since the last look."""
        for line in self.lent:
            self.collect(line)
        found, self.signals = self.signals, []
        return found


class LentDisk(Disk):
    """A disk in a file in memory, that can be lent."""

    def __init__(self, size: int = 1 << 20, alignment: int = 1) -> None:
        """With `alignment` it is run as one of O_DIRECT."""
        super().__init__(0)
        self.alignment = alignment
        self.lent_fd = -1
        """Lent in place of the file, when set."""
        self.fd = os.memfd_create("disk")
        os.ftruncate(self.fd, size)
        self.length = size
        self.lends = True
        self.syncs = True
        self.durable = False
        self.space = LentSpace(PUNCH, PUNCH, PUNCH)  # the one that a file in memory has
        self.loans = 0
        self.syncs_failed: list[int] = []

    def __del__(self) -> None:
        os.close(self.fd)

    @property
    def size(self) -> int:
        return self.length

    @property
    def contents(self) -> bytes:
        return os.pread(self.fd, self.size, 0)

    def lend(self, revoke: Callable[[], None]) -> Loan | None:
        if not self.lends or self.hold:
            return None
        self.loans += 1
        fd = self.fd if self.lent_fd < 0 else self.lent_fd
        return self._loan(fd, self._returned)

    def _loan(self, fd: int, release: Callable[[], None], export: LentExport | None = None) -> Loan:
        return Loan(
            fd,
            release,
            writable=not self.read_only,
            syncs=self.syncs,
            durable=self.durable,
            space=self.space,
            alignment=self.alignment,
            export=export,
        )

    def sync_failed(self, code: int) -> None:
        self.syncs_failed.append(code)

    def _returned(self) -> None:
        self.loans -= 1

    def perform(self, request: Request) -> None:
        if request.operation is Operation.READ:
            os.preadv(self.fd, request.buffers, request.offset)
        elif request.operation is Operation.WRITE:
            os.pwritev(self.fd, request.buffers, request.offset)
        elif request.operation is Operation.WRITE_ZEROES or (
            request.operation is Operation.DISCARD and self.space.discard != NOTHING
        ):
            os.pwrite(self.fd, bytes(request.length), request.offset)


class TrimmingServer(Server):
    """Trims as the file does."""

    def _do(self, name: str, offset: int, length: int, payload: bytes) -> bytes:
        return super()._do("zero" if name == "trim" else name, offset, length, payload)


class ExportedDisk(LentDisk):
    """The same file behind an NBD server, which is what is lent: every other time without FUA."""

    def __init__(self, size: int = 1 << 20) -> None:
        super().__init__(size)
        self.server = TrimmingServer(cast(bytearray, mmap.mmap(self.fd, size)))
        self._idle: list[socket.socket] = []
        self._lent = 0

    def lend(self, revoke: Callable[[], None]) -> Loan | None:
        self.loans += 1
        self._lent += 1
        connection = self._idle.pop() if self._idle else self._connect()

        def release() -> None:
            self._idle.append(connection)
            self.loans -= 1

        loan = self._loan(connection.fileno(), release, LentExport(can_fua=self._lent % 2 == 0, maximum=1 << 20))
        zeroes, unmapped, discard = self.space
        loan.space = LentSpace(
            libnbd.CMD_WRITE_ZEROES if zeroes > 0 else zeroes,
            libnbd.CMD_WRITE_ZEROES if unmapped > 0 else unmapped,
            libnbd.CMD_TRIM if discard > 0 else discard,
        )
        return loan

    def _connect(self) -> socket.socket:
        """Return a connection as it is after the handshake."""
        ours, theirs = socket.socketpair()

        def serve() -> None:
            with theirs, contextlib.suppress(EOFError):
                self.server.transmit(theirs)

        threading.Thread(target=serve, daemon=True).start()
        return ours

    def hang_up(self) -> None:
        """End all connections."""
        for connection in self._idle:
            connection.close()


class Rig(Host):
    """A host whose I/O queues are lent."""

    ram: LentRam
    lines: LentLines
    disk: LentDisk
    engine: InlineRings

    def __init__(self, disk: LentDisk | None = None, **arguments: object) -> None:
        super().__init__(
            ram=LentRam(),
            lines=LentLines(),
            disk=disk or LentDisk(),
            engine=InlineRings(),
            **arguments,  # type: ignore[arg-type]
        )
        self.enable()
        self.create(1)
        self.drain()
        self.lines.look()
        self.engine.runs.clear()

    @property
    def in_python(self) -> bool:
        """Whether Python ran an I/O queue since this was asked last, or any I/O command ever."""
        found = bool(set(self.engine.runs) - {0} or self.disk.operations)
        self.engine.runs.clear()
        return found

    def read(self, lba: int = 0, blocks: int = 1, **fields: int) -> int:
        return self.command(1, Nvm.READ, nsid=1, cdw10=lba, cdw12=blocks - 1, **fields).status
