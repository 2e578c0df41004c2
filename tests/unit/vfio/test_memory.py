"""Guest memory: maps, transfers, and maps that go away under them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterable

import pytest

from nvmove.nvme.seams import DmaError, Segment
from nvmove.vfio.memory import GuestMemory
from nvmove.vfio.message import Buffer
from nvmove.vfio.writing import Writing
from tests.message_client import MessageClient

PAGE = 4096


class FakeClient(MessageClient):
    """The client's side of memory by message; refuses addresses from `limit` on."""

    def __init__(self, limit: int = 1 << 63) -> None:
        super().__init__()
        self.ram: dict[int, int] = {}
        self.limit = limit
        self.calls: list[tuple[str, int, int]] = []

    def dma_read(self, address: int, length: int) -> bytes:
        self.calls.append(("read", address, length))
        if address + length > self.limit:
            raise DmaError("refused")
        return bytes(self.ram.get(address + i, 0) for i in range(length))

    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]], writing: Writing | None = None) -> None:
        for address, data in runs:
            self.calls.append(("write", address, len(data)))
            if address + len(data) > self.limit:
                raise DmaError("refused")
            self.ram.update(enumerate(bytes(data), address))


def add(
    memory: GuestMemory, address: int, size: int, *, offset: int = 0, readable: bool = True, writable: bool = True
) -> mmap.mmap:
    """Map fresh shared memory; return the guest's own view of the whole file."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, offset + size)
    view = mmap.mmap(fd, offset + size)
    memory.map(address, size, fd, offset, readable, writable)
    return view


def unmapped(memory: GuestMemory, address: int, size: int) -> list[int]:
    """Unmap; the list gets the errno when it is done."""
    results: list[int] = []
    memory.unmap(address, size, results.append)
    return results


def test_reads_and_writes_reach_the_guests_memory_in_place() -> None:
    memory = GuestMemory()
    ram = add(memory, 0x10000, 2 * PAGE, offset=PAGE)
    ram[PAGE + 8 : PAGE + 11] = b"abc"
    assert memory.read(0x10008, 3) == b"abc"
    memory.write(0x10FFE, b"wxyz")
    assert ram[2 * PAGE - 2 : 2 * PAGE + 2] == b"wxyz"


def test_an_offset_inside_a_page_is_mapped() -> None:
    memory = GuestMemory()
    ram = add(memory, 0x1200, 0x100, offset=0x200)
    memory.write(0x1200, b"x")
    assert ram[0x200] == ord("x")


def test_accesses_cross_adjacent_regions() -> None:
    memory = GuestMemory()
    low, high = add(memory, 0, PAGE), add(memory, PAGE, PAGE)
    memory.write(PAGE - 2, b"abcd")
    assert (low[-2:], high[:2]) == (b"ab", b"cd")
    assert memory.read(PAGE - 2, 4) == b"abcd"


def test_a_transfer_is_views_of_the_mmaps_merged_where_they_touch() -> None:
    memory = GuestMemory()
    ram, other = add(memory, 0, 4 * PAGE), add(memory, 4 * PAGE, PAGE)
    segments = [Segment(0, PAGE), Segment(PAGE, PAGE), Segment(3 * PAGE, 2 * PAGE), Segment(0, 16)]
    transfer = memory.acquire(segments, to_guest=True)
    assert [len(buffer) for buffer in transfer.buffers] == [2 * PAGE, PAGE, PAGE, 16]
    transfer.buffers[0][0:2] = b"hi"
    transfer.buffers[2][0:2] = b"ho"
    transfer.finish()
    assert (ram[:2], other[:2]) == (b"hi", b"ho")


@pytest.mark.parametrize(("address", "length"), [(0, 1), (PAGE - 1, 2), (2 * PAGE, 1), (2 * PAGE - 1, 2), (1 << 64, 1)])
def test_unmapped_addresses_are_dma_errors(address: int, length: int) -> None:
    memory = GuestMemory()
    add(memory, PAGE, PAGE)
    with pytest.raises(DmaError, match="not mapped"):
        memory.read(address, length)
    with pytest.raises(DmaError, match="not mapped"):
        memory.write(address, bytes(length))


def test_rom_is_read_only_and_write_only_memory_unreadable() -> None:
    memory = GuestMemory()
    rom = add(memory, 0, PAGE, writable=False)
    add(memory, PAGE, PAGE, readable=False)
    rom[:1] = b"r"
    assert memory.read(0, 1) == b"r"
    with pytest.raises(DmaError, match="not writable"):
        memory.write(0, b"x")
    with pytest.raises(DmaError, match="not readable"):
        memory.read(PAGE, 1)
    with pytest.raises(DmaError, match="not writable"):
        memory.acquire([Segment(PAGE, 8), Segment(8, 8)], to_guest=True)
    assert unmapped(memory, PAGE, PAGE) == [0], "a refused transfer kept its memory"


@pytest.mark.parametrize(("address", "size"), [(0, PAGE + 1), (PAGE, PAGE), (2 * PAGE - 1, 1), (0, 1 << 40)])
def test_overlapping_maps_are_refused_and_their_descriptor_closed(address: int, size: int) -> None:
    memory = GuestMemory()
    add(memory, PAGE, PAGE)
    fd = os.memfd_create("ram")
    with pytest.raises(OSError, match="mapped already") as refusal:
        memory.map(address, size, fd, 0, True, True)
    assert refusal.value.errno == errno.EEXIST
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    "opened",
    [
        lambda: os.memfd_create("empty"),
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.eventfd(0),
    ],
)
def test_a_descriptor_that_cannot_be_mapped_is_an_error(opened: Callable[[], int]) -> None:
    memory = GuestMemory()
    with pytest.raises(OSError, match=r"."):
        memory.map(0, PAGE, opened(), 0, True, True)
    assert memory.ranges() == []


def test_unmap_waits_for_the_transfers_that_use_the_region() -> None:
    memory = GuestMemory()
    ram = add(memory, 0, PAGE)
    first = memory.acquire([Segment(0, 8)], to_guest=True)
    second = memory.acquire([Segment(8, 8)], to_guest=True)
    results = unmapped(memory, 0, PAGE)
    with pytest.raises(DmaError):
        memory.read(0, 1)
    first.finish()
    assert results == []
    second.buffers[0][:] = b"still ok"
    second.finish()
    assert results == [0]
    assert ram[8:16] == b"still ok"


def test_unmap_of_several_regions_is_done_once() -> None:
    memory = GuestMemory()
    add(memory, 0, PAGE)
    add(memory, PAGE, PAGE)
    transfer = memory.acquire([Segment(0, 2 * PAGE)], to_guest=False)
    results = unmapped(memory, 0, 2 * PAGE)
    transfer.finish()
    assert results == [0]


def test_unmap_of_nothing_is_no_error() -> None:
    memory = GuestMemory()
    assert unmapped(memory, 0, PAGE) == [0]
    done: list[int] = []
    memory.unmap_all(done.append)
    add(memory, 0, PAGE)
    memory.unmap_all(done.append)
    assert done == [0, 0]
    assert memory.ranges() == []


def test_unmap_of_a_part_leaves_the_rest() -> None:
    memory = GuestMemory()
    ram = add(memory, 0, 3 * PAGE)
    assert unmapped(memory, PAGE, PAGE) == [0]
    assert memory.ranges() == [(0, PAGE, "mapped"), (2 * PAGE, PAGE, "mapped")]
    memory.write(2 * PAGE, b"tail")
    assert ram[2 * PAGE : 2 * PAGE + 4] == b"tail"
    with pytest.raises(DmaError):
        memory.read(PAGE, 1)
    add(memory, PAGE, PAGE)
    assert memory.read(0, 3 * PAGE)[2 * PAGE :][:4] == b"tail"


def test_an_unmapped_region_is_unmapped_from_the_process() -> None:
    memory = GuestMemory()
    add(memory, 0, PAGE).close()
    fd = os.memfd_create("nvmove-visible")
    os.ftruncate(fd, PAGE)
    memory.map(PAGE, PAGE, fd, 0, True, True)

    def visible() -> bool:
        with open("/proc/self/maps") as maps:
            return "nvmove-visible" in maps.read()

    assert visible()
    transfer = memory.acquire([Segment(PAGE, 8)], to_guest=True)
    unmapped(memory, PAGE, PAGE)
    transfer.finish()
    assert not visible()


def test_memory_without_a_descriptor_goes_through_the_client() -> None:
    memory, client = GuestMemory(), FakeClient()
    memory.client = client
    memory.map(0x1000, PAGE, None, 0, True, True)
    memory.write(0x1010, b"by message")
    assert memory.read(0x1010, 10) == b"by message"
    assert client.calls == [("write", 0x1010, 10), ("read", 0x1010, 10)]
    assert memory.ranges() == [(0x1000, PAGE, "by message")]


def test_bounce_buffers_are_written_on_commit_only() -> None:
    memory, client = GuestMemory(), FakeClient()
    memory.client = client
    add(memory, 0, PAGE)
    memory.map(PAGE, PAGE, None, 0, True, True)
    for commit in (False, True):
        transfer = memory.acquire([Segment(PAGE - 4, 8)], to_guest=True)
        transfer.buffers[1][:] = b"data"
        transfer.finish(commit)
        assert commit == (client.ram.get(PAGE) == ord("d"))


def test_bounce_buffers_read_from_the_guest_are_not_written_back() -> None:
    memory, client = GuestMemory(), FakeClient()
    memory.client = client
    memory.map(0, PAGE, None, 0, True, True)
    memory.acquire([Segment(0, 8)], to_guest=False).finish()
    assert client.calls == [("read", 0, 8)]


def test_a_client_that_refuses_fails_the_transfer_and_frees_its_memory() -> None:
    memory, client = GuestMemory(), FakeClient(limit=PAGE)
    memory.client = client
    add(memory, 0, PAGE)
    memory.map(PAGE, PAGE, None, 0, True, True)
    with pytest.raises(DmaError, match="refused"):
        memory.acquire([Segment(PAGE - 4, 8)], to_guest=False)
    transfer = memory.acquire([Segment(PAGE - 4, 8)], to_guest=True)
    with pytest.raises(DmaError, match="refused"):
        transfer.finish()
    memory.client = None
    with pytest.raises(DmaError, match="no client"):
        memory.read(PAGE, 1)
    assert unmapped(memory, 0, PAGE) == [0]


@pytest.mark.parametrize("commit", [True, False])
def test_unmap_does_not_wait_for_memory_by_message_which_is_not_written_to_any_more(commit: bool) -> None:
    memory, client = GuestMemory(), FakeClient()
    memory.client = client
    memory.map(0, PAGE, None, 0, True, True)
    transfer = memory.acquire([Segment(0, 8)], to_guest=True)
    assert unmapped(memory, 0, PAGE) == [0]
    memory.map(0, PAGE, None, 0, True, True)
    with pytest.raises(DmaError, match="unmapped") if commit else contextlib.nullcontext():
        transfer.finish(commit)
    assert client.calls == []
    memory.write(0, b"x")
    assert client.calls == [("write", 0, 1)]
