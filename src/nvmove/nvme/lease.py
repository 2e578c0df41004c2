"""A lease: a queue pair, what is lent with it, and on which terms.

Memory, disks and the interrupt are each lent by their owner, who may want them back, and then wants the queue pair back
with them. What of it cannot be lent is no error: the pair is not, and Python runs it.
"""

from __future__ import annotations

import functools
import threading
from typing import Protocol

from nvmove.block.backend import Operation
from nvmove.block.lend import LendsFile, LentFile
from nvmove.nvme import core
from nvmove.nvme.cells import CELL, Ring, cell_of
from nvmove.nvme.doorbells import Doorbells
from nvmove.nvme.queue import SubmissionQueue
from nvmove.nvme.seams import (
    WRITTEN_PAGE,
    Borrower,
    Counts,
    LeaseTerms,
    LendsInterrupts,
    LendsMemory,
    LentDisk,
    LentDoorbell,
    LentInterrupt,
    LentMemory,
)

_NONE_COUNTED = ((0, 0),) * len(Operation)


class Controller(core.Controller, Protocol):
    """What a lease uses of its controller."""

    @property
    def doorbells(self) -> Doorbells:
        """Where the doorbells are."""


class Refused(Exception):
    """The queue pair is not lent: something about it is not plain."""


class Lease:
    """What is lent: a queue pair, and all that its borrower may touch."""

    def __init__(self, sq: SubmissionQueue, borrower: Borrower) -> None:
        self.sq = sq
        self.borrower = borrower
        self.permits = 0
        self.first = 0
        """Commands that the queue had fetched before."""
        self.fetched = 0
        """What the queue knows of the borrower's fetched commands."""
        self.counted: Counts = {}
        """What SMART and the namespaces' counters know of the borrower's counts."""
        self.doorbells = 0
        """And what is known of the doorbells that it was told."""
        self.memory: LentMemory | None = None
        self.interrupt: LentInterrupt | None = None
        self.files: list[LentFile] = []
        self.marked = threading.Event()
        """What was given to the memory to be marked is."""

    def release(self) -> None:
        """Give all of it back but the queue pair; what waits for it may go on at once, so not with the lock held."""
        for lent in (*self.files, self.interrupt, self.memory):
            if lent is not None:
                lent.release()
        self.files, self.interrupt, self.memory = [], None, None

    def borrow(self, controller: Controller) -> LeaseTerms:
        """Take what the borrower may touch, and return it with what else it must know. With the lock.

        Raises Refused when there is something that cannot be lent, OSError and MemoryError when there is no room for
        it; what was taken by then, `release` gives back.
        """
        sq, cq, revoke = self.sq, self.sq.cq, self.borrower.revoke
        if not isinstance(controller.memory, LendsMemory):
            raise Refused
        self.memory = controller.memory.lend(revoke)
        if self.memory is None:
            raise Refused
        disks: dict[int, LentDisk] = {}
        for namespace in controller.namespaces.active:
            if namespace.formatting or not isinstance(namespace.backend, LendsFile):
                raise Refused
            file = namespace.backend.lend(revoke)
            if file is None:
                raise Refused
            self.files.append(file)
            if namespace.block_size % file.alignment:  # a write of less than the disk's block is the back end's
                raise Refused
            disks[namespace.nsid] = LentDisk(
                file.fd,
                namespace.blocks,
                namespace.block_shift,
                file.writable and not namespace.read_only,
                file.zeroes,
                file.alignment,
                file.syncs,
                file.durable,
                file.space,
                file.export,
            )
        if cq.irq_enabled:
            if not isinstance(controller.interrupts, LendsInterrupts):
                raise Refused
            self.interrupt = controller.interrupts.lend(cq.vector, functools.partial(_unroute, self.borrower))
            if self.interrupt is None:
                raise Refused
        return LeaseTerms(
            sqid=sq.sqid,
            sq_address=sq.address,
            sq_size=sq.size,
            sq_head=sq.head,
            sq_tail=sq.tail,
            cqid=cq.cqid,
            cq_address=cq.address,
            cq_size=cq.size,
            cq_head=cq.head,
            cq_tail=cq.tail,
            cq_phase=cq.phase,
            interrupt=self.interrupt.fd if self.interrupt is not None else None,
            page_size=controller.page_size,
            max_transfer=controller.max_transfer,
            durable=not controller.features.volatile_write_cache,
            memory=self.memory.regions,
            disks=disks,
            tail=_doorbell(controller.doorbells, sq, self.memory),
            head=_doorbell(controller.doorbells, cq, self.memory),
            marks=self.memory.marks,
        )

    def count(self, controller: Controller) -> None:
        """Count what the borrower has done since the last time. With the lock."""
        smart, counts = controller.logs.smart, self.borrower.counts()
        for nsid, now in counts.items():
            before = self.counted.get(nsid, _NONE_COUNTED)
            if now == before:
                continue
            namespace = controller.namespaces.get(nsid)
            assert namespace is not None  # which namespaces there are does not change
            for operation, new, old in zip(Operation, now, before, strict=True):
                if new == old:
                    continue
                requests, length = new[0] - old[0], new[1] - old[1]
                namespace.counters.add(operation, requests, length)
                if operation is Operation.READ:
                    smart.read_commands += requests
                    smart.bytes_read += length
                elif operation is Operation.WRITE:
                    smart.write_commands += requests
                    smart.bytes_written += length
        self.counted = counts
        doorbells = self.borrower.doorbells
        controller.doorbells.writes += doorbells - self.doorbells
        self.doorbells = doorbells


def _doorbell(doorbells: Doorbells, ring: Ring, memory: LentMemory) -> LentDoorbell | None:
    """Return where a doorbell is that the host writes in memory; raises Refused: it is in none that is lent."""
    cell = cell_of(ring)
    if doorbells.page is not None:
        return LentDoorbell(*doorbells.cells_of(ring), untouched=None, always=True)
    if not doorbells.enabled or cell >= doorbells.cells:
        return None
    shadow, _ = _cell(memory, doorbells.dbs + CELL * cell)
    event, written = _cell(memory, doorbells.eis + CELL * cell)
    return LentDoorbell(shadow, event, doorbells.late.get(cell), isinstance(ring, SubmissionQueue), written)


def _cell(memory: LentMemory, address: int) -> tuple[memoryview, memoryview | None]:
    """Return the view of a doorbell's cell in guest memory, and of its page's `written`; raises Refused."""
    for region in memory.regions:
        if region.start <= address < region.start + len(region.view) and region.readable and region.writable:
            page = address // WRITTEN_PAGE - region.start // WRITTEN_PAGE
            written = None if region.written is None else region.written[page : page + 1]
            return region.view[address - region.start :][:CELL], written
    raise Refused


def _unroute(borrower: Borrower) -> None:
    """The way of the interrupt changes: none is sent the old way from here on."""
    borrower.mute()
    borrower.revoke()
