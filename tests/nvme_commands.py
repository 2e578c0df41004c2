"""A host of any namespaces and disks, that gives commands by name and picks up completions in any order."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping

from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.spec import Admin, Nvm, Status
from tests.disk import Disk
from tests.nvme_host import CC, DATA, Completion, Host

LIST = 0x1_0000
"""The PRP list of data of more than two pages."""


def namespace(drive: str = "d0", **properties: object) -> NamespaceConfig:
    return NamespaceConfig(**{"drive": drive, "uuid": uuid.UUID(int=0), **properties})  # type: ignore[arg-type]


class CommandHost(Host):
    """By default one namespace of 1 MiB and one I/O queue pair; `properties` are the controller's."""

    def __init__(
        self,
        *namespaces: NamespaceConfig,
        disks: Mapping[str, Disk] | None = None,
        io_queue: bool = True,
        **properties: object,
    ) -> None:
        config = ControllerConfig(
            **{"serial": "S1", "namespaces": namespaces or (namespace(),), **properties}  # type: ignore[arg-type]
        )
        super().__init__(disks=disks, config=config)
        self.completions: dict[int, Completion] = {}
        """By command id: those that nobody has asked for."""
        self.enable()
        if io_queue:
            self.create()

    @staticmethod
    def must(completion: Completion) -> Completion:
        assert completion.status == Status.SUCCESS, Status(completion.status)
        return completion

    def enable(self, entries: int = 32, cc: int = CC) -> None:
        self.completions.clear()
        super().enable(entries, cc)

    def drain(self) -> None:
        """Run the workers, and collect completions."""
        super().drain()
        for cqid in self.cqs:
            for completion in self.reap(cqid):
                assert completion.cid not in self.completions, "completed twice"
                self.completions[completion.cid] = completion

    def start(self, qid: int, opcode: int, **fields: int) -> int:
        """Run one command as far as it comes; return its command id."""
        cid = self.submit(qid, opcode, **fields)
        self.drain()
        return cid

    def completion(self, cid: int) -> Completion:
        """Return (and forget) the completion of `cid`."""
        assert cid in self.completions, f"command {cid} has not completed"
        return self.completions.pop(cid)

    def has_completed(self, cid: int) -> bool:
        return cid in self.completions

    def take(self, qid: int, cid: int) -> Completion:
        completion = self.completion(cid)
        held = sum(bool(request.buffers) for disk in self.disks.values() for request in disk.held)
        assert len(self.ram.taken) == held, "memory was not given back"
        return completion

    def transfer(self, qid: int, opcode: int, *, data: bytes = b"", length: int = 0, **fields: int) -> Completion:
        """Run one command to its end, with `data` for it or memory for `length` bytes from it, up to 2 MiB."""
        if size := max(len(data), length):
            self.ram.data[DATA : DATA + size] = data or b"\xa5" * length
            fields["prp2"] = self._second_prp(size)
        return self.command(qid, opcode, **fields)._replace(data=bytes(self.ram.data[DATA : DATA + length]))

    def _second_prp(self, size: int) -> int:
        rest = range(DATA + 4096, DATA + size, 4096)
        if len(rest) < 2:
            return sum(rest)
        self.ram.data[LIST : LIST + 8 * len(rest)] = struct.pack(f"<{len(rest)}Q", *rest)
        return LIST

    def io(self, opcode: int, nsid: int = 1, *, data: bytes = b"", length: int = 0, **fields: int) -> Completion:
        return self.transfer(1, opcode, data=data, length=length, nsid=nsid, **fields)

    # Admin commands.

    def identify(self, cns: int, nsid: int = 0, *, csi: int = 0, cntid: int = 0) -> Completion:
        return self.transfer(0, Admin.IDENTIFY, length=4096, nsid=nsid, cdw10=cns | cntid << 16, cdw11=csi << 24)

    def get_log(
        self, lid: int, length: int, *, nsid: int = 0xFFFF_FFFF, offset: int = 0, rae: bool = False, cdw14: int = 0
    ) -> Completion:
        dwords = length // 4 - 1
        return self.transfer(
            0,
            Admin.GET_LOG_PAGE,
            length=length,
            nsid=nsid,
            cdw10=lid | rae << 15 | (dwords & 0xFFFF) << 16,
            cdw11=dwords >> 16,
            cdw12=offset & 0xFFFF_FFFF,
            cdw13=offset >> 32,
            cdw14=cdw14,
        )

    def get_feature(
        self, feature: int, *, select: int = 0, cdw11: int = 0, nsid: int = 0, length: int = 0
    ) -> Completion:
        return self.transfer(0, Admin.GET_FEATURES, length=length, nsid=nsid, cdw10=feature | select << 8, cdw11=cdw11)

    def set_feature(
        self, feature: int, value: int = 0, *, nsid: int = 0, data: bytes = b"", save: int = 0
    ) -> Completion:
        return self.transfer(0, Admin.SET_FEATURES, data=data, nsid=nsid, cdw10=feature | save << 31, cdw11=value)

    def aer(self) -> int:
        """Give the controller an Asynchronous Event Request; return its command id."""
        return self.start(0, Admin.ASYNC_EVENT_REQUEST)

    # I/O commands.

    def read(self, lba: int, blocks: int, nsid: int = 1, *, block: int = 512, cdw12: int = 0) -> Completion:
        return self.io(
            Nvm.READ, nsid, length=blocks * block, cdw10=lba & 0xFFFF_FFFF, cdw11=lba >> 32, cdw12=blocks - 1 | cdw12
        )

    def write(self, lba: int, data: bytes, nsid: int = 1, *, block: int = 512, cdw12: int = 0) -> Completion:
        return self.io(
            Nvm.WRITE,
            nsid,
            data=data,
            cdw10=lba & 0xFFFF_FFFF,
            cdw11=lba >> 32,
            cdw12=len(data) // block - 1 | cdw12,
        )
