"""Whatever is written, refused, reset and copied in whatever order: the destination's memory is the source's."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nvmove.nvme.seams import Segment
from nvmove.vfio.borrowed import MemoryTransfer
from nvmove.vfio.dirty import PAGE
from nvmove.vfio.memory import GuestMemory
from tests.precopy import PreCopy

PAGES = 12
ADDRESS = st.integers(0, PAGES * PAGE - 1)
LENGTH = st.one_of(st.integers(1, 64), st.integers(1, 3 * PAGE))
BYTE = st.integers(0, 255)


class Migration(RuleBasedStateMachine):
    """A device at work while QEMU copies its guest's memory."""

    @initialize()
    def begin(self) -> None:
        self.qemu = PreCopy(PAGES)
        self.memory = GuestMemory()
        self.memory.client = self.qemu
        self.memory.map(0, PAGES * PAGE, self.qemu.fd, 0, True, True)
        self.under_way: list[tuple[MemoryTransfer, range]] = []
        self.guests: dict[int, int] = {}
        """What the guest has stored where it may: nobody else may have changed it since."""
        self.memory.dirty.start_marking()

    def owned(self, at: int) -> bool:
        return any(at in taken for _, taken in self.under_way)

    @rule(address=ADDRESS, length=LENGTH)
    def command(self, address: int, length: int) -> None:
        taken = range(address, min(address + length, PAGES * PAGE))
        if not any(self.owned(at) for at in (taken[0], taken[-1])) and not any(
            other[0] in taken for _, other in self.under_way
        ):
            segments = [Segment(taken.start, len(taken))]
            self.under_way.append((self.memory.acquire(segments, to_guest=True), taken))
            self.guests = {at: byte for at, byte in self.guests.items() if at not in taken}

    @rule(byte=BYTE, commit=st.booleans(), data=st.data())
    def completes(self, byte: int, commit: bool, data: st.DataObject) -> None:
        if self.under_way:
            index = data.draw(st.integers(0, len(self.under_way) - 1))
            transfer, taken = self.under_way[index]
            for buffer in transfer.buffers:
                buffer[:] = bytes([byte]) * len(buffer)
            # The guest stores beside the command's data at the worst moment.
            beside = [at for at in (taken.start - 1, taken.stop) if 0 <= at < PAGES * PAGE and not self.owned(at)]
            self.qemu.guest_stores = dict.fromkeys(beside, byte ^ 0xFF)
            transfer.finish(commit)
            self.guests.update({at: self.qemu.ram[at] for at in beside})
            self.qemu.guest_stores = {}
            del self.under_way[index]

    @rule(address=ADDRESS, content=st.binary(min_size=1, max_size=40))
    def completion(self, address: int, content: bytes) -> None:
        content = content[: PAGES * PAGE - address]
        self.memory.write(address, content)
        self.guests = {at: b for at, b in self.guests.items() if not address <= at < address + len(content)}

    @rule(at=ADDRESS, byte=BYTE)
    def guest(self, at: int, byte: int) -> None:
        if not self.owned(at):
            self.qemu.store(at, byte)
            self.guests[at] = byte

    @rule(page=st.integers(0, PAGES - 1))
    def copied(self, page: int) -> None:
        self.qemu.copy(page)

    @rule(refuses=st.booleans())
    def client_refuses(self, refuses: bool) -> None:
        self.qemu.refuses = refuses

    @rule()
    def unmapped_and_back(self) -> None:
        if not self.under_way:
            done: list[int] = []
            self.memory.unmap(4 * PAGE, 4 * PAGE, done.append)
            assert done == [0]
            self.memory.map(4 * PAGE, 4 * PAGE, os.dup(self.qemu.fd_kept), 4 * PAGE, True, True)

    @invariant()
    def the_guests_stores_are_there(self) -> None:
        for at, byte in getattr(self, "guests", {}).items():
            assert self.qemu.ram[at] == byte, f"the guest's store at {at:#x} is lost"

    def teardown(self) -> None:
        if not hasattr(self, "qemu"):
            return
        while self.under_way:
            transfer, _ = self.under_way.pop()
            transfer.finish(commit=False)
        if self.qemu.refuses:
            self.qemu.refuses = False
        self.memory.mark_dirty()
        self.the_guests_stores_are_there()
        for page in range(PAGES):
            self.qemu.copy(page)
        assert self.qemu.target == self.qemu.ram[:]
        self.memory.unmap_all(lambda _errno: None)


Migration.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDirtyPages = Migration.TestCase
