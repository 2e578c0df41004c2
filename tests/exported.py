"""A host whose disk is an export of tests/nbd_server.py, on the compiled engine with its threads."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from nvmove.block.backend import Backend
from nvmove.block.config import OpenOptions
from nvmove.block.nbd.backend import NbdBackend
from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.engine.compiled import CompiledEngine
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.spec import Nvm
from tests.nbd_server import Server
from tests.nvme_host import CONFIG, DATA, Completion, Host
from tests.rings import LentLines, LentRam
from tests.waiting import wait

LONG = 20
LISTS = 0x70_0000
"""PRP lists, a page for each slot of `transfer`."""


class ExportHost(Host):
    """Commands run on the engine's threads; `finish` waits for them."""

    ram: LentRam
    engine: CompiledEngine
    errors: DriveErrors

    def __init__(
        self,
        server: Server,
        uri: str,
        options: OpenOptions,
        queues: int,
        config: ControllerConfig = CONFIG,
        policy: ErrorPolicy = ErrorPolicy.REPORT,
    ) -> None:
        self.server = server
        self.export = NbdBackend(uri, options, LONG)
        super().__init__(
            ram=LentRam(),
            lines=LentLines(),
            engine=CompiledEngine(spin_us=20),
            config=config,
            errors=DriveErrors(policy, policy),
        )
        self.enable()
        for qid in range(1, queues + 1):
            self.create(qid, sq_size=64, cq_size=64)

    def _backends(self) -> Mapping[str, Backend]:
        return {"d0": self.export}

    def drain(self) -> None:
        wait(lambda: self.peek(0) is not None)

    def finish(self, count: int = 1, qid: int = 1) -> list[Completion]:
        """Wait for completions, and consume them."""
        found: list[Completion] = []

        def have() -> bool:
            found.extend(self.reap(qid, count - len(found)))
            return len(found) == count

        wait(have)
        return found

    def do(self, opcode: int, qid: int = 1, **fields: int) -> int:
        """Run one command and return its status."""
        cid = self.submit(qid, opcode, **{"nsid": 1, **fields})
        (completion,) = self.finish(qid=qid)
        assert completion.cid == cid
        return completion.status

    def transfer(self, opcode: int, slot: int, lba: int, pages: int) -> int:
        """Submit a read or a write of whole pages: scattered, all others of the run that `where` tells."""
        entries = [self.where(slot, pages, number) for number in range(pages)]
        page = LISTS + 4096 * slot
        self.ram.data[page : page + 8 * (pages - 1)] = struct.pack(f"<{pages - 1}Q", *entries[1:])
        prp2 = 0 if pages == 1 else entries[1] if pages == 2 else page
        return self.submit(1, opcode, nsid=1, prp1=entries[0], prp2=prp2, cdw10=lba, cdw12=8 * pages - 1)

    @staticmethod
    def where(slot: int, pages: int, number: int) -> int:
        """Where a page of `transfer` is."""
        return DATA + 0x8_0000 * slot + 4096 * (pages - 1 - number)

    def is_lent(self, qid: int = 1) -> bool:
        """Whether the loop has the queue."""
        lent: list[int] = self.controller.inspect()["live"]["lent"]
        return qid in lent

    def borrow(self, qid: int = 1) -> None:
        """Have the loop run the queue; that takes a connection, which takes a while."""

        def is_so() -> bool:
            assert self.do(Nvm.READ, qid) == 0
            return self.is_lent(qid)

        wait(is_so)
        self.server.commands.clear()
        self.server.sources.clear()

    @property
    def in_python(self) -> bool:
        """Whether Python's connection, the first, had a command since `borrow`."""
        return 0 in self.server.sources

    def close(self) -> None:
        """Stop all of it."""
        self.controller.pause(LONG)
        self.export.close()
        self.engine.close()
