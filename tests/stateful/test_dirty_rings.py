"""Queues that are lent while guest memory is copied: the destination's memory is the source's, and the plain engine's.

Reads and writes, on both engines, with marking as for QEMU or a log as for a client that migrates itself; pages are
copied, marks answered late or refused, and queues taken back, in whatever order.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.engine.inline import InlineEngine
from nvmove.nvme.spec import Admin, Nvm
from nvmove.vfio.dirty import PAGE, DirtyLog
from tests.nvme_host import Host
from tests.precopy import CopiedRam
from tests.rings import InlineRings, LentDisk, LentLines

BLOCKS = 64
LIST, DATA, GUESTS, EVENTS = 0x10_0000, 0x11_0000, 0x13_F000, 0x14_0000
PAGES = 0x142
"""All of memory. No command's data is in the page at GUESTS."""


class Side(Host):
    """A host whose memory is being copied."""

    ram: CopiedRam
    disk: LentDisk

    def __init__(self, engine: InlineEngine, alignment: int, is_logged: bool, queue_size: int) -> None:
        disk = LentDisk(BLOCKS * 512, alignment)
        os.pwrite(disk.fd, b"".join(bytes([number]) * 512 for number in range(1, BLOCKS + 1)), 0)
        super().__init__(ram=CopiedRam(PAGES), lines=LentLines(), disk=disk, engine=engine)
        self.client = self.ram.client
        entries = [DATA + 4096 * (n * 5 % 24) for n in range(32)]
        self.ram.data[LIST : LIST + 8 * 32] = struct.pack("<32Q", *entries)
        self.enable()
        self.create(1, None, queue_size, queue_size)
        self.drain()
        self.log = DirtyLog() if is_logged else None
        with self.controller.leases.suspended():
            if self.log is not None:
                self.ram.memory.dirty.start_log(self.log)
            else:
                self.ram.memory.dirty.start_marking()
        self.client.copy_all()  # all that was before

    def put(self, qid: int, entry: bytes) -> None:
        self.client.dirty.add((self.rings[qid].address + 64 * self.rings[qid].tail) // PAGE)  # the guest's own write
        super().put(qid, entry)

    def report(self) -> None:
        """The client asks for the log, as before each of its rounds."""
        if self.log is None:
            return
        bitmap = int.from_bytes(self.log.report(0, PAGES * PAGE, PAGE), "little")
        self.client.dirty.update(page for page in range(PAGES) if bitmap >> page & 1)

    def settle(self) -> None:
        """Let all be done that was begun."""
        self.drain()
        while self.client.waiting:
            self.client.answer()
            self.drain()

    def stop(self) -> None:
        """The switch-over."""
        self.client.refuses = False
        self.settle()
        assert self.controller.pause(0)
        self.report()
        self.ram.memory.mark_dirty()
        self.client.copy_all()


class Machine(RuleBasedStateMachine):
    """Two sides that do the same."""

    @initialize(alignment=st.sampled_from([1, 1, 512]), is_logged=st.booleans(), size=st.integers(3, 44))
    def start(self, alignment: int, is_logged: bool, size: int) -> None:
        engines = InlineEngine(), InlineRings()
        self.sides = [Side(engine, alignment, is_logged, size) for engine in engines]
        self.free = size - 1

    def both(self, name: str, *arguments: Any, **fields: Any) -> None:
        for side in self.sides:
            getattr(side, name)(*arguments, **fields)

    @rule(
        opcode=st.sampled_from([Nvm.READ, Nvm.READ, Nvm.READ, Nvm.WRITE, Nvm.FLUSH, 0x7F]),
        page=st.integers(0, 30),
        offset=st.sampled_from([0, 0, 512, 4092]),
        blocks=st.sampled_from([1, 8, 9, 16, 24, 64]),
        lba=st.integers(0, BLOCKS - 1),
    )
    def submit(self, opcode: int, page: int, offset: int, blocks: int, lba: int) -> None:
        if not self.free:
            return
        self.free -= 1
        blocks = min(blocks, BLOCKS - lba)
        pages = -(-(offset + 512 * blocks) // PAGE)
        prp2 = 0 if pages == 1 else DATA + PAGE * (page + 1) if pages == 2 else LIST
        # One at a time where they may meet in memory: there is no order among commands in flight.
        self.both("settle")
        prp1 = DATA + PAGE * page + offset
        self.both("submit", 1, opcode, nsid=1, prp1=prp1, prp2=prp2, cdw10=lba, cdw12=blocks - 1)

    @rule(count=st.integers(2, 40), lba=st.integers(0, BLOCKS - 40))
    def submit_many(self, count: int, lba: int) -> None:
        """Reads into pages of their own, at once."""
        self.both("settle")
        for number in range(min(count, self.free)):
            self.free -= 1
            self.both("submit", 1, Nvm.READ, nsid=1, prp1=DATA + PAGE * number, cdw10=lba + number)

    @rule()
    def run(self) -> None:
        self.both("drain")

    @rule(holds=st.booleans())
    def hold_marks(self, holds: bool) -> None:
        for side in self.sides:
            side.client.holds = holds

    @rule(refuses=st.booleans())
    def answer(self, refuses: bool) -> None:
        for side in self.sides:
            side.client.refuses = refuses
            side.client.answer()

    @rule(byte=st.integers(0, 255))
    def guest_stores(self, byte: int) -> None:
        """From now on just before each message arrives."""
        for side in self.sides:
            side.client.store(GUESTS, byte)
            side.client.guest_stores = {GUESTS: byte}

    @invariant()
    def the_guests_store_is_there(self) -> None:
        for side in getattr(self, "sides", []):
            assert side.client.ram[GUESTS] == side.client.guest_stores.get(GUESTS, 0)

    @rule()
    def use_shadow_doorbells(self) -> None:
        """EventIdx is written without a command's completion; the host goes on ringing by message."""
        self.both("settle")
        self.both("admin", Admin.DOORBELL_BUFFER_CONFIG, prp1=EVENTS, prp2=EVENTS + PAGE)

    @rule(pages=st.lists(st.integers(0, PAGES - 1), max_size=40))
    def copied(self, pages: list[int]) -> None:
        self.both("report")
        for side in self.sides:
            for page in [*pages, *range(DATA // PAGE, DATA // PAGE + 32)]:
                side.client.copy(page)

    @rule()
    def taken_back(self) -> None:
        self.both("settle")
        for side in self.sides:
            with side.controller.leases.suspended():
                pass

    @rule()
    def reap(self) -> None:
        self.both("settle")
        one, other = (side.reap(1) for side in self.sides)
        assert [(c.cid, c.status) for c in one] == [(c.cid, c.status) for c in other]
        self.free += len(one)

    @rule()
    def switched_over(self) -> None:
        self.both("stop")
        for side in self.sides:
            assert side.client.target == side.client.ram[:]
            side.controller.resume()
        plain, compiled = self.sides
        assert plain.client.ram[DATA:EVENTS] == compiled.client.ram[DATA:EVENTS]
        assert plain.disk.contents == compiled.disk.contents

    def teardown(self) -> None:
        if hasattr(self, "sides"):
            self.switched_over()
            for side in self.sides:
                side.controller.pause(0)


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDirtyRings = Machine.TestCase
