"""Guest memory: what the client mapped with VFIO_USER_DMA_MAP, as `nvmove.nvme.seams.Memory`.

Regions (vfio/mapping.py) with a file descriptor are mmaps, read and written in place. Regions without one go through
the client by message, with bounce buffers. A transfer or a loan (vfio/borrowed.py) holds its mapped regions until it
has ended: an unmap that meets one in use takes the region away from new ones at once, and reports itself done when the
last old one has ended.

What a transfer writes through a mapping is marked dirty at its end, while somebody wants to know (vfio/dirty.py).

Regions without a descriptor are not waited for: the client's main loop, which would serve their messages, is what waits
for the unmap. What is to be written there by message fails (vfio/writing.py). For the same reason a transfer gives its
mapped regions back before it waits for answers to what it writes by message.

A client that shrinks a file it has shared kills this process (SIGBUS), as with any mmap: it is trusted that far.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from nvmove.nvme.seams import DmaError, Segment
from nvmove.vfio.borrowed import MemoryLoan, MemoryTransfer, Run, marking_copy
from nvmove.vfio.device import Client
from nvmove.vfio.dirty import PAGE, DirtyReport, DirtyTracking, runs, split
from nvmove.vfio.mapping import Region, RegionMap, map_shared, merged
from nvmove.vfio.writing import Unmap, Writing, Writings

log = logging.getLogger(__name__)


class GuestMemory:
    """Guest-physical memory of one client after the other. `client` serves regions without a descriptor."""

    def __init__(self, *, lends: bool = True) -> None:
        """`lends` is off where the client unmaps while others of the guest's requests are under way.

        A loan is of all memory, so an unmap would wait for all of them. With an IOMMU it is the guest's CPU that waits,
        in QEMU with QEMU's big lock, which QEMU's NBD server, that they wait for, needs.
        """
        self.client: Client | None = None
        self._lends = lends
        self.dirty = DirtyTracking()
        self._lock = threading.Lock()
        self._map = RegionMap()
        self._loans: list[MemoryLoan] = []
        self._writings = Writings()

    # The client's side: called on the control thread.

    def map(self, address: int, size: int, fd: int | None, offset: int, readable: bool, writable: bool) -> None:
        """Add a region and take `fd` over. Raises OSError: EEXIST on overlap, else what mmap says."""
        try:
            with self._lock:
                if self._map.overlapping(address, address + size):
                    raise OSError(errno.EEXIST, f"guest memory at {address:#x} is mapped already")
            view = None if fd is None else map_shared(fd, size, offset, writable)
        finally:
            if fd is not None:
                os.close(fd)
        with self._lock:
            self._map.insert(Region(address, address + size, view, readable, writable))

    def unmap(self, address: int, size: int, done: Callable[[int], None]) -> None:
        """Take away what is mapped in the range, parts of regions included; `done(0)` when no transfer uses it.

        A range without mappings is no error, as the kernel's vfio has none: a client with an IOMMU unmaps all that the
        guest might have mapped.
        """
        end = address + size
        with self._lock:
            regions = self._map.overlapping(address, end)
            idle = [region for region in regions if not region.uses]
            busy = sum(region.uses > 0 for region in regions)
            under_way = self._writings.unmap(address, end)
            unmap = Unmap(done, busy + len(under_way))
            for writing in under_way:
                writing.unmaps.append(unmap)
            for region in regions:
                self._map.remove(region)
                region.unmap = unmap if region.uses else None
                if region.start < address:
                    self._map.insert(region.part(region.start, address))
                if region.end > end:
                    self._map.insert(region.part(end, region.end))
            if busy:
                self._revoke_loans()
        for region in idle:
            self.dirty.gone(region)
        if not (busy or under_way):
            done(0)
        client = self.client
        if client is not None:  # else they fail without this
            for writing in under_way:
                client.cancel(writing)

    def unmap_all(self, done: Callable[[int], None]) -> None:
        """Take everything away; never an error."""
        self.unmap(0, 1 << 64, done)

    def ranges(self) -> list[tuple[int, int, str]]:
        """Return (address, size, "mapped" or "by message") of each region, in order: for inspection."""
        with self._lock:
            return [(r.start, r.end - r.start, "by message" if r.view is None else "mapped") for r in self._map]

    # The controller's side: called on worker threads.

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes of guest memory; raise DmaError."""
        with self._lock:
            region = self._map.find(address)
            view = region.view
            if view is not None and region.readable and address + length <= region.end:
                start = address - region.start
                return bytes(view[start : start + length])
        transfer = self.acquire((Segment(address, length),), to_guest=False)
        try:
            return b"".join(transfer.buffers)
        finally:
            transfer.finish()

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` into guest memory; raise DmaError. It is there on return."""
        length = len(data)
        with self._lock:
            region = self._map.find(address)
            view = region.view
            if view is not None and region.writable and address + length <= region.end:
                start = address - region.start
                view[start : start + length] = data
                if self.dirty.active:
                    self.dirty.wrote(address, length)
                    self.dirty.record(address, length)
                return
        transfer = self.acquire((Segment(address, length),), to_guest=True)
        done = 0
        for buffer in transfer.buffers:
            buffer[:] = data[done : done + len(buffer)]
            done += len(buffer)
        self.finish(transfer, commit=True, mark=False)

    def acquire(self, segments: Sequence[Segment], to_guest: bool) -> MemoryTransfer:
        """Take the memory of `segments`, one buffer or more each; neighbours in one region become one buffer."""
        transfer = MemoryTransfer(self)
        buffers: list[memoryview] = []
        transfer.buffers = buffers
        try:
            with self._lock:
                for address, length in merged(segments):
                    self._take(transfer, buffers, address, length, to_guest)
                if transfer.bounces and to_guest:
                    transfer.writing = self._writings.add(transfer.bounces)
            if transfer.bounces and not to_guest:
                client = self._require_client()
                for address, buffer in transfer.bounces:
                    buffer[:] = client.dma_read(address, len(buffer))
                transfer.bounces = []  # filled; nothing to write back
        except DmaError:
            self._release(transfer.regions)
            raise
        return transfer

    def lend(self, revoke: Callable[[], None]) -> MemoryLoan | None:
        """Lend all that is mapped, as `nvmove.nvme.seams.LendsMemory`.

        Who begins to want to know what is written, or ends it, ends the loans first (`Leases.suspended`).
        """
        with self._lock:
            if not self._lends or self.dirty.is_for_both:
                return None
            held = [region for region in self._map if region.view is not None]
            for region in held:
                region.uses += 1
            loan = MemoryLoan(self, held, revoke)
            self._loans.append(loan)
            return loan

    def take_back(self, loan: MemoryLoan) -> None:
        """A loan has ended; see `MemoryLoan.release`."""
        with self._lock:
            self._loans.remove(loan)
        self._release(loan.held)

    def _revoke_loans(self) -> None:
        for loan in self._loans:
            loan.revoke()

    def _take(
        self, transfer: MemoryTransfer, buffers: list[memoryview], address: int, length: int, to_guest: bool
    ) -> None:
        while length:
            region = self._map.find(address)
            if not (region.writable if to_guest else region.readable):
                raise DmaError(f"guest address {address:#x} is not {'writable' if to_guest else 'readable'}")
            count = min(length, region.end - address)
            if region.view is None:
                buffer = memoryview(bytearray(count))
                transfer.bounces.append((address, buffer))
            else:
                start = address - region.start
                buffer = region.view[start : start + count]
                region.uses += 1
                transfer.regions.append(region)
                if to_guest:
                    transfer.written.append((address, buffer))
            buffers.append(buffer)
            address += count
            length -= count

    def finish(self, transfer: MemoryTransfer, commit: bool, mark: bool = True) -> None:
        """A transfer has ended; see `MemoryTransfer.finish`. Without `mark` its pages are recorded, and not marked."""
        regions, bounces, written = transfer.regions, transfer.bounces, transfer.written
        transfer.regions, transfer.bounces, transfer.written, transfer.buffers = [], [], [], ()
        marks: list[tuple[int, bytes]] = []
        marking: Writing | None = None
        if self.dirty.active:
            for address, buffer in written:
                self.dirty.wrote(address, len(buffer))
            if mark and commit and self.dirty.marking:
                marks = [marking_copy(run, start, end) for run in written for start, end in split(run[0], len(run[1]))]
                marking = self.to_mark(marks, regions)
            else:
                self._record(written)
        # Before any message is waited for: a client that is in an unmap of these regions answers when it is done.
        self._release(regions)
        try:
            if transfer.writing is not None and commit:
                self._write(transfer.writing, bounces)
                for address, buffer in bounces:
                    self.dirty.wrote(address, len(buffer))
            elif transfer.writing is not None:
                self._end(transfer.writing)
        except DmaError:
            if marking is not None:
                self._end(marking)
                self._record(written)
            raise
        if marking is not None:
            self._mark(marking, marks)

    def _write(self, writing: Writing, runs: Sequence[Run] | Sequence[tuple[int, bytes]]) -> None:
        """Write by message and wait for it; raises DmaError, where the memory was unmapped too."""
        with self._lock:
            may_begin = self._writings.begin(writing)
        try:
            if not may_begin:
                raise DmaError("guest memory was unmapped before it was written to")
            self._require_client().dma_write_all(runs, writing)
        finally:
            self._end(writing)

    def _end(self, writing: Writing) -> None:
        with self._lock:
            finished = self._writings.end(writing)
        for unmap in finished:
            unmap.done(0)

    def to_mark(self, marks: Sequence[tuple[int, bytes]], regions: Sequence[Region]) -> Writing:
        """Return `marks` as what is to be written by message; `regions`, which they are of, are in use until then."""
        with self._lock:
            marking = self._writings.add(marks)
            marking.gone = any(region.unmap is not None for region in regions)
            return marking

    def _mark(self, marking: Writing, marks: list[tuple[int, bytes]]) -> None:
        """Write again what a transfer wrote; what could not be is left for the switch-over."""
        try:
            self._write(marking, marks)
        except DmaError as error:
            log.debug("pages were not marked dirty: %s", error)
            for address, data in marks:
                self.dirty.record(address, len(data))

    def mark_soon(
        self,
        marking: Writing,
        marks: list[tuple[int, bytes]],
        runs: Sequence[tuple[int, int]],
        done: Callable[[], None],
    ) -> None:
        """As `_mark`, without waiting; `done` when the answers are there, or what `runs` names is recorded instead."""

        def answered(error: DmaError | None) -> None:
            self._end(marking)
            if error is not None:
                log.debug("pages were not marked dirty: %s", error)
                for address, length in runs:
                    self.dirty.record(address, length)
            done()

        client = self.client
        with self._lock:
            may_begin = self._writings.begin(marking)
        if client is None:
            answered(DmaError("no client is connected"))
        elif not may_begin:
            answered(DmaError("guest memory was unmapped before it was marked"))
        else:
            client.dma_write_soon(marks, answered, marking)

    def _record(self, written: Sequence[Run]) -> None:
        for address, buffer in written:
            self.dirty.record(address, len(buffer))

    def _release(self, regions: list[Region]) -> None:
        gone: list[Region] = []
        finished: list[Unmap] = []
        with self._lock:
            for region in regions:
                region.uses -= 1
                unmap = region.unmap
                if unmap is not None and not region.uses:
                    gone.append(region)
                    if unmap.one_less():
                        finished.append(unmap)
        for region in gone:
            self.dirty.gone(region)
        for unmap in finished:
            unmap.done(0)

    # The owner's side: any thread but the control thread.

    def mark_dirty(self) -> DirtyReport:
        """Mark the pages that were recorded; nothing may write to guest memory meanwhile, the guest neither.

        Raises DmaError when the client refuses or is gone: the pages stay recorded.
        """
        began = time.monotonic()
        self.dirty.collect()
        recorded = self.dirty.recorded.take()
        pages = sent = 0

        def marks() -> Iterator[tuple[int, bytes]]:
            nonlocal pages, sent
            for start, end in runs(recorded):
                for address, data in self._copies(start, end):
                    pages += (address + len(data) - 1) // PAGE - address // PAGE + 1
                    sent += len(data)
                    yield address, data

        if recorded:
            try:
                self._require_client().dma_write_all(marks())
            except DmaError:
                self.dirty.recorded.add_all(recorded)
                raise
        return DirtyReport(pages, sent, time.monotonic() - began)

    def _copies(self, start: int, end: int) -> list[tuple[int, bytes]]:
        """Copy what must be written again of the regions between `start` and `end`; what is unmapped needs nothing."""
        with self._lock:
            return [
                marking_copy((region.start, region.view), max(start, region.start), min(end, region.end))
                for region in self._map.overlapping(start, end)
                if region.view is not None and region.writable
            ]

    def _require_client(self) -> Client:
        if self.client is None:
            raise DmaError("no client is connected")
        return self.client
