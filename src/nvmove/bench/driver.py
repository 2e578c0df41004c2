"""A host-side NVMe driver: what SPDK's initiator is, in small. It sets a served device up and runs jobs on its queues.

Setting up is plain Python over `vfio.client`; the jobs run in `initiator`, which is compiled and optional.
"""

from __future__ import annotations

import enum
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nvmove.bench.results import Run, merge
from nvmove.errors import UserError
from nvmove.nvme.spec import (
    CQE,
    CQE_SIZE,
    DOORBELLS,
    OACS_DOORBELL_BUFFER_CONFIG,
    PAGE,
    SQE_SIZE,
    Admin,
    Cns,
    Register,
)
from nvmove.vfio.client import VfioUserClient
from nvmove.vfio.device import BAR0_REGION

if TYPE_CHECKING:
    from nvmove.bench.initiator import Ring

_CC = 6 << 16 | 4 << 20 | 6 << 4
"""I/O queue entry sizes, all command sets (Base 2.0 §3.1.3.5)."""
_CC_EN = 1
_CSTS_RDY = 1
_NUMBER_OF_QUEUES = 0x07
"""Base 2.0 §5.27.1.5."""
_SQE = struct.Struct("<BBHI16xQQIIIIII")
"""Opcode, flags, command id, namespace, (metadata), PRP 1 and 2, dwords 10 to 15."""
_ADMIN_ENTRIES = 64
_SETUP_SECONDS = 30.0


class InitiatorError(UserError):
    """A measurement that cannot be made: one line that says why."""


def initiator_class() -> type[Ring]:
    """Return the compiled queue; raise InitiatorError when this nvmove was installed without a C compiler."""
    try:
        from nvmove.bench.initiator import Ring  # noqa: PLC0415 -- it is optional
    except ImportError:
        raise InitiatorError(
            "the host-side initiator is not there: it is compiled at install (apt-get install gcc python3-dev, then "
            "`rm -f .venv/.installed* && make install`)"
        ) from None
    return Ring


class DoorbellKind(enum.Enum):
    """How the initiator rings."""

    MESSAGES = "messages"
    """Posted writes over the socket, one message for both doorbells of a queue."""
    SHADOW = "shadow"
    """Doorbell Buffer Config: a message only when the device sleeps."""
    MAPPED = "mapped"
    """In memory that the device looks at (`x-doorbells=mapped`): never a message."""

    @property
    def device(self) -> str:
        """What is to be added to the options of a device that offers it."""
        return ",x-doorbells=mapped" if self is DoorbellKind.MAPPED else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What each queue does."""

    depth: int = 1
    size: int = 4096
    """Bytes a command."""
    read_percent: int = 100
    sequential: bool = False
    seconds: float = 1.0
    count: int = 0
    """Commands a queue; 0: as many as it gets done."""
    span: int = 0
    """Bytes of the disk, from its start, that the queues share; 0: all."""
    check: bool = False
    """Write patterns, and compare what is read with them."""
    seed: int = 1
    ahead: float = 0.0
    """Seconds: the whole queue is filled (`depth` is the number of buffers only) and looked at once in so long, so that
    the initiator takes next to no processor. 0: it polls. For `seconds` only, without latencies and checks."""


class HostDriver:
    """A device, enabled, with its admin queue. Memory lies at guest address 0."""

    def __init__(self, client: VfioUserClient, memory: int = 256 << 20) -> None:
        self._client = client
        self._ram = client.map_ram(0, memory)
        self._page = client.map_region(BAR0_REGION)
        self._free = 0
        self._rings: dict[int, Ring] = {}
        self._sq, self._cq = self._take(_ADMIN_ENTRIES * SQE_SIZE), self._take(_ADMIN_ENTRIES * CQE_SIZE)
        self._scratch = self._take(PAGE)
        self._tail = self._head = 0
        self._phase = 1
        self._enable()
        reply = self.identify(Cns.NAMESPACE, 1)
        formatted = reply[26] & 0xF
        self.doorbells = DoorbellKind.MESSAGES
        self.block = 1 << reply[128 + formatted * 4 + 2]
        """Bytes a logical block of namespace 1."""
        self.blocks = int.from_bytes(reply[:8], "little")
        self.controller = self.identify(Cns.CONTROLLER, 0)
        self._data_start = self._free

    @classmethod
    def connect(cls, socket: Path, memory: int = 256 << 20) -> HostDriver:
        """Connect to a served device and enable it."""
        client = VfioUserClient.connect(socket)
        try:
            return cls(client, memory)
        except BaseException:
            client.close()
            raise

    def __enter__(self) -> HostDriver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up: the device resets itself."""
        self._rings.clear()
        self._client.close()

    @property
    def client(self) -> VfioUserClient:
        """The connection."""
        return self._client

    # --- the admin queue ---------------------------------------------------------------------------------------------

    def _take(self, size: int) -> int:
        """Return whole pages of memory."""
        start = self._free
        self._free += -(-size // PAGE) * PAGE
        if self._free > len(self._ram.view):
            raise InitiatorError(f"the initiator's memory of {len(self._ram.view) >> 20} MiB is too small for this")
        return start

    def _register(self, register: int, value: int, size: int = 4) -> None:
        self._client.write(BAR0_REGION, register, value.to_bytes(size, "little"))

    def _enable(self) -> None:
        self._register(Register.AQA, (_ADMIN_ENTRIES - 1) << 16 | (_ADMIN_ENTRIES - 1))
        self._register(Register.ASQ, self._sq, 8)
        self._register(Register.ACQ, self._cq, 8)
        self._register(Register.CC, _CC | _CC_EN)
        deadline = time.monotonic() + _SETUP_SECONDS
        while not int.from_bytes(self._client.read(BAR0_REGION, Register.CSTS, 4), "little") & _CSTS_RDY:
            if time.monotonic() > deadline:
                raise InitiatorError("the device does not become ready")
            time.sleep(0.001)

    def admin(self, opcode: int, nsid: int = 0, prp1: int = 0, prp2: int = 0, cdw10: int = 0, cdw11: int = 0) -> int:
        """Do one admin command and return its result; raise InitiatorError with its status."""
        view, cid = self._ram.view, self._tail
        view[self._sq + cid * SQE_SIZE : self._sq + (cid + 1) * SQE_SIZE] = _SQE.pack(
            opcode, 0, cid, nsid, prp1, prp2, cdw10, cdw11, 0, 0, 0, 0
        )
        self._tail = (self._tail + 1) % _ADMIN_ENTRIES
        self._register(DOORBELLS, self._tail)
        deadline = time.monotonic() + _SETUP_SECONDS
        at = self._cq + self._head * CQE_SIZE
        while view[at + 14] & 1 != self._phase:
            if time.monotonic() > deadline:
                raise InitiatorError(f"the device does not answer admin command {opcode:#x}")
            time.sleep(0.0002)
        result, _, _, _, status = CQE.unpack_from(view, at)
        self._head = (self._head + 1) % _ADMIN_ENTRIES
        self._phase ^= not self._head
        self._register(DOORBELLS + 4, self._head)
        if status >> 1:
            raise InitiatorError(f"the device refuses admin command {opcode:#x}: status {status >> 1:#x}")
        return int(result)

    def identify(self, cns: int, nsid: int) -> bytes:
        """Return an identify structure of 4096 bytes."""
        self.admin(Admin.IDENTIFY, nsid, self._scratch, cdw10=cns)
        return bytes(self._ram.view[self._scratch : self._scratch + PAGE])

    # --- I/O ---------------------------------------------------------------------------------------------------------

    @property
    def offered(self) -> frozenset[DoorbellKind]:
        """The kinds of doorbells that the device has."""
        oacs = int.from_bytes(self.controller[256:258], "little")
        more = [DoorbellKind.SHADOW] if oacs & OACS_DOORBELL_BUFFER_CONFIG else []
        if self._page is not None:
            more.append(DoorbellKind.MAPPED)
        return frozenset([DoorbellKind.MESSAGES, *more])

    def make_queues(self, number: int, entries: int = 1024, doorbells: DoorbellKind = DoorbellKind.MESSAGES) -> None:
        """Make I/O queue pairs 1 to `number`; once. Without interrupts: the initiator polls. Raises InitiatorError."""
        if doorbells not in self.offered:
            raise InitiatorError(f"the device has no doorbells of the kind {doorbells.value}")
        self.doorbells = doorbells
        ring_class = initiator_class()
        granted = self.admin(Admin.SET_FEATURES, cdw10=_NUMBER_OF_QUEUES, cdw11=(number - 1) << 16 | (number - 1))
        if min(granted & 0xFFFF, granted >> 16 & 0xFFFF) + 1 < number:
            raise InitiatorError(f"the device does not have {number} queues")
        shadow = event = 0
        if self.doorbells is DoorbellKind.SHADOW:
            shadow, event = self._take(PAGE), self._take(PAGE)
            self.admin(Admin.DOORBELL_BUFFER_CONFIG, prp1=shadow, prp2=event)
        for qid in range(1, number + 1):
            sq, cq = self._take(entries * SQE_SIZE), self._take(entries * CQE_SIZE)
            self.admin(Admin.CREATE_CQ, prp1=cq, cdw10=(entries - 1) << 16 | qid, cdw11=1)
            self.admin(Admin.CREATE_SQ, prp1=sq, cdw10=(entries - 1) << 16 | qid, cdw11=qid << 16 | 1)
            self._rings[qid] = ring_class(self._ram.view, sq, cq, entries, qid, self._client.fileno())
            tail, head = 8 * qid, 8 * qid + 4
            if self.doorbells is DoorbellKind.MAPPED and self._page is not None:
                start, page = self._page
                self._rings[qid].use_cells(page, DOORBELLS - start + tail, DOORBELLS - start + head, None)
            elif self.doorbells is DoorbellKind.SHADOW:
                self._rings[qid].use_cells(self._ram.view, shadow + tail, shadow + head, (event + tail, event + head))
        self._data_start = self._free

    def run(self, job: Job, queues: Sequence[int] = (1,)) -> Run:
        """Run `job` on each of some queues at once, a thread each; raise InitiatorError when the device hangs."""
        self._free = self._data_start
        threads, runs, failures = [], [], []
        rings = [self._rings[qid] for qid in queues]
        span = (job.span or self.blocks * self.block) // self.block // len(rings)
        for number, ring in enumerate(rings):
            data = self._take(job.depth * -(-job.size // PAGE) * PAGE)
            lists = self._take(job.depth * PAGE)

            where = {"data": data, "lists": lists, "block": self.block, "first": number * span, "blocks": span}

            def work(ring: Ring = ring, where: dict[str, int] = where, seed: int = job.seed + number) -> None:
                try:
                    runs.append(_run(ring, job, where, seed))
                except (InitiatorError, ValueError) as error:
                    failures.append(error)

            threads.append(threading.Thread(target=work, name=f"initiator-{number + 1}", daemon=True))
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self.stop()
            for thread in threads:
                thread.join()
            raise
        if failures:
            raise failures[0]
        return merge(runs)

    def stop(self) -> None:
        """End what runs: nothing more is issued."""
        for ring in self._rings.values():
            ring.stop()

    def abandon(self, job: Job, until: Callable[[], bool]) -> None:
        """Issue commands that are not going to complete, on queue 1, and return when `until` says so.

        Raises InitiatorError when it does not within some seconds. The queue is good for nothing afterwards.
        """
        self._free = self._data_start
        data, lists = self._take(job.depth * -(-job.size // PAGE) * PAGE), self._take(job.depth * PAGE)
        self._rings[1].run(
            data=data,
            lists=lists,
            depth=job.depth,
            size=job.size,
            block=self.block,
            first=0,
            blocks=self.blocks,
            read_percent=job.read_percent,
            sequential=True,
            seconds=_SETUP_SECONDS,
            count=job.count,
            stall=0.05,
        )
        deadline = time.monotonic() + _SETUP_SECONDS
        while not until():
            if time.monotonic() > deadline:
                raise InitiatorError("the device has not taken the commands")
            time.sleep(0.001)


def _run(ring: Ring, job: Job, where: dict[str, int], seed: int) -> Run:
    what: dict[str, Any] = {
        **where,
        "depth": job.depth,
        "size": job.size,
        "read_percent": job.read_percent,
        "sequential": job.sequential,
        "seconds": job.seconds,
        "seed": seed,
    }
    end, done, errors, mismatches, seconds, messages, status, histogram, starved = (
        ring.run_ahead(**what, interval=job.ahead) if job.ahead else ring.run(**what, count=job.count, check=job.check)
    )
    if end == 1:
        raise InitiatorError(f"the device does not complete commands any more ({done} were)")
    if end == 2:
        raise InitiatorError("the device has closed the connection")
    if errors:
        raise InitiatorError(f"{errors} of {done} commands failed, the last with status {status:#x}")
    if mismatches:
        raise InitiatorError(f"{mismatches} of {done} reads had wrong data")
    return Run(done, seconds, messages, histogram, starved)
