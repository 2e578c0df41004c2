"""A host driver that uses shadow doorbells, as Linux does."""

from __future__ import annotations

import struct
from collections.abc import Callable

from nvmove.nvme.spec import DOORBELLS, Admin, Status
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CC, Host
from tests.ram import Ram

DBS, EIS = 0x30_0000, 0x30_1000


def needs_event(event_index: int, new: int, old: int) -> bool:
    """What Linux does, and the specification's example (Base B.5): did the step from `old` to `new` pass the index?"""
    return (new - event_index - 1) & 0xFFFF < (new - old) & 0xFFFF


class ShadowRam(Ram):
    """Runs `before_read` when a shadow doorbell is about to be read, as a guest that runs meanwhile would."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: list[Callable[[], None]] = []

    def read(self, address: int, length: int) -> bytes:
        if DBS <= address < DBS + 4096 and self.meanwhile:
            self.meanwhile.pop(0)()
        return super().read(address, length)


class ShadowHost(Host):
    """A driver that uses shadow doorbells for its I/O queues, as Linux does. `rung` counts its register writes."""

    shadows = False
    buffers = DBS, EIS
    rung = 0

    def enable(self, entries: int = 32, cc: int = CC) -> None:
        self.shadows = False
        super().enable(entries, cc)

    def configure(self, dbs: int = DBS, eis: int = EIS) -> int:
        status = self.admin(Admin.DOORBELL_BUFFER_CONFIG, prp1=dbs, prp2=eis).status
        if status == 0:
            self.use(dbs, eis)
        return status

    def use(self, dbs: int, eis: int) -> None:
        """The command has succeeded."""
        self.shadows, self.buffers = True, (dbs, eis)

    def _load(self, address: int) -> int:
        value: int = struct.unpack_from("<I", self.ram.data, address)[0]
        return value

    def cell(self, index: int) -> int:
        return self._load(self.buffers[0] + 4 * index)

    def event(self, index: int) -> int:
        return self._load(self.buffers[1] + 4 * index)

    def store(self, index: int, value: int) -> None:
        struct.pack_into("<I", self.ram.data, self.buffers[0] + 4 * index, value)

    def _ring(self, index: int, value: int) -> None:
        old = self.cell(index)
        self.store(index, value)
        if needs_event(self.event(index), value, old):
            self.rung += 1
            self.set(DOORBELLS + 4 * index, value)

    def ring_sq(self, qid: int) -> None:
        if qid and self.shadows:
            self._ring(2 * qid, self.rings[qid].tail)
        else:
            super().ring_sq(qid)

    def ring_cq(self, cqid: int) -> None:
        if cqid and self.shadows:
            self._ring(2 * cqid + 1, self.cqs[cqid].head)
        else:
            super().ring_cq(cqid)

    def look(self) -> None:
        """Queue 1 looks at its doorbells."""
        self.engine.kick(1)


def shadowed(
    *, sq_size: int = 16, cq_size: int = 16, lines: Lines | None = None, disk: Disk | None = None
) -> ShadowHost:
    """A host that has a queue pair and uses shadow doorbells."""
    host = ShadowHost(ram=ShadowRam(), lines=lines, disk=disk)
    host.enable()
    host.create(sq_size=sq_size, cq_size=cq_size)
    assert host.configure() == Status.SUCCESS
    return host
