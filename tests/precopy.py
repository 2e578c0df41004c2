"""A vfio-user client that copies its guest's memory while the device writes to it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Sequence

from nvmove.nvme.seams import DmaError, LentMemory, Segment, Transfer
from nvmove.vfio.dirty import PAGE
from nvmove.vfio.memory import GuestMemory
from nvmove.vfio.message import Buffer
from nvmove.vfio.writing import Writing
from tests.message_client import MessageClient
from tests.ram import Ram


class PreCopy(MessageClient):
    """`dirty` pages are still to be copied to `target`. Only DMA_WRITE and the guest make pages dirty."""

    def __init__(self, pages: int) -> None:
        super().__init__()
        fd = os.memfd_create("ram")
        os.ftruncate(fd, pages * PAGE)
        self.ram = mmap.mmap(fd, pages * PAGE)
        self.fd = fd  # the device takes it over
        self.fd_kept = os.dup(fd)
        self.target = bytearray(pages * PAGE)
        self.dirty = set(range(pages))
        self.refuses = False
        self.guest_stores: dict[int, int] = {}
        """What the guest stores just before each message arrives."""

    def __del__(self) -> None:
        os.close(self.fd_kept)

    def dma_read(self, address: int, length: int) -> bytes:
        raise AssertionError("all memory is mapped")

    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]], writing: Writing | None = None) -> None:
        for address, data in runs:
            if self.refuses:
                raise DmaError("refused")
            for at, byte in self.guest_stores.items():
                self.store(at, byte)
            self.ram[address : address + len(data)] = bytes(data)
            self.dirty.update(range(address // PAGE, (address + len(data) - 1) // PAGE + 1))

    def store(self, at: int, byte: int) -> None:
        self.ram[at] = byte
        self.dirty.add(at // PAGE)

    def copy(self, page: int) -> None:
        if page in self.dirty:
            self.dirty.discard(page)
            self.target[page * PAGE : (page + 1) * PAGE] = self.ram[page * PAGE : (page + 1) * PAGE]

    def copy_all(self) -> None:
        for page in sorted(self.dirty):
            self.copy(page)


class CopiedRam(Ram):
    """Guest memory that such a client has mapped; it can be lent."""

    def __init__(self, pages: int) -> None:
        super().__init__(0)
        self.client = PreCopy(pages)
        self.data = self.client.ram  # type: ignore[assignment]
        self.memory = GuestMemory()
        self.memory.client = self.client
        self.memory.map(0, pages * PAGE, self.client.fd, 0, True, True)

    def read(self, address: int, length: int) -> bytes:
        return self.memory.read(address, length)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.memory.write(address, data)

    def acquire(self, segments: Sequence[Segment], to_guest: bool) -> Transfer:  # type: ignore[override]
        return self.memory.acquire(segments, to_guest)

    def lend(self, revoke: Callable[[], None]) -> LentMemory | None:
        return self.memory.lend(revoke)
