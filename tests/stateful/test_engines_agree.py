"""The same steps on the plain engine and on the compiled one: the same completions, memory, disk and saved state.

Steps are what a host may do, and what it should not: right and wrong commands on rings of all sizes, with and without
shadow doorbells, aborts, queues that share a completion queue, unmapped memory, resets, save → new controller → load;
and disks that fail for a while: files, and exports.

The compiled engine gives what a disk takes its time for (durable writes, zeroes, deallocations) to the disk and goes
on. NVMe knows no order among commands under way, so each of those gets blocks and memory of its own here.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.block.backend import Operation, Request
from nvmove.block.lend import ASK, NOTHING, LentSpace
from nvmove.engine.inline import InlineEngine
from nvmove.nvme.spec import DEAC, DOORBELLS, DSM_DEALLOCATE, DSM_RANGE, FUA, SGL_DESCRIPTOR, Admin, Nvm
from tests.nvme_host import Completion, Host
from tests.rings import PUNCH, ExportedDisk, InlineRings, LentDisk, LentLines, LentRam

DBS, EIS = 0x29_0000, 0x29_1000
SHARED = 64
"""Blocks that reads and plain writes share."""
ALONE, PLACES = 16, 9
"""Blocks that a command has to itself, and how many such places a queue has: more than commands."""
BLOCKS = SHARED + ALONE * PLACES * 3
SPACES = [
    LentSpace(PUNCH, PUNCH, PUNCH),
    LentSpace(ASK, PUNCH, PUNCH),
    LentSpace(PUNCH, PUNCH, NOTHING),
    LentSpace(ASK, ASK, ASK),
]
Told = tuple[int, int, int, int, bool]
SOURCE, SOURCES, RANGES = 0x30_0000, 0x38_0000, 0x40_0000
"""Where the data of durable writes is, which nothing changes, its PRP list, and lists of ranges, a page for a place."""
LIST, SGL, PAGES, LAST_PAGE = 0x10_0000, 0x10_0400, 0x11_0000, 0x28_0000
QUEUES = st.integers(1, 3)
HOLES = [range(0x18_0000, 0x18_2000), range(0x20_0000, 0x20_1000), range(0x10_0000, 0x10_1000)]


def told(completion: Completion) -> Told:
    """All of a completion but the head: how far the queue was fetched at that moment is each engine's own."""
    return completion.result, completion.sqid, completion.cid, completion.status, completion.dnr


class BreakingDisk(LentDisk):
    """While it is broken its file answers EBADF to all, its back end to all but reads."""

    code = errno.EBADF

    @property
    def is_broken(self) -> bool:
        return self.lent_fd >= 0

    def break_down(self) -> None:
        self.lent_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_PATH)

    def mend(self) -> None:
        os.close(self.lent_fd)
        self.lent_fd = -1

    def error_of(self, request: Request) -> int:
        works = request.operation is Operation.READ or (
            not self.syncs
            if request.operation is Operation.FLUSH
            else request.operation is Operation.DISCARD and self.space.discard == NOTHING
        )
        return self.code if self.is_broken and not works else 0


class BreakingExport(ExportedDisk, BreakingDisk):
    """The same behind a server, which answers EIO to all but reads while it is broken."""

    code = errno.EIO

    @property
    def is_broken(self) -> bool:
        return bool(self.server.errors)

    def break_down(self) -> None:
        self.server.errors = dict.fromkeys(["write", "flush", "zero", "trim"], self.code)

    def mend(self) -> None:
        self.server.errors = {}


class Both(Host):
    """One of the two hosts; shadow doorbells are used as Linux does."""

    ram: LentRam
    lines: LentLines
    disk: BreakingDisk

    def __init__(self, engine: InlineEngine, kind: str) -> None:
        size = BLOCKS * 512
        disk = BreakingExport(size) if kind == "export" else BreakingDisk(size, 512 if kind == "direct" else 1)
        os.pwrite(disk.fd, b"".join(bytes([1 + number % 255]) * 512 for number in range(BLOCKS)), 0)
        super().__init__(ram=LentRam(), lines=LentLines(), disk=disk, engine=engine)
        self.shadows = False

    def cell(self, index: int, buffer: int = DBS) -> int:
        value: int = struct.unpack_from("<I", self.ram.data, buffer + 4 * index)[0]
        return value

    def bell(self, index: int, value: int) -> None:
        if self.shadows and index > 1:
            old, event = self.cell(index), self.cell(index, EIS)
            struct.pack_into("<I", self.ram.data, DBS + 4 * index, value)
            if (value - event - 1) & 0xFFFF >= (value - old) & 0xFFFF:
                return
        self.set(DOORBELLS + 4 * index, value)

    def ring_sq(self, qid: int) -> None:
        self.bell(2 * qid, self.rings[qid].tail)

    def ring_cq(self, cqid: int) -> None:
        self.bell(2 * cqid + 1, self.cqs[cqid].head)

    def data(self) -> bytes:
        """Guest memory where commands put data."""
        return bytes(self.ram.data[LIST:DBS])


def sgls(address: int, blocks: int) -> list[dict[str, int]]:
    """The data pointers of SGLs for `blocks`: one run of memory, runs of a block each, and some with a mistake."""

    def pointer(address: int, length: int, identifier: int, psdt: int = 1) -> dict[str, int]:
        return {"flags": psdt << 6, "prp1": address, "prp2": length | identifier << 56}

    length = 512 * blocks
    right = [pointer(address, length, 0), pointer(address, length, 0, 2), pointer(SGL, 16 * blocks, 0x30)]
    return right * 4 + [
        pointer(address, length - 1, 0),
        pointer(address, length + 512, 0),
        pointer(address, length, 1),
        pointer(address, length, 0x10),
        pointer(address, length, 0, 3),
        pointer(1 << 40, length, 0),
        pointer(SGL, 16 * blocks + 16, 0x30),
        pointer(SGL, 16 * blocks - 1, 0x30),
        pointer(SGL, 16 * blocks, 0x20),
        pointer(1 << 40, 16 * blocks, 0x30),
    ]


@st.composite
def commands(draw: st.DrawFn) -> tuple[int, dict[str, int]]:
    """A command: mostly a read or a write that is right, sometimes one with a mistake or two."""
    opcode: int = draw(st.sampled_from([Nvm.READ, Nvm.WRITE]))
    blocks = draw(st.sampled_from([1, 1, 2, 8, 9, 16, 17, 24, 40, 64]))
    lba = draw(st.integers(0, SHARED - blocks))
    page = PAGES + 4096 * draw(st.integers(0, 255))
    offset = draw(st.sampled_from([0, 0, 4, 512, 4092]))
    pages = -(-(offset + 512 * blocks) // 4096)
    fields = {
        "nsid": 1,
        "prp1": page + offset,
        "prp2": 0 if pages == 1 else page + 8192 if pages == 2 else draw(st.sampled_from([LIST, LIST + 0xFF0])),
        "cdw10": lba,
        "cdw12": blocks - 1,
    }
    mistakes: dict[str, list[int]] = {
        "nsid": [0, 2, 0xFFFF_FFFF],
        "prp1": [page + 1, 1 << 40],
        "prp2": [LIST + 4, page + 512, 1 << 41],
        "cdw10": [BLOCKS - blocks + 1, 0xFFFF_FFFF],
        "cdw11": [1, 0xFFFF_FFFF],
        "cdw12": [blocks - 1 | 1 << 31, blocks - 1 | 1 << 26, 0xFFFF],
        "flags": [1, 0x40],
    }
    if not draw(st.integers(0, 3)):
        fields |= draw(st.sampled_from(sgls(page + offset, blocks)))
    if not draw(st.integers(0, 4)):
        opcode = draw(st.sampled_from([opcode, Nvm.FLUSH, Nvm.COMPARE, 0x7F]))
        for name in draw(st.lists(st.sampled_from(sorted(mistakes)), max_size=2)):
            fields[name] = draw(st.sampled_from(mistakes[name]))
    return opcode, fields


@st.composite
def slow_commands(draw: st.DrawFn) -> tuple[int, dict[str, int], list[tuple[int, int]]]:
    """A command that changes the disk, and that it takes its time for: on blocks of its place, whose first is 0 here.

    What a Deallocate has ranges for comes last. Some have a mistake.
    """
    opcode: int = draw(st.sampled_from([Nvm.WRITE, Nvm.WRITE_ZEROES, Nvm.DATASET_MANAGEMENT]))
    lba = draw(st.integers(0, ALONE - 1))
    blocks = draw(st.integers(1, ALONE - lba))
    offset = draw(st.sampled_from([0, 4, 512]))
    flags = {
        Nvm.WRITE: [FUA, FUA | 1 << 31],
        Nvm.WRITE_ZEROES: [0, FUA, DEAC, DEAC | FUA, 1 << 31],
    }
    fields = {"nsid": 1, "prp1": SOURCE + offset, "cdw10": lba, "cdw12": blocks - 1}
    fields["prp2"] = SOURCE + 4096 if offset + 512 * blocks <= 8192 else SOURCES
    ranges: list[tuple[int, int]] = []
    if opcode == Nvm.DATASET_MANAGEMENT:
        half = st.integers(0, ALONE // 2)
        ranges = draw(st.lists(st.tuples(half, half), min_size=1, max_size=9))
        if not draw(st.integers(0, 9)):
            ranges[-1] = BLOCKS, 1
        fields |= {"cdw10": len(ranges) - 1, "cdw11": draw(st.sampled_from([DSM_DEALLOCATE, DSM_DEALLOCATE, 7, 3]))}
    else:
        fields["cdw12"] |= draw(st.sampled_from(flags[Nvm(opcode)]))
    if not draw(st.integers(0, 4)):
        wrong = {"nsid": 2, "flags": 1, "prp1": 1 << 40, "cdw10": BLOCKS, "cdw12": fields["cdw12"] | 1 << 26}
        name = draw(st.sampled_from(sorted(wrong)))
        fields[name] = wrong[name]
    return opcode, fields, ranges


class Machine(RuleBasedStateMachine):
    """Two hosts that do the same."""

    @initialize(
        sizes=st.lists(st.integers(2, 9), min_size=6, max_size=6),
        shared=st.booleans(),
        kind=st.sampled_from(["file", "file", "direct", "export"]),
        space=st.sampled_from(SPACES),
        syncs=st.sampled_from([True, True, False]),
    )
    def start(self, sizes: list[int], shared: bool, kind: str, space: LentSpace, syncs: bool) -> None:
        self.hosts = [Both(InlineEngine(), kind), Both(InlineRings(), kind)]
        for host in self.hosts:
            host.disk.space, host.disk.syncs = space, syncs
        self.sizes, self.shared, self.kind = sizes, shared, kind
        self.free: dict[int, int] = {}
        self.told: dict[int, list[list[Told]]] = {}
        self.places = dict.fromkeys((1, 2, 3), 0)
        self.is_cached = True
        self.set_up()

    def set_up(self) -> None:
        for host in self.hosts:
            host.shadows = False
            host.enable()
            for qid in (1, 2, 3):
                host.create(qid, 2 if self.shared and qid == 3 else None, self.sizes[qid - 1], self.sizes[qid + 2], qid)
            entries = [page for n in range(32) if (page := PAGES + 8192 * (n % 7) + 4096 * n)]
            host.ram.data[LIST : LIST + 8 * 32] = struct.pack("<32Q", *entries)
            scattered = (PAGES + 4096 * (number * 37 % 256) + 512 * (number % 8) for number in range(64))
            host.ram.data[SGL : SGL + 16 * 64] = b"".join(SGL_DESCRIPTOR.pack(at, 512, 0) for at in scattered)
            host.ram.data[LIST + 0xFF0 : LIST + 0x1000] = struct.pack("<2Q", PAGES + 4096 * 99, LAST_PAGE)
            host.ram.data[LAST_PAGE : LAST_PAGE + 8 * 32] = struct.pack("<32Q", *reversed(entries))
            host.ram.data[SOURCE : SOURCE + 3 * 4096] = b"".join(bytes([0xE0 + n]) * 512 for n in range(24))
            host.ram.data[SOURCES : SOURCES + 16] = struct.pack("<2Q", SOURCE + 4096, SOURCE + 8192)
        self.told = {cqid: [[], []] for cqid in (1, 2, 3)}
        self.is_cached = True
        self.free = {qid: self.sizes[qid - 1] - 1 for qid in (1, 2, 3)}

    def both(self, name: str, *arguments: Any, **fields: Any) -> Any:
        one, other = (getattr(host, name)(*arguments, **fields) for host in self.hosts)
        return one, other

    # Steps.

    @rule(qid=QUEUES, batch=st.lists(commands(), min_size=1, max_size=8), filling=st.integers(0, 255))
    def submit(self, qid: int, batch: list[tuple[int, dict[str, int]]], filling: int) -> None:
        """To one queue, with nothing left to run: there is no order among the commands of several queues.

        Nor is there one in a queue, where a disk takes its time: what a write takes is not what a read under way fills.
        """
        self.both("drain")
        for host in self.hosts:  # what a write takes from there
            host.ram.data[PAGES + 4096 * filling : PAGES + 4096 * filling + 4096] = bytes([filling]) * 4096
        for opcode, fields in batch:
            if opcode == Nvm.WRITE and not self.is_cached:  # it would be a slow one
                continue
            if opcode != Nvm.READ and self.kind != "file":
                self.finish()
            self.put(qid, opcode, fields)
            if opcode != Nvm.READ and self.kind != "file":
                self.finish()

    @rule(qid=QUEUES, batch=st.lists(slow_commands(), min_size=1, max_size=8), flush=st.booleans())
    def change(self, qid: int, batch: list[tuple[int, dict[str, int], list[tuple[int, int]]]], flush: bool) -> None:
        """Submit commands that the disk takes its time for."""
        self.both("drain")
        for opcode, fields, ranges in batch:
            place = (qid - 1) * PLACES + self.places[qid]
            self.places[qid] = (self.places[qid] + 1) % PLACES
            first, page = SHARED + ALONE * place, RANGES + 4096 * place
            mine = dict(fields)
            if opcode == Nvm.DATASET_MANAGEMENT:
                mine["prp1"] = page if fields["prp1"] < 1 << 40 else fields["prp1"]
                for host in self.hosts:
                    data = b"".join(DSM_RANGE.pack(0, blocks, first + lba) for lba, blocks in ranges)
                    host.ram.data[page : page + len(data)] = data
            else:
                mine["cdw10"] += first
            self.put(qid, opcode, mine)
        if flush:
            self.put(qid, Nvm.FLUSH, {"nsid": 1})

    def put(self, qid: int, opcode: int, fields: dict[str, int]) -> None:
        """Submit a command if there is room; one at a time while errors come: the order of the log is each engine's."""
        if self.free[qid]:
            self.free[qid] -= 1
            self.both("submit", qid, opcode, **fields)
            if self.hosts[0].disk.is_broken:
                self.finish()

    def finish(self) -> None:
        """Have all that was submitted completed."""
        while any(self.free[qid] < self.sizes[qid - 1] - 1 for qid in self.free):
            for cqid in list(self.hosts[0].cqs):
                if cqid:
                    self.reap(cqid, 1 << 30)

    @rule()
    def drain(self) -> None:
        self.both("drain")
        self.agree()

    @rule(cqid=QUEUES, limit=st.integers(1, 9))
    def reap(self, cqid: int, limit: int) -> None:
        self.both("drain")
        if cqid not in self.hosts[0].cqs:
            return
        found = [[told(completion) for completion in host.reap(cqid, limit)] for host in self.hosts]
        assert len(found[0]) == len(found[1])
        for _, sqid, _, _, _ in found[0]:
            self.free[sqid] += 1
        for before, some in zip(self.told[cqid], found, strict=True):
            before.extend(some)
        if all(host.peek(cqid) is None for host in self.hosts):
            one, other = self.told[cqid]
            assert Counter(one) == Counter(other)
            self.told[cqid] = [[], []]

    @rule(offset=st.integers(2, 8), value=st.integers(0, 20))
    def doorbell_that_is_wrong(self, offset: int, value: int) -> None:
        """A head or a tail that cannot be; those that can be are left out, as they would be taken."""
        if not self.hosts[0].shadows:
            self.both("set", DOORBELLS + 4 * offset, 100 + value)

    @rule(qid=QUEUES, back=st.integers(0, 5))
    def abort(self, qid: int, back: int) -> None:
        self.both("drain")  # but for a full completion queue, what can be aborted is a matter of time
        host = self.hosts[0]
        fields = {"cdw10": max(host.cid - back, 0) << 16 | qid}
        one, other = self.both("admin", Admin.ABORT, **fields)
        assert one.status == other.status
        self.drain()

    @precondition(lambda self: not self.hosts[0].shadows)
    @rule()
    def use_shadow_doorbells(self) -> None:
        self.both("drain")
        one, other = self.both("admin", Admin.DOORBELL_BUFFER_CONFIG, prp1=DBS, prp2=EIS)
        assert one.status == other.status == 0
        for host in self.hosts:
            host.shadows = True

    @rule(hole=st.sampled_from(HOLES), is_mapped=st.booleans())
    def change_memory(self, hole: range, is_mapped: bool) -> None:
        self.both("drain")
        for host in self.hosts:
            if is_mapped and hole in host.ram.holes:
                host.ram.holes.remove(hole)
            elif not is_mapped and hole not in host.ram.holes:
                host.ram.punch(hole)

    @rule(is_on=st.sampled_from([1, 1, 1, 0]))
    def write_cache(self, is_on: int) -> None:
        self.finish()  # without it all writes take their time
        one, other = self.both("admin", Admin.SET_FEATURES, cdw10=6, cdw11=is_on)
        assert one.status == other.status
        if one.status == 0:
            self.is_cached = bool(is_on)

    @rule()
    def break_or_mend_the_disk(self) -> None:
        self.finish()
        for host in self.hosts:
            host.controller.leases.bar()
            if host.disk.is_broken:
                host.disk.mend()
            else:
                host.disk.break_down()
            host.controller.leases.unbar()

    @rule()
    def reset(self) -> None:
        self.both("drain")
        self.both("disable")
        for host in self.hosts:
            host.ram.holes.clear()
        self.set_up()

    @rule()
    def move(self) -> None:
        self.both("drain")
        self.both("move")
        self.both("drain")
        self.agree()

    # What must be the same.

    def agree(self) -> None:
        """With nothing left to run."""
        plain, compiled = self.hosts
        if not self.shared:  # a head that moves lets two queues go on at once, in any order
            assert plain.data() == compiled.data()
            assert plain.disk.contents == compiled.disk.contents
        signals = [set(host.lines.look()) for host in self.hosts]
        # The loop looks at heads in memory more often: the plain engine takes some completions for unread, and may say
        # of them once more after a move that they are there.
        assert signals[0] == signals[1] or (plain.shadows and signals[0] > signals[1])
        states = [host.controller.inspect() for host in self.hosts]
        for state in states:
            del state["live"]["doorbell_writes"], state["live"]["lent"], state["doorbells"]["late"]
            if plain.shadows:
                del state["irq_status"]
                for cq in state["cqs"]:
                    del cq["head"]
        if self.shared:
            assert states[0]["smart"] == states[1]["smart"]
        else:
            assert states[0] == states[1]

    def teardown(self) -> None:
        if not hasattr(self, "hosts"):
            return
        for host in self.hosts:
            assert host.controller.pause(0)
            assert host.disk.loans == len(host.lines.lent) == 0
            if host.disk.is_broken:
                host.disk.mend()
            if isinstance(host.disk, BreakingExport):
                host.disk.hang_up()


Machine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEnginesAgree = Machine.TestCase
