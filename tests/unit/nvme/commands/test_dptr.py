"""PRPs and SGLs: where the data is, and what is wrong with them."""

from __future__ import annotations

import struct

import pytest

from nvmove.nvme.commands.command import Command
from nvmove.nvme.commands.dptr import MAX_SGL_DESCRIPTORS, resolve
from nvmove.nvme.errors import CommandError
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.seams import DmaError, Segment
from nvmove.nvme.spec import SGL_BIT_BUCKET, SGL_DATA_BLOCK, SGL_LAST_SEGMENT, SGL_SEGMENT, Nvm, Status
from tests.nvme_host import Host, sqe
from tests.ram import Ram

PAGE = 4096
LIST = 0x2000


def run(ram: Ram, entry: bytes, length: int, page: int = PAGE, sqid: int = 1) -> list[Segment]:
    sq = SubmissionQueue(sqid, CompletionQueue(sqid, 0, 2, 0, False), 0, 2)
    return resolve(Command(Host().controller, sq, entry), length, page, ram)


def prp(prp1: int, prp2: int, length: int, ram: Ram | None = None, page: int = PAGE) -> list[Segment]:
    return run(ram or Ram(), sqe(Nvm.READ, prp1=prp1, prp2=prp2), length, page)


def fails(status: Status, prp1: int, prp2: int, length: int, ram: Ram | None = None) -> None:
    with pytest.raises(CommandError) as caught:
        prp(prp1, prp2, length, ram)
    assert caught.value.status == status


def descriptor(address: int, size: int, kind: int, subtype: int = 0) -> bytes:
    return struct.pack("<QI3xB", address, size, kind << 4 | subtype)


def sgl(first: bytes, length: int, ram: Ram | None = None, psdt: int = 1, sqid: int = 1) -> list[Segment]:
    prp1, prp2 = struct.unpack("<QQ", first)
    return run(ram or Ram(), sqe(Nvm.READ, prp1=prp1, prp2=prp2, flags=psdt << 6), length, sqid=sqid)


def sgl_fails(status: Status, first: bytes, length: int, ram: Ram | None = None) -> None:
    with pytest.raises(CommandError) as caught:
        sgl(first, length, ram)
    assert caught.value.status == status


def test_one_prp_reaches_to_the_end_of_its_page() -> None:
    assert prp(0x1800, 0xBAD, 0x800) == [Segment(0x1800, 0x800)]
    assert prp(0x1800, 0x4000, 0x801) == [Segment(0x1800, 0x800), Segment(0x4000, 1)]
    assert prp(0x1800, 0x2000, 0x1800) == [Segment(0x1800, 0x1800)]


def test_a_list_may_begin_inside_a_page_and_adjacent_pages_are_joined() -> None:
    ram = Ram()
    ram.data[LIST + 8 : LIST + 32] = struct.pack("<3Q", 0x8000, 0x9000, 0xC000)
    assert prp(0x1000, LIST + 8, 3 * PAGE + 512, ram) == [
        Segment(0x1000, PAGE),
        Segment(0x8000, 2 * PAGE),
        Segment(0xC000, 512),
    ]


def test_the_last_entry_of_a_list_leads_on_only_when_more_pages_are_left() -> None:
    ram = Ram()
    start = LIST + PAGE - 16
    ram.data[start : start + 16] = struct.pack("<2Q", 0x10000, 0x4000)
    assert prp(0x1000, start, 3 * PAGE, ram)[-1] == Segment(0x4000, PAGE)
    ram.data[0x4000:0x4010] = struct.pack("<2Q", 0x20000, 0x30000)
    assert prp(0x1000, start, 4 * PAGE, ram) == [
        Segment(0x1000, PAGE),
        Segment(0x10000, PAGE),
        Segment(0x20000, PAGE),
        Segment(0x30000, PAGE),
    ]


def test_a_list_may_begin_with_its_last_entry() -> None:
    ram = Ram()
    start = LIST + PAGE - 8
    ram.data[start : start + 8] = struct.pack("<Q", 0x4000)
    ram.data[0x4000:0x4010] = struct.pack("<2Q", 0x20000, 0x22000)
    assert [s.address for s in prp(0x1000, start, 3 * PAGE, ram)] == [0x1000, 0x20000, 0x22000]


def test_pages_of_64_kib() -> None:
    assert prp(0x1000, 0x20000, 0x10000, page=0x10000) == [Segment(0x1000, 0xF000), Segment(0x20000, 0x1000)]


def test_prp_offsets_that_are_invalid() -> None:
    ram = Ram()
    fails(Status.INVALID_PRP_OFFSET, 0x1002, 0, 512)
    fails(Status.INVALID_PRP_OFFSET, 0x1000, 0x2004, 2 * PAGE)
    fails(Status.INVALID_PRP_OFFSET, 0x1000, LIST + 4, 3 * PAGE)
    ram.data[LIST : LIST + 16] = struct.pack("<2Q", 0x8000, 0x9008)
    fails(Status.INVALID_PRP_OFFSET, 0x1000, LIST, 3 * PAGE, ram)
    start = LIST + PAGE - 16
    ram.data[start : start + 16] = struct.pack("<2Q", 0x8000, 0x4008)
    fails(Status.INVALID_PRP_OFFSET, 0x1000, start, 4 * PAGE, ram)


def test_a_loop_of_prp_lists_ends_with_the_transfer() -> None:
    ram = Ram()
    ram.data[LIST : LIST + PAGE] = struct.pack("<512Q", *[0x10000] * 511, LIST)
    segments = prp(0x1000, LIST, 2000 * PAGE, ram)
    assert sum(s.length for s in segments) == 2000 * PAGE
    assert len(ram.reads) == 4


def test_a_prp_list_that_is_not_mapped_is_a_dma_error() -> None:
    with pytest.raises(DmaError):
        prp(0x1000, 1 << 40, 3 * PAGE)


def test_an_sgl_data_block_may_be_anywhere() -> None:
    assert sgl(descriptor(0x1003, 77, SGL_DATA_BLOCK), 77) == [Segment(0x1003, 77)]
    assert sgl(descriptor(0x1003, 77, SGL_DATA_BLOCK), 77, psdt=2) == [Segment(0x1003, 77)]


def test_sgl_segments_are_followed_to_the_last() -> None:
    ram = Ram()
    ram.data[LIST : LIST + 48] = (
        descriptor(0x8000, 100, SGL_DATA_BLOCK)
        + descriptor(0, 0, SGL_DATA_BLOCK)
        + descriptor(0x3000, 32, SGL_LAST_SEGMENT)
    )
    ram.data[0x3000:0x3020] = descriptor(0x9000, 28, SGL_DATA_BLOCK) + descriptor(0x901C, 72, SGL_DATA_BLOCK)
    assert sgl(descriptor(LIST, 48, SGL_SEGMENT), 200, ram) == [Segment(0x8000, 100), Segment(0x9000, 100)]


@pytest.mark.parametrize("length", [76, 78])
def test_an_sgl_of_another_length_than_the_transfer(length: int) -> None:
    sgl_fails(Status.DATA_SGL_LENGTH_INVALID, descriptor(0x1000, 77, SGL_DATA_BLOCK), length)


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (descriptor(0, 512, SGL_BIT_BUCKET), Status.SGL_TYPE_INVALID),
        (descriptor(0, 512, 5), Status.SGL_TYPE_INVALID),
        (descriptor(0x1000, 512, SGL_DATA_BLOCK, subtype=1), Status.SGL_TYPE_INVALID),
        (descriptor(LIST, 0, SGL_SEGMENT), Status.INVALID_SGL_SEGMENT),
        (descriptor(LIST, 24, SGL_LAST_SEGMENT), Status.INVALID_SGL_SEGMENT),
        (descriptor(LIST, 0xFFFF_FFF0, SGL_LAST_SEGMENT), Status.INVALID_SGL_COUNT),
    ],
)
def test_sgl_descriptors_that_are_refused(first: bytes, status: Status) -> None:
    sgl_fails(status, first, 512)


def test_a_segment_descriptor_belongs_at_the_end_and_not_into_the_last_segment() -> None:
    ram = Ram()
    ram.data[LIST : LIST + 32] = descriptor(0x3000, 16, SGL_SEGMENT) + descriptor(0x8000, 512, SGL_DATA_BLOCK)
    sgl_fails(Status.INVALID_SGL_SEGMENT, descriptor(LIST, 32, SGL_SEGMENT), 512, ram)
    sgl_fails(Status.INVALID_SGL_SEGMENT, descriptor(LIST, 16, SGL_LAST_SEGMENT), 512, ram)


def test_a_segment_that_leads_nowhere_is_not_a_segment() -> None:
    ram = Ram()
    ram.data[LIST : LIST + 16] = descriptor(0x8000, 512, SGL_DATA_BLOCK)
    sgl_fails(Status.INVALID_SGL_SEGMENT, descriptor(LIST, 16, SGL_SEGMENT), 512, ram)


def test_a_loop_of_sgl_segments_ends() -> None:
    ram = Ram()
    ram.data[LIST : LIST + 16] = descriptor(LIST, 16, SGL_SEGMENT)
    sgl_fails(Status.INVALID_SGL_COUNT, descriptor(LIST, 16, SGL_SEGMENT), 512, ram)
    assert len(ram.reads) <= MAX_SGL_DESCRIPTORS


def test_admin_commands_have_no_sgls_and_psdt_3_is_reserved() -> None:
    for psdt, sqid in ((1, 0), (2, 0), (3, 0), (3, 1)):
        with pytest.raises(CommandError) as caught:
            sgl(descriptor(0x1000, 512, SGL_DATA_BLOCK), 512, psdt=psdt, sqid=sqid)
        assert caught.value.status == Status.INVALID_FIELD
