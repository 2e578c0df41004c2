"""A guest's memory, in process."""

from __future__ import annotations

from collections.abc import Sequence

from nvmove.nvme.seams import DmaError, Segment

MEMORY = 8 << 20


class Ram:
    """Guest memory from address 0; `holes` are runs of addresses that are not mapped."""

    def __init__(self, size: int = MEMORY) -> None:
        self.data = bytearray(size)
        self.holes: list[range] = []
        self.reads: list[tuple[int, int]] = []
        self.taken: list[Mapped] = []
        """What was acquired and is not finished."""
        self.fails_on_finish = False
        """Whether data cannot be given to the guest after all."""

    def _check(self, address: int, length: int) -> None:
        inside = address + length <= len(self.data)
        if not inside or any(hole.start < address + length and address < hole.stop for hole in self.holes):
            raise DmaError(f"{address:#x}")

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        self.reads.append((address, length))
        return bytes(self.data[address : address + length])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self._check(address, len(data))
        self.data[address : address + len(data)] = data

    def acquire(self, segments: Sequence[Segment], to_guest: bool) -> Mapped:
        for address, length in segments:
            self._check(address, length)
        view = memoryview(self.data)
        mapped = Mapped([view[address : address + length] for address, length in segments], self)
        self.taken.append(mapped)
        return mapped


class Mapped:
    """Memory that was acquired. It is finished once."""

    def __init__(self, buffers: Sequence[memoryview], ram: Ram) -> None:
        self.buffers = buffers
        self._ram = ram

    def finish(self, commit: bool = True) -> None:
        self._ram.taken.remove(self)
        self.buffers = ()
        if commit and self._ram.fails_on_finish:
            raise DmaError("finish")
