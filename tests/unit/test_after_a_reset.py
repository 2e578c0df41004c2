"""No byte is written to guest memory for a command from before a reset, whatever the disk does: a look at memory."""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvmove.device import NvmeDevice
from nvmove.engine.compiled import CompiledEngine
from nvmove.engine.plain import PlainEngine
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.spec import CQE, CQE_SIZE, CSTS_SHST_COMPLETE, DOORBELLS, SQE_SIZE, Admin, Nvm, Register
from nvmove.vfio.client import GuestRam, VfioUserClient
from nvmove.vfio.device import BAR0_REGION, CONFIG_REGION
from nvmove.vfio.message import RegionAccess
from tests.directories import short_directory
from tests.nvme_host import CC, Entries, Ring, sqe
from tests.silent_disks import SilentDisk, held_by_a_server, held_in_nvmove, held_in_the_kernel
from tests.waiting import PATIENCE, wait

BLOCK = PAGE = 4096
OLD, NEW = b"\xa5", b"\x5a"
"""What fills memory before, and after: a new kernel would."""
SIZE = 2 << 20
SECOND = 1 << 30
"""Where the next kernel has its memory, so that all of the first one's can be compared."""
SHADOWS, EVENTS, QUEUES, LISTS, DATA = 0x4000, 0x5000, 0x1_0000, 0x4_0000, 0x10_0000
"""Shadow doorbells; I/O queues; PRP lists; data: pages that the reads are to fill. The admin queues are below."""
LOOK = 0.05
"""Seconds in which an action is done that waits for nothing."""


class Guest:
    """A kernel's NVMe driver, with the memory from `base` on."""

    def __init__(self, client: VfioUserClient, ram: GuestRam) -> None:
        self.client, self.ram, self.view = client, ram, ram.view
        self.base = ram.address
        self.rings: dict[int, Ring] = {}
        self.shadows = False

    def set(self, register: int, value: int, size: int = 4) -> None:
        self.client.write(BAR0_REGION, register, value.to_bytes(size, "little"))

    @property
    def csts(self) -> int:
        return int.from_bytes(self.client.read(BAR0_REGION, Register.CSTS, 4), "little")

    def enable(self) -> None:
        self._ring(0, 0x1000, 0x2000)
        self.set(Register.AQA, 15 << 16 | 15)
        self.set(Register.ASQ, self.base + 0x1000, 8)
        self.set(Register.ACQ, self.base + 0x2000, 8)
        self.set(Register.CC, CC | 1)
        wait(lambda: bool(self.csts & 1))

    def shadow_doorbells(self) -> None:
        self.view[SHADOWS : SHADOWS + 2 * PAGE] = bytes(2 * PAGE)
        self.admin(Admin.DOORBELL_BUFFER_CONFIG, prp1=self.base + SHADOWS, prp2=self.base + EVENTS)
        self.shadows = True

    def create(self, qid: int) -> None:
        at = QUEUES + 0x1_0000 * (qid - 1)
        ring = self._ring(qid, at, at + 0x8000)
        self.admin(Admin.CREATE_CQ, prp1=self.base + ring.cq.address, cdw10=15 << 16 | qid, cdw11=1)
        self.admin(Admin.CREATE_SQ, prp1=self.base + at, cdw10=15 << 16 | qid, cdw11=qid << 16 | 1)

    def _ring(self, qid: int, sq: int, cq: int) -> Ring:
        self.view[cq : cq + PAGE] = bytes(PAGE)
        self.rings[qid] = Ring(sq, 16, Entries(qid, cq, 16))
        return self.rings[qid]

    def submit(self, qid: int, opcode: int, **fields: int) -> None:
        ring = self.rings[qid]
        at = ring.address + ring.tail * SQE_SIZE
        self.view[at : at + SQE_SIZE] = sqe(opcode, ring.tail, **fields)
        ring.tail = (ring.tail + 1) % ring.size
        self._doorbell(2 * qid, ring.tail)

    def _doorbell(self, cell: int, value: int) -> None:
        if self.shadows:
            self.view[SHADOWS + 4 * cell : SHADOWS + 4 * cell + 4] = value.to_bytes(4, "little")
        self.set(DOORBELLS + 4 * cell, value)

    def complete(self, qid: int) -> None:
        """Wait for the next completion, which is a success."""
        cq = self.rings[qid].cq
        at = cq.address + cq.head * CQE_SIZE
        wait(lambda: self.view[at + 14] & 1 == cq.phase)
        assert CQE.unpack(self.view[at : at + CQE_SIZE])[4] >> 1 == 0
        cq.head += 1
        if cq.head == cq.size:
            cq.head, cq.phase = 0, cq.phase ^ 1
        self._doorbell(2 * qid + 1, cq.head)

    def admin(self, opcode: int, **fields: int) -> None:
        self.submit(0, opcode, **fields)
        self.complete(0)

    def read(self, qid: int, lba: int, pages: list[int]) -> None:
        """Begin to read into pages at these addresses of its memory, by a PRP list where it takes one."""
        prp1, *rest = [self.base + page for page in pages]
        prp2 = rest[0] if rest else 0
        if len(rest) > 1:
            at = LISTS + PAGE * self.rings[qid].tail
            self.view[at : at + 8 * len(rest)] = struct.pack(f"<{len(rest)}Q", *rest)
            prp2 = self.base + at
        self.submit(qid, Nvm.READ, nsid=1, prp1=prp1, prp2=prp2, cdw10=lba, cdw12=len(pages) - 1)


class Stage:
    """A device on a socket, a guest in it, and reads of that guest's at a disk that is silent."""

    def __init__(self, device: NvmeDevice, disk: SilentDisk, work: Path, *, shared: bool) -> None:
        self.device, self.disk, self.path = device, disk, work / "nvme"
        device.pause()
        self.state = device.save()
        device.resume()
        device.start(self.path)
        self.client = VfioUserClient.connect(self.path, timeout=PATIENCE)
        ram = self.client.map_ram(0, SIZE, shared=shared)
        ram.view[:] = OLD * SIZE
        self.guest = Guest(self.client, ram)
        self.guest.enable()

    def read(self, *, lent: bool) -> None:
        """One read of a page in queue 1, eight of 16 pages each in queue 2, backwards in memory."""
        guest = self.guest
        if lent:
            guest.shadow_doorbells()
        for qid in (1, 2):
            guest.create(qid)
            wait(functools.partial(self._read_one, qid, lent=lent))
        self.disk.mute()
        guest.read(1, 0, [DATA])
        pages = [DATA + PAGE * n for n in range(1, 129)]
        for n in range(8):
            guest.read(2, 128 + 16 * n, pages[16 * n : 16 * n + 16][::-1])
        wait(lambda: {at >= 128 * BLOCK for at in self.disk.reads()} == {False, True})

    def _read_one(self, qid: int, *, lent: bool) -> bool:
        """Read a page; return whether the queue is lent, or need not be."""
        self.guest.read(qid, 128 * qid - 1, [0x9000])
        self.guest.complete(qid)
        return not lent or self.device.controller.sqs[qid].borrower is not None

    def next_kernel(self) -> None:
        """Boot one in memory of its own. When its disk has answered it, nothing else is under way."""
        self.client.reset()
        guest = Guest(self.client, self.client.map_ram(SECOND, 1 << 20))
        guest.enable()
        guest.create(1)
        guest.read(1, 64, [DATA // 2])
        guest.complete(1)
        self.device.pause(PATIENCE)


# What ends commands. Each returns when the guest, or who it is that waits, sees that it is done.


def device_reset(stage: Stage) -> None:
    stage.client.reset()


def function_level_reset(stage: Stage) -> None:
    stage.client.write(CONFIG_REGION, 0x88, b"\0\x80")


def function_level_reset_in_a_batch(stage: Stage) -> None:
    stage.client.write_multi([RegionAccess(0x88, CONFIG_REGION, 2, b"\0\x80")], posted=False)


def disable(stage: Stage) -> None:
    stage.guest.set(Register.CC, CC)
    wait(lambda: not stage.guest.csts & 1)


def shutdown(stage: Stage) -> None:
    stage.guest.set(Register.CC, CC | 1 | 1 << 14)
    wait(lambda: stage.guest.csts & CSTS_SHST_COMPLETE == CSTS_SHST_COMPLETE)


def delete_queues(stage: Stage) -> None:
    for qid in (1, 2):
        stage.guest.submit(0, Admin.DELETE_SQ, cdw10=qid)
    for _ in (1, 2):
        stage.guest.complete(0)


def unmap(stage: Stage) -> None:
    stage.client.unmap(0, SIZE)


def unmap_the_data(stage: Stage) -> None:
    stage.client.unmap(DATA, SIZE - DATA)


def load(stage: Stage) -> None:
    stage.device.pause()
    stage.device.load(stage.state)
    stage.device.resume()


def disconnect(stage: Stage) -> None:
    stage.client.close()
    stage.client = VfioUserClient.connect(stage.path, timeout=PATIENCE)


KEPT: dict[Callable[[Stage], None], int] = {delete_queues: QUEUES, unmap_the_data: DATA}
"""Where what an action takes from the device begins: below, the device goes on."""
ACTIONS = (
    device_reset,
    function_level_reset,
    function_level_reset_in_a_batch,
    disable,
    shutdown,
    delete_queues,
    unmap,
    unmap_the_data,
    load,
    disconnect,
)
DISKS: dict[str, Callable[[Path], contextlib.AbstractContextManager[SilentDisk]]] = {
    "raw": functools.partial(held_in_nvmove, direct=False),
    "direct": functools.partial(held_in_nvmove, direct=True),
    "kernel": functools.partial(held_in_the_kernel, direct=False),
    "kernel-direct": functools.partial(held_in_the_kernel, direct=True),
    "nbd": held_by_a_server,
}
ENGINES: dict[str, type[PlainEngine]] = {"compiled": CompiledEngine, "plain": PlainEngine}


@contextlib.contextmanager
def staged(engine: str, disk: str, *, shared: bool = True) -> Iterator[Stage]:
    """A stage with its reads under way."""
    namespace = NamespaceConfig(
        nsid=1, drive="d0", uuid=uuid.UUID(int=1), logical_block_size=BLOCK, physical_block_size=BLOCK
    )
    config = ControllerConfig(serial="S1", msix_qsize=4, namespaces=(namespace,))
    with short_directory() as work, DISKS[disk](work) as silent:
        device = NvmeDevice(config, {"d0": silent.backend}, id="nvme0", engine=ENGINES[engine]("nvme0"))
        try:
            stage = Stage(device, silent, work, shared=shared)
            try:
                stage.read(lent=shared and silent.is_lent and engine == "compiled")
                yield stage
            finally:
                silent.unmute()
                stage.client.close()
        finally:
            device.close()


def begin(action: Callable[[Stage], None], stage: Stage) -> tuple[threading.Event, list[BaseException]]:
    """Begin an action; the event says that it is done."""
    done, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            action(stage)
        except BaseException as error:  # noqa: BLE001  # the test's own thread tells it
            failures.append(error)
        done.set()

    threading.Thread(target=run, name=action.__name__, daemon=True).start()
    return done, failures


def look(stage: Stage, action: Callable[[Stage], None]) -> None:
    """Do `action`, fill memory when it is done, let the disk answer, and compare."""
    view = stage.guest.view[KEPT.get(action, 0) :]
    done, failures = begin(action, stage)
    waits = not done.wait(LOOK)
    if waits:
        stage.disk.unmute()
        assert done.wait(2 * PATIENCE), "it is never done"
    assert not failures, failures
    assert bytes(view) != NEW * len(view)
    view[:] = NEW * len(view)
    stage.disk.unmute()
    stage.next_kernel()
    written = [at for at in range(0, len(view), PAGE) if bytes(view[at : at + PAGE]) != NEW * PAGE]
    assert written == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_nothing_is_written(action: Callable[[Stage], None], disk: str, engine: str) -> None:
    with staged(engine, disk) as stage:
        look(stage, action)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("disk", ["raw", "nbd"])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_nothing_is_written_by_message(action: Callable[[Stage], None], disk: str, engine: str) -> None:
    """Memory that is not shared."""
    with staged(engine, disk, shared=False) as stage:
        look(stage, action)
