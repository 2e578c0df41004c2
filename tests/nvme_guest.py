"""A guest's view of a controller, in process: memory, a disk that obeys, and commands rung through real doorbells."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nvmove.block.backend import Operation, Request
from nvmove.engine.inline import InlineEngine
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.controller import Controller
from nvmove.nvme.seams import DmaError, Segment
from nvmove.nvme.spec import DOORBELLS, Admin, Nvm, Register, Status

MEMORY = 4 << 20
ENTRIES = 64
ADMIN_SQ, ADMIN_CQ, IO_SQ, IO_CQ, LIST, DATA = (n << 16 for n in range(1, 7))
"""Guest addresses of what `Guest` uses; data has the rest of the memory."""
NIL = uuid.UUID(int=0)


class Disk:
    """A disk in memory. `fail` maps operations to errnos; with `holding` requests wait for `release`."""

    def __init__(self, size: int = 1 << 20, *, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.read_only = read_only
        self.supports_discard = True
        self.request_alignment = 1
        self.fail: dict[Operation, int] = {}
        self.holding = False
        self.held: list[Request] = []
        self.requests: list[Request] = []
        self.actual_size = size

    @property
    def size(self) -> int:
        return len(self.data)

    def refresh_size(self) -> int:
        self.data = self.data[: self.actual_size].ljust(self.actual_size, b"\0")
        return self.size

    def recover(self) -> None:
        pass

    def close(self) -> None:
        pass

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        if self.holding:
            self.held.append(request)
        else:
            self._run(request)

    def release(self, count: int | None = None) -> None:
        for request in self.held[:count]:
            self.held.remove(request)
            self._run(request)

    def _run(self, request: Request) -> None:
        errno = self.fail.get(request.operation, 0)
        if not errno:
            self._do(request)
        request.done(errno)

    def _do(self, request: Request) -> None:
        position = request.offset
        for buffer in request.buffers:
            if request.operation is Operation.READ:
                buffer[:] = self.data[position : position + len(buffer)]
            else:
                self.data[position : position + len(buffer)] = buffer
            position += len(buffer)
        if request.operation in {Operation.WRITE_ZEROES, Operation.DISCARD}:
            self.data[request.offset : request.offset + request.length] = bytes(request.length)

    def operations(self) -> list[Operation]:
        return [request.operation for request in self.requests]


class Taken:
    def __init__(self, buffers: Sequence[memoryview], memory: Memory) -> None:
        self.buffers = buffers
        self._memory = memory

    def finish(self, commit: bool = True) -> None:
        self._memory.taken -= 1
        if commit and self._memory.fails_on_finish:
            raise DmaError("finish")


class Memory:
    def __init__(self) -> None:
        self.bytes = bytearray(MEMORY)
        self.taken = 0
        self.fails_on_finish = False

    def _check(self, address: int, length: int) -> None:
        if address + length > MEMORY:
            raise DmaError(f"{address:#x}")

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.bytes[address : address + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self._check(address, len(data))
        self.bytes[address : address + len(data)] = data

    def acquire(self, segments: Sequence[Segment], to_guest: bool) -> Taken:
        for segment in segments:
            self._check(*segment)
        self.taken += 1
        whole = memoryview(self.bytes)
        return Taken([whole[address : address + length] for address, length in segments], self)


class Interrupts:
    msix_enabled = True
    uses_pin = False

    def signal(self, vector: int) -> None:
        pass

    def set_level(self, asserted: bool) -> None:
        pass


class Answer(NamedTuple):
    """A completion: `status` without More and DNR, dword 0, and the `length` bytes of data that were asked for."""

    status: int
    result: int
    data: bytes
    dnr: bool
    more: bool


@dataclass(eq=False)
class Ring:
    sqid: int
    sq: int
    cq: int
    tail: int = 0
    head: int = 0
    phase: int = 1
    completions: dict[int, Answer] = field(default_factory=dict)


def namespace(drive: str = "d0", **properties: object) -> NamespaceConfig:
    return NamespaceConfig(**{"drive": drive, "uuid": NIL, **properties})  # type: ignore[arg-type]


class Guest:
    """A controller and its host. By default one namespace of 1 MiB, `disk`, and one I/O queue pair."""

    def __init__(
        self,
        *namespaces: NamespaceConfig,
        disks: Mapping[str, Disk] | None = None,
        io_queue: bool = True,
        **properties: object,
    ) -> None:
        self.disks = dict(disks) if disks is not None else {"d0": Disk()}
        self.memory = Memory()
        self.engine = InlineEngine()
        config = ControllerConfig(
            **{"serial": "S1", "namespaces": namespaces or (namespace(),), **properties}  # type: ignore[arg-type]
        )
        self.controller = Controller(config, self.disks, self.memory, Interrupts(), self.engine)
        self.cid = 0
        self.enable()
        if io_queue:
            self.create_queues()

    @property
    def disk(self) -> Disk:
        return self.disks["d0"]

    def enable(self) -> None:
        self.rings = [Ring(0, ADMIN_SQ, ADMIN_CQ)]
        for ring in (ADMIN_CQ, IO_CQ):
            self.memory.write(ring, bytes(16 * ENTRIES))
        for register, size, value in (
            (Register.AQA, 4, (ENTRIES - 1) * 0x1_0001),
            (Register.ASQ, 8, ADMIN_SQ),
            (Register.ACQ, 8, ADMIN_CQ),
            (Register.CC, 4, 0x460001),
        ):
            self.controller.write(register, size, value)

    def disable(self) -> None:
        self.controller.write(Register.CC, 4, 0)

    def create_queues(self) -> None:
        size = (ENTRIES - 1) << 16 | 1
        self.must(self.admin(Admin.CREATE_CQ, cdw10=size, cdw11=3, prp=IO_CQ))
        self.must(self.admin(Admin.CREATE_SQ, cdw10=size, cdw11=1 << 16 | 1, prp=IO_SQ))
        self.rings.append(Ring(1, IO_SQ, IO_CQ))

    @staticmethod
    def must(answer: Answer) -> Answer:
        assert answer.status == Status.SUCCESS, Status(answer.status)
        return answer

    def submit(self, ring: Ring, opcode: int, nsid: int = 0, *, flags: int = 0, prp: int = DATA, **dwords: int) -> int:
        """Ring the doorbell for one command; return its command id. Data lies at `prp`, up to 2 MiB by a list."""
        self.cid += 1
        prp2 = LIST
        self.memory.write(LIST, struct.pack("<511Q", *(prp + 4096 * (index + 1) for index in range(511))))
        if dwords.pop("one_page", 0):
            prp2 = prp + 4096
        cdws = [dwords.pop(f"cdw{number}", 0) for number in range(10, 16)]
        assert not dwords, dwords
        sqe = struct.pack("<BBHIQQQQ6I", opcode, flags, self.cid, nsid, 0, 0, prp, prp2, *cdws)
        self.memory.write(ring.sq + 64 * ring.tail, sqe)
        ring.tail = (ring.tail + 1) % ENTRIES
        self.controller.write(DOORBELLS + 8 * ring.sqid, 4, ring.tail)
        self.drain()
        return self.cid

    def drain(self) -> None:
        """Run the workers, and collect completions."""
        self.engine.drain()
        for ring in self.rings:
            self._collect(ring)

    def _collect(self, ring: Ring) -> None:
        while True:
            entry = self.memory.read(ring.cq + 16 * ring.head, 16)
            result, _, _, cid, status = struct.unpack("<QHHHH", entry)
            if status & 1 != ring.phase:
                return
            assert cid not in ring.completions, "completed twice"
            ring.completions[cid] = Answer(
                status >> 1 & 0x7FF, result & 0xFFFF_FFFF, b"", bool(status >> 15), bool(status >> 14 & 1)
            )
            ring.head += 1
            if ring.head == ENTRIES:
                ring.head, ring.phase = 0, ring.phase ^ 1
            self.controller.write(DOORBELLS + 8 * ring.sqid + 4, 4, ring.head)

    def _command(self, ring: Ring, opcode: int, nsid: int, data: bytes, length: int, dwords: dict[str, int]) -> Answer:
        self.memory.write(DATA, data or b"\xa5" * length)
        one_page = int(4096 < max(length, len(data)) <= 8192)
        answer = self.answer(self.submit(ring, opcode, nsid, one_page=one_page, **dwords))
        assert self.memory.taken == sum(bool(r.buffers) for d in self.disks.values() for r in d.held), (
            "memory was not given back"
        )
        return answer._replace(data=self.memory.read(DATA, length))

    def answer(self, cid: int) -> Answer:
        """Return (and forget) the completion of `cid`."""
        for ring in self.rings:
            if cid in ring.completions:
                return ring.completions.pop(cid)
        raise AssertionError(f"command {cid} has not completed")

    def has_completed(self, cid: int) -> bool:
        return any(cid in ring.completions for ring in self.rings)

    def admin(self, opcode: int, nsid: int = 0, *, data: bytes = b"", length: int = 0, **dwords: int) -> Answer:
        return self._command(self.rings[0], opcode, nsid, data, length, dwords)

    def io(self, opcode: int, nsid: int = 1, *, data: bytes = b"", length: int = 0, **dwords: int) -> Answer:
        return self._command(self.rings[1], opcode, nsid, data, length, dwords)

    # --- common commands ---------------------------------------------------------------------------------------------

    def identify(self, cns: int, nsid: int = 0, *, csi: int = 0, cntid: int = 0) -> Answer:
        return self.admin(Admin.IDENTIFY, nsid, length=4096, cdw10=cns | cntid << 16, cdw11=csi << 24)

    def get_log(
        self, lid: int, length: int, *, nsid: int = 0xFFFF_FFFF, offset: int = 0, rae: bool = False, cdw14: int = 0
    ) -> Answer:
        dwords = length // 4 - 1
        return self.admin(
            Admin.GET_LOG_PAGE,
            nsid,
            length=length,
            cdw10=lid | rae << 15 | (dwords & 0xFFFF) << 16,
            cdw11=dwords >> 16,
            cdw12=offset & 0xFFFF_FFFF,
            cdw13=offset >> 32,
            cdw14=cdw14,
        )

    def get_feature(self, feature: int, *, select: int = 0, cdw11: int = 0, nsid: int = 0, length: int = 0) -> Answer:
        return self.admin(Admin.GET_FEATURES, nsid, cdw10=feature | select << 8, cdw11=cdw11, length=length)

    def set_feature(self, feature: int, value: int = 0, *, nsid: int = 0, data: bytes = b"", save: int = 0) -> Answer:
        return self.admin(Admin.SET_FEATURES, nsid, cdw10=feature | save << 31, cdw11=value, data=data)

    def aer(self) -> int:
        """Give the controller an Asynchronous Event Request; return its command id."""
        return self.submit(self.rings[0], Admin.ASYNC_EVENT_REQUEST)

    def read(self, lba: int, blocks: int, nsid: int = 1, *, block: int = 512, cdw12: int = 0) -> Answer:
        return self.io(
            Nvm.READ, nsid, length=blocks * block, cdw10=lba & 0xFFFF_FFFF, cdw11=lba >> 32, cdw12=blocks - 1 | cdw12
        )

    def write(self, lba: int, data: bytes, nsid: int = 1, *, block: int = 512, cdw12: int = 0) -> Answer:
        return self.io(
            Nvm.WRITE,
            nsid,
            data=data,
            cdw10=lba & 0xFFFF_FFFF,
            cdw11=lba >> 32,
            cdw12=len(data) // block - 1 | cdw12,
        )
