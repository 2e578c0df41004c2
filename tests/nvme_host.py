"""A host driver for the controller, in process: registers, rings, commands. Nothing here sleeps."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from nvmove.block.backend import Backend
from nvmove.block.policy import DriveErrors, ErrorReport
from nvmove.engine.inline import InlineEngine
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.controller import Controller
from nvmove.nvme.seams import Engine
from nvmove.nvme.spec import CQE, CQE_SIZE, DOORBELLS, SQE_SIZE, Admin, Register
from nvmove.nvme.state.saved import ControllerState
from tests.disk import Disk
from tests.lines import Lines
from tests.ram import Ram

CC = 6 << 16 | 4 << 20 | 6 << 4
"""I/O queue entry sizes, all command sets; CC.EN is not set."""
DATA = 0x10_0000
"""Where commands' data is, unless they say otherwise."""


class Completion(NamedTuple):
    result: int
    sq_head: int
    sqid: int
    cid: int
    status: int
    """Without More and DNR."""
    dnr: bool
    more: bool
    data: bytes = b""
    """What the command left in memory, if it was asked for."""


class Entries:
    """The host's side of a completion queue."""

    def __init__(self, cqid: int, address: int, size: int) -> None:
        self.cqid, self.address, self.size = cqid, address, size
        self.head, self.phase = 0, 1


class Ring:
    """The host's side of a submission queue; several may have the same `cq`."""

    def __init__(self, address: int, size: int, cq: Entries) -> None:
        self.address, self.size, self.cq = address, size, cq
        self.tail = 0


CONFIG = ControllerConfig(
    serial="S1",
    namespaces=(NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1)),),
)


def sqe(
    opcode: int, cid: int = 0, nsid: int = 0, prp1: int = DATA, prp2: int = 0, flags: int = 0, **dwords: int
) -> bytes:
    """Pack an SQE; `dwords` are cdw10…cdw15."""
    values = [dwords.pop(f"cdw{number}", 0) for number in range(10, 16)]
    assert not dwords
    return struct.pack("<BBHIQQQQ6I", opcode, flags, cid, nsid, 0, 0, prp1, prp2, *values)


class Host:
    """A controller and the driver of it. Its drives are `disks`, by their names, or `disk` alone, as `d0`."""

    def __init__(
        self,
        *,
        ram: Ram | None = None,
        lines: Lines | None = None,
        disk: Disk | None = None,
        disks: Mapping[str, Disk] | None = None,
        engine: Engine | None = None,
        config: ControllerConfig = CONFIG,
        errors: DriveErrors | None = None,
    ) -> None:
        self.ram = ram or Ram()
        self.lines = lines or Lines()
        self.disks = disks or {"d0": disk or Disk()}
        self.disk = next(iter(self.disks.values()))
        self.config = config
        self.engine = engine or InlineEngine()
        self.errors = errors
        """The policies of `d0`."""
        self.reports: list[ErrorReport] = []
        """What was reported to the VM."""
        self.now = 0.0
        self.controller = self._new()
        self.rings: dict[int, Ring] = {}
        self.cqs: dict[int, Entries] = {}
        self.cid = 0

    def _new(self) -> Controller:
        return Controller(
            self.config,
            self._backends(),
            self.ram,
            self.lines,
            self.engine,
            lambda: self.now,
            errors={"d0": self.errors} if self.errors else None,
            on_error=self.reports.append,
        )

    def _backends(self) -> Mapping[str, Backend]:
        return self.disks

    # Registers.

    def get(self, register: int, size: int = 4) -> int:
        return self.controller.read(register, size)

    def set(self, register: int, value: int, size: int = 4) -> None:
        self.controller.write(register, size, value)

    @property
    def csts(self) -> int:
        return self.get(Register.CSTS)

    def enable(self, entries: int = 32, cc: int = CC) -> None:
        self.cqs = {0: Entries(0, 0x2000, entries)}
        self.rings = {0: Ring(0x1000, entries, self.cqs[0])}
        self.ram.data[0x1000:0x3000] = bytes(0x2000)
        self.set(Register.AQA, entries - 1 << 16 | entries - 1)
        self.set(Register.ASQ, 0x1000, 8)
        self.set(Register.ACQ, 0x2000, 8)
        self.set(Register.CC, cc | 1)

    def disable(self) -> None:
        self.set(Register.CC, CC)

    # Queues.

    def drain(self) -> None:
        assert isinstance(self.engine, InlineEngine)
        self.engine.drain()

    def put(self, qid: int, entry: bytes) -> None:
        """Put an SQE into the ring; `ring_sq` tells the controller."""
        ring = self.rings[qid]
        at = ring.address + ring.tail * SQE_SIZE
        self.ram.data[at : at + SQE_SIZE] = entry
        ring.tail = (ring.tail + 1) % ring.size

    def ring_sq(self, qid: int) -> None:
        self.set(DOORBELLS + 8 * qid, self.rings[qid].tail)

    def ring_cq(self, cqid: int) -> None:
        self.set(DOORBELLS + 8 * cqid + 4, self.cqs[cqid].head)

    def submit(self, qid: int, opcode: int, **fields: int) -> int:
        """Submit a command without running it; return its command id."""
        self.cid = (self.cid + 1) % 0xFFFF
        self.put(qid, sqe(opcode, self.cid, **fields))
        self.ring_sq(qid)
        return self.cid

    def peek(self, cqid: int) -> Completion | None:
        """The next completion of completion queue `cqid`, not consumed."""
        cq = self.cqs[cqid]
        at = cq.address + cq.head * CQE_SIZE
        result, sq_head, sqid, cid, status = CQE.unpack(self.ram.data[at : at + CQE_SIZE])
        if status & 1 != cq.phase:
            return None
        return Completion(result, sq_head, sqid, cid, status >> 1 & 0x7FF, bool(status >> 15), bool(status >> 14 & 1))

    def reap(self, cqid: int, limit: int = 1 << 30, doorbell: bool = True) -> list[Completion]:
        """Consume the completions of completion queue `cqid`."""
        cq, found = self.cqs[cqid], list[Completion]()
        while len(found) < limit and (completion := self.peek(cqid)) is not None:
            found.append(completion)
            cq.head += 1
            if cq.head == cq.size:
                cq.head, cq.phase = 0, cq.phase ^ 1
        if found and doorbell:
            self.ring_cq(cqid)
        return found

    def command(self, qid: int, opcode: int, **fields: int) -> Completion:
        """Run one command to its end."""
        cid = self.submit(qid, opcode, **fields)
        self.drain()
        return self.take(qid, cid)

    def take(self, qid: int, cid: int) -> Completion:
        """Consume the completion of a command; it is the only one there."""
        (completion,) = self.reap(self.rings[qid].cq.cqid)
        assert completion.cid == cid
        return completion

    def admin(self, opcode: int, **fields: int) -> Completion:
        return self.command(0, opcode, **fields)

    def create_cq(self, cqid: int, size: int = 16, vector: int = 0, flags: int = 3, **fields: int) -> Completion:
        fields.setdefault("prp1", 0x2_0000 + 0x1_0000 * cqid)
        return self.admin(Admin.CREATE_CQ, cdw10=size - 1 << 16 | cqid, cdw11=vector << 16 | flags, **fields)

    def create_sq(self, sqid: int, cqid: int, size: int = 16, flags: int = 1, **fields: int) -> Completion:
        fields.setdefault("prp1", 0x8_0000 + 0x1_0000 * sqid)
        return self.admin(Admin.CREATE_SQ, cdw10=size - 1 << 16 | sqid, cdw11=cqid << 16 | flags, **fields)

    def create(
        self, qid: int = 1, cqid: int | None = None, sq_size: int = 16, cq_size: int = 16, vector: int = 0
    ) -> None:
        """Create submission queue `qid`, with completion queue `cqid` unless that is there."""
        cqid = qid if cqid is None else cqid
        if cqid not in self.cqs:
            assert self.create_cq(cqid, cq_size, vector).status == 0
            address = 0x2_0000 + 0x1_0000 * cqid
            self.ram.data[address : address + 0x1_0000] = bytes(0x1_0000)
            self.cqs[cqid] = Entries(cqid, address, cq_size)
        assert self.create_sq(qid, cqid, sq_size).status == 0
        self.rings[qid] = Ring(0x8_0000 + 0x1_0000 * qid, sq_size, self.cqs[cqid])

    def new_cq(self, cqid: int, address: int, size: int) -> None:
        """A completion queue was created by other means."""
        self.cqs[cqid] = Entries(cqid, address, size)

    def new_sq(self, sqid: int, address: int, size: int, cqid: int) -> None:
        """A submission queue was created by other means."""
        self.rings[sqid] = Ring(address, size, self.cqs[cqid])

    def delete_sq(self, sqid: int) -> Completion:
        completion = self.admin(Admin.DELETE_SQ, cdw10=sqid)
        if completion.status == 0:
            del self.rings[sqid]
        return completion

    def delete_cq(self, cqid: int) -> Completion:
        completion = self.admin(Admin.DELETE_CQ, cdw10=cqid)
        if completion.status == 0:
            del self.cqs[cqid]
        return completion

    # Saving.

    def move(self) -> ControllerState:
        """Save, and go on with a new controller that has loaded the state; memory, lines and disk stay."""
        state = self.save()
        self.replace()
        self.controller.load(state)
        assert self.controller.save() == state
        self.controller.resume()
        return state

    def save(self) -> ControllerState:
        assert self.controller.pause(0)
        return self.controller.save()

    def replace(self) -> None:
        """A new controller, paused, as in a new process."""
        self.engine.close()
        self.engine = InlineEngine()
        self.lines.signals.clear()
        self.lines.level = False
        self.controller = self._new()
        self.controller.pause(0)
