"""The protocol, command by command, over a real socket pair."""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from nvmove.nvme.seams import DmaError, Segment
from nvmove.vfio import deviceinfo, message
from nvmove.vfio.client import ClientError, VfioUserClient
from nvmove.vfio.device import BAR0_REGION, CONFIG_REGION, INTX, MSIX, MappableArea, RegionInfo, Reset
from nvmove.vfio.message import Command, RegionAccess
from nvmove.vfio.page import SharedPages
from nvmove.vfio.version import Version
from tests.descriptors import few_descriptors, no_descriptor_left
from tests.vfio_peer import PlainDevice, ask_until, connected, noting, served
from tests.waiting import ended, in_thread

PAGE = 4096
EVENTFDS = message.SET_DATA_EVENTFD | message.SET_TRIGGER


def refused(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(ClientError) as refusal:
        call()
    assert errno.errorcode[code] == errno.errorcode.get(refusal.value.errno or 0)


def irqs(flags: int, index: int, start: int, count: int) -> bytes:
    """The payload of DEVICE_SET_IRQS, without data."""
    return struct.pack("<IIIII", 20, flags, index, start, count)


def access(offset: int, region: int, count: int) -> bytes:
    """The payload of REGION_READ and REGION_WRITE, without data."""
    return struct.pack("<QII", offset, region, count)


@contextmanager
def mappable() -> Iterator[tuple[PlainDevice, SharedPages]]:
    """A device, a page of whose BAR0 can be mapped, and that page."""
    device = PlainDevice()
    with closing(SharedPages(PAGE, PAGE)) as pages:
        device.regions[BAR0_REGION] = RegionInfo(len(device.bar), True, True, MappableArea(PAGE, PAGE, pages.fd))
        yield device, pages


def test_version_is_0_0_with_qemus_limits() -> None:
    with connected(PlainDevice()) as client:
        assert Version(0, 0, 16, 1 << 20, True) == client.version


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (struct.pack("<HH", 1, 0), errno.EINVAL),
        (struct.pack("<HH", 0, 0) + b"{}", errno.EINVAL),
        (struct.pack("<HH", 0, 0) + b"{\0", errno.EINVAL),
        (struct.pack("<HH", 0, 0) + b"[" * 100000 + b"\0", errno.EINVAL),
        (struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_data_xfer_size":0}}\0', errno.EINVAL),
        (struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_msg_fds":"x"}}\0', errno.EINVAL),
        (b"\0", errno.EINVAL),
    ],
)
def test_bad_version_is_refused_and_a_good_one_may_follow(payload: bytes, code: int) -> None:
    device = PlainDevice()
    with served(device) as sock, VfioUserClient(sock, negotiate=False) as client:
        refused(code, lambda: client.call(Command.VERSION, payload))
        assert device.client is None
        client.negotiate()
        assert device.client is not None


def test_capabilities_answered_are_a_subset_of_those_proposed() -> None:
    with served(PlainDevice()) as sock, VfioUserClient(sock, negotiate=False) as client:
        answer = client.call(Command.VERSION, struct.pack("<HH", 0, 7))
        assert answer[:4] == bytes(4)
        assert b"write_multiple" not in answer


def test_nothing_goes_before_version_and_version_goes_once() -> None:
    with served(PlainDevice()) as sock, VfioUserClient(sock, negotiate=False) as client:
        refused(errno.EINVAL, client.reset)
        client.negotiate()
        refused(errno.EINVAL, client.negotiate)


def test_device_region_and_irq_info() -> None:
    device = PlainDevice(vectors=65)
    with connected(device) as client:
        info = client.call(Command.DEVICE_GET_INFO, deviceinfo.device_info_payload(0, 0, 0))
        assert deviceinfo.parse_device_info(memoryview(info)) == (3, 9, 5)
        assert [client.region_size(region) for region in range(9)] == [0x4000, 0, 0, 0, 0, 0, 0, 4096, 0]
        assert [client.irq_count(index) for index in range(5)] == [1, 0, 65, 0, 0]
        irq = [client.call(Command.DEVICE_GET_IRQ_INFO, deviceinfo.indexed_info_payload(i)) for i in (INTX, MSIX)]
        assert [deviceinfo.parse_indexed_info(memoryview(reply))[1] for reply in irq] == [7, 1]
        fds = client.call(Command.DEVICE_GET_REGION_IO_FDS, deviceinfo.indexed_info_payload(0))
        assert deviceinfo.parse_indexed_info(memoryview(fds)) == (0, 0, 0)


def test_an_area_of_a_region_can_be_mapped_where_the_device_says_so() -> None:
    with mappable() as (device, pages), connected(device) as client:
        assert client.region_size(BAR0_REGION) == len(device.bar)
        mapped = client.map_region(BAR0_REGION)
        assert mapped is not None
        offset, view = mapped
        assert (offset, len(view)) == (PAGE, PAGE)
        view[8:12] = b"ring"
        assert bytes(pages.view[8:12]) == b"ring"
        assert client.map_region(CONFIG_REGION) is None
        client.write(BAR0_REGION, PAGE, b"x")  # by message all the same


def test_a_client_without_room_for_the_area_learns_how_much_it_takes_and_gets_no_descriptor() -> None:
    with mappable() as (device, _), connected(device) as client:
        reply = client.call(Command.DEVICE_GET_REGION_INFO, deviceinfo.region_info_payload(0, argsz=63))
        assert len(reply) == 32
        info = deviceinfo.parse_region_info(memoryview(reply))
        assert (info.argsz, info.areas) == (64, ())
        assert info.flags == deviceinfo.REGION_READ | deviceinfo.REGION_WRITE | deviceinfo.REGION_MMAP
        assert client._fds == []
        client.call(Command.DEVICE_GET_REGION_INFO, deviceinfo.region_info_payload(0, argsz=64))
        assert len(client._fds) == 1  # closed with the client


def test_shared_pages_cannot_be_taken_away_from_under_the_server() -> None:
    pages = SharedPages(PAGE, PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(pages.fd, 0)
    pages.close()


@pytest.mark.parametrize(
    ("code", "payload"),
    [
        (Command.DEVICE_GET_REGION_INFO, deviceinfo.region_info_payload(9)),
        (Command.DEVICE_GET_IRQ_INFO, deviceinfo.indexed_info_payload(5)),
        (Command.DEVICE_GET_REGION_IO_FDS, deviceinfo.indexed_info_payload(9)),
        (Command.DEVICE_GET_INFO, bytes(16)),
        (Command.DEVICE_GET_INFO, b""),
        (Command.DMA_MAP, bytes(32)),
        (Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 1 << 63, (1 << 63) + 1)),
        (Command.DMA_MAP, struct.pack("<IIQQQ", 32, 4, 0, 0, 4096)),
        (Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, 0)),
        (Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 4096)),
        (Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 4, 0, 4096)),
        (Command.DEVICE_SET_IRQS, irqs(0x24, 5, 0, 1)),
        (Command.DEVICE_SET_IRQS, irqs(0x24, MSIX, 2**32 - 1, 2**32 - 1)),
        (Command.DEVICE_SET_IRQS, irqs(0x23, MSIX, 0, 1)),
        (Command.DEVICE_SET_IRQS, irqs(0x31, MSIX, 0, 1)),
        (Command.DEVICE_SET_IRQS, irqs(0x22, MSIX, 0, 4) + b"\1\1"),
        (Command.DEVICE_SET_IRQS, irqs(0x11, INTX, 0, 0)),
        (Command.REGION_READ, access(0, BAR0_REGION, 0)),
        (Command.REGION_READ, access(0, BAR0_REGION, 1 << 21)),
        (Command.REGION_READ, access(4095, CONFIG_REGION, 2)),
        (Command.REGION_READ, access(2**64 - 1, CONFIG_REGION, 2)),
        (Command.REGION_READ, access(0, 1, 4)),
        (Command.REGION_READ, access(0, 99, 4)),
        (Command.REGION_WRITE, access(0, BAR0_REGION, 4) + b"abc"),
        (Command.REGION_WRITE, access(0, BAR0_REGION, 4) + b"abcde"),
        (Command.REGION_WRITE, access(0x4000, BAR0_REGION, 4) + b"abcd"),
        (Command.REGION_WRITE_MULTI, struct.pack("<Q", 2) + bytes(24)),
        (Command.REGION_WRITE_MULTI, struct.pack("<QQII8x", 1, 0, BAR0_REGION, 9)),
    ],
)
def test_a_malformed_request_is_einval_and_the_connection_goes_on(code: Command, payload: bytes) -> None:
    with connected(PlainDevice()) as client:
        refused(errno.EINVAL, lambda: client.call(code, payload))
        assert client.config(0, 4) == bytes.fromhex("361b1000")


@pytest.mark.parametrize("code", [0, 11, 12, 14, 19, 0xFFFF])
def test_unknown_commands_are_enotsup(code: int) -> None:
    with connected(PlainDevice()) as client:
        refused(errno.ENOTSUP, lambda: client.call(code, bytes(16)))


def test_a_dirty_bitmap_is_enotsup() -> None:
    with connected(PlainDevice()) as client:
        payload = struct.pack("<IIQQ", 24, 1, 0, PAGE)
        refused(errno.ENOTSUP, lambda: client.call(Command.DMA_UNMAP, payload))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<HHIII", 1, 4, 15, 0, 0),
        struct.pack("<HHIII", 1, 4, 2**32 - 1, 0, 0),
        struct.pack("<HHIII", 1, 4, 16, 2, 0),
        struct.pack("<HHIII", 1, 11, 16, 1, 0),
        struct.pack("<HHIII", 1, 11, 16, 1, 0)[:9],
    ],
)
def test_a_stream_that_cannot_be_followed_is_closed(data: bytes) -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.send_raw(data)
        if len(data) < message.HEADER_SIZE:
            client.close()
        assert client.closed.wait(5)
        assert device.detached.wait(5)


def test_region_reads_and_writes() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.write(BAR0_REGION, 0x14, b"\1\0\0\0")
        client.write(BAR0_REGION, 0x1000, b"\2\0\0\0", posted=True)
        assert client.read(BAR0_REGION, 0x14, 4) == b"\1\0\0\0"
        assert device.bar[0x1000] == 2


@pytest.mark.parametrize("posted", [True, False])
def test_write_multi_writes_in_order(posted: bool) -> None:
    device = PlainDevice()
    with connected(device) as client:
        writes = [RegionAccess(0x1000, 0, 4, b"\1\0\0\0"), RegionAccess(0x1000, 0, 8, b"\2" * 8)]
        client.write_multi([*writes, RegionAccess(4, CONFIG_REGION, 2, b"\6\0")], posted)
        assert client.read(BAR0_REGION, 0x1000, 8) == b"\2" * 8
        assert client.config(4, 2) == b"\6\0"


def test_posted_writes_that_are_refused_get_no_reply_and_a_bounded_log(caplog: pytest.LogCaptureFixture) -> None:
    with connected(PlainDevice()) as client, caplog.at_level(logging.WARNING):
        for _ in range(50):
            client.write(BAR0_REGION, 1 << 40, b"x", posted=True)
        assert client.config(0, 2) == b"\x36\x1b"
        assert len(caplog.records) == 20


def test_a_defect_in_the_device_is_eio_and_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    device = PlainDevice()
    device.fails_with = RuntimeError("defect")
    with connected(device) as client:
        refused(errno.EIO, lambda: client.config(0, 4))
    assert "RuntimeError: defect" in caplog.text


def test_mapped_ram_is_the_devices_memory() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0x100000, PAGE)
        device.memory.write(0x100010, b"hello")
        assert bytes(ram.view[16:21]) == b"hello"
        refused(errno.EEXIST, lambda: client.map_ram(0x100000, PAGE))
        client.unmap(0x100000, PAGE)
        client.unmap(0x100000, PAGE)
        client.unmap_all()


def test_unmap_is_answered_when_the_last_transfer_is_finished() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE)
        transfer = device.memory.acquire([Segment(0, 8)], to_guest=True)
        unmapping = in_thread(lambda: client.unmap(0, PAGE))
        ask_until(client, lambda: not device.memory.ranges())
        assert unmapping.is_alive()
        transfer.finish()
        ended(unmapping)


def test_reset_is_answered_when_the_device_is_done() -> None:
    device = PlainDevice()
    device.holds_resets = True
    with connected(device) as client:
        resetting = in_thread(client.reset)
        ask_until(client, lambda: device.resets)
        assert resetting.is_alive()
        device.resets[0]()
        ended(resetting)


class Resettable(PlainDevice):
    """A write to offset 0 of BAR0 asks for a reset."""

    def write(self, region: int, offset: int, data: bytes) -> Reset | None:
        super().write(region, offset, data)
        return None if offset else self.reset


def test_a_batch_is_answered_when_the_last_reset_in_it_is_done() -> None:
    device = Resettable()
    device.holds_resets = True
    with connected(device) as client:
        writes = [RegionAccess(at, BAR0_REGION, 4, b"abcd") for at in (0, 8, 0, 16)]
        writing = in_thread(lambda: client.write_multi(writes, posted=False))
        ask_until(client, lambda: len(device.resets) >= 2)
        assert client.read(BAR0_REGION, 16, 4) == b"abcd"
        for done in device.resets:
            client.config(0, 2)
            assert writing.is_alive()
            done()
        ended(writing)
        device.holds_resets = False
        client.write_multi(writes, posted=False)
        assert len(device.resets) == 4


def test_a_batch_with_a_write_that_is_refused_changes_nothing() -> None:
    device = PlainDevice()
    with connected(device) as client:
        writes = [RegionAccess(0, BAR0_REGION, 4, b"abcd"), RegionAccess(1 << 40, BAR0_REGION, 4, b"abcd")]
        refused(errno.EINVAL, lambda: client.write_multi(writes, posted=False))
        assert client.read(BAR0_REGION, 0, 4) == bytes(4)


def unanswered_read(
    device: PlainDevice, client: VfioUserClient, size: int = 8
) -> tuple[Callable[[], None], threading.Thread, list[str]]:
    """Read guest memory at 0 by message, on a thread; the client has the message and does not answer.

    Returns what reads once more, the thread, and what the reads failed with.
    """
    client.answers_dma = False
    errors: list[str] = []

    read = noting(errors, lambda: device.memory.read(0, size))
    reading = in_thread(read)
    ask_until(client, lambda: client.unanswered)
    return read, reading, errors


def test_reset_fails_dma_by_message_that_the_client_cannot_answer_now() -> None:
    device = PlainDevice()
    device.holds_resets = True
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        read, reading, errors = unanswered_read(device, client)
        resetting = in_thread(client.reset)
        ended(reading)
        read()
        assert errors == ["the device is being reset"] * 2
        device.resets[0]()
        ended(resetting)
        client.answer_dma()  # late, and to nobody
        assert device.memory.read(0, 4) == bytes(4)


@pytest.mark.parametrize("length", [1, 4096, (3 << 20) + 5, 12 << 20])
def test_dma_by_message_is_cut_to_the_clients_maximum(length: int) -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, 16 << 20, shared=False)
        data = os.urandom(length)
        device.memory.write(PAGE, data)
        assert bytes(ram.view[PAGE : PAGE + length]) == data
        assert device.memory.read(PAGE, length) == data


def test_replies_that_may_pile_up_stay_below_qemus_socket_buffer() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, 1 << 20, shared=False)
        client.answers_dma = False
        reading = in_thread(lambda: device.memory.read(0, 1 << 20))
        ask_until(client, lambda: client.unanswered)
        client.config(0, 2)
        assert sum(message.parse_dma_access(memoryview(payload))[1] for _, payload in client.unanswered) <= 65536
        client.answer_dma()
        ended(reading)


@pytest.mark.parametrize("shared", [0, PAGE], ids=["all of it by message", "beside mapped memory"])
def test_an_unmap_is_answered_when_no_write_there_will_be_sent(shared: int) -> None:
    """A client in an unmap answers no message before that is done; what it has there then is to stay as it is."""
    device, failures = PlainDevice(), list[str]()
    with connected(device) as client:
        client.map_ram(shared, 400 * PAGE, shared=False)
        if shared:
            client.map_ram(0, shared)
        transfer = device.memory.acquire([Segment(2 * n * PAGE, 8) for n in range(150)], to_guest=True)
        client.answers_dma = False
        finishing = in_thread(noting(failures, transfer.finish))
        ask_until(client, lambda: client.unanswered)
        client.map_ram(1 << 30, PAGE, shared=False)
        client.unmap(1 << 30, PAGE)
        assert finishing.is_alive()
        client.unmap(100 * PAGE, 2 * PAGE)
        sent = len(client.unanswered)
        assert 0 < sent < 150
        ended(finishing)
        assert failures == ["the client has unmapped the memory"]
        client.config(0, 2)
        assert len(client.unanswered) == sent
        client.answer_dma()
        device.memory.write(PAGE, b"x")


def test_several_workers_have_dma_under_way_at_once() -> None:
    device = PlainDevice()
    with connected(device) as client:
        ram = client.map_ram(0, PAGE, shared=False)
        ram.view[:] = bytes(range(256)) * 16
        client.answers_dma = False
        read: dict[int, bytes] = {}
        workers = [in_thread(lambda i=i: read.update({i: device.memory.read(i, 1)})) for i in range(20)]  # type: ignore[misc]
        ask_until(client, lambda: len(client.unanswered) >= 20)
        client.unanswered.reverse()
        client.answer_dma()
        for worker in workers:
            ended(worker)
        assert {i: bytes([i]) for i in range(20)} == read


def test_dma_the_client_refuses_is_a_dma_error() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.call(Command.DMA_MAP, message.dma_map_payload(message.DmaMap(0, PAGE, 0, True, True)))
        with pytest.raises(DmaError, match=f"errno {errno.EFAULT}"):
            device.memory.read(0, 8)
        with pytest.raises(DmaError, match=f"errno {errno.EFAULT}"):
            device.memory.write(0, b"x")


def test_a_short_dma_answer_is_a_dma_error() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        _, reading, errors = unanswered_read(device, client, 64)
        client.send_raw(message.reply(client.unanswered[0][0], b"short"))
        ended(reading)
        assert errors == ["DMA_READ of 64 bytes answered with 0"]


def test_dma_on_the_control_thread_is_a_defect_that_is_caught(caplog: pytest.LogCaptureFixture) -> None:
    class Selfish(PlainDevice):
        def read(self, region: int, offset: int, count: int) -> bytes:
            return self.memory.read(0, count)

    device = Selfish()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        refused(errno.EIO, lambda: client.config(0, 4))
    assert "wait for itself" in caplog.text


def test_when_the_client_goes_waiting_dma_fails_and_all_is_released() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        client.map_ram(PAGE, PAGE)
        _, reading, errors = unanswered_read(device, client)
        client.close()
        ended(reading)
        assert errors == ["the vfio-user client is gone"]
        assert device.detached.wait(5)
        assert device.memory.ranges() == []


def test_msix_eventfds_arrive_and_fire() -> None:
    device = PlainDevice()
    with connected(device) as client:
        fds = [os.eventfd(0) for _ in range(3)]
        client.set_irqs(MSIX, 1, 3, EVENTFDS, fds)
        device.interrupts.signal(2)
        assert os.eventfd_read(fds[1]) == 1
        client.set_irqs(MSIX, 0, 4, message.SET_DATA_BOOL | message.SET_TRIGGER, fire=[False, True, False, False])
        assert os.eventfd_read(fds[0]) == 1
        client.set_irqs(MSIX, 1, 1, message.SET_DATA_NONE | message.SET_TRIGGER)
        assert os.eventfd_read(fds[0]) == 1
        client.set_irqs(MSIX, 2, 1, EVENTFDS)
        client.set_irqs(MSIX, 0, 0, message.SET_DATA_NONE | message.SET_TRIGGER)
        device.interrupts.signal(3)
        assert device.interrupts.pending == (3,)
        for fd in fds:
            os.close(fd)


def test_intx_is_unmasked_by_0x11() -> None:
    device = PlainDevice()
    with connected(device) as client:
        fd = os.eventfd(0)
        client.set_irqs(INTX, 0, 1, EVENTFDS, [fd])
        device.interrupts.set_level(True)
        assert os.eventfd_read(fd) == 1
        client.set_irqs(INTX, 0, 1, 0x11)
        assert os.eventfd_read(fd) == 1
        os.close(fd)


@pytest.mark.parametrize(
    ("code", "payload", "count"),
    [
        (Command.DMA_MAP, bytes(3), 1),
        (Command.DEVICE_SET_IRQS, irqs(0x24, MSIX, 0, 2), 1),
        (Command.DEVICE_SET_IRQS, irqs(0x24, MSIX, 0, 0), 1),
        (Command.DEVICE_SET_IRQS, irqs(0x21, MSIX, 0, 1), 1),
        (Command.DEVICE_SET_IRQS, irqs(0x0C, INTX, 0, 1), 1),
        (Command.VERSION, b"", 16),
        (99, b"", 40),
    ],
)
def test_descriptors_of_refused_messages_are_closed(code: int, payload: bytes, count: int) -> None:
    with connected(PlainDevice()) as client:
        fd = os.eventfd(0)
        with no_descriptor_left(), pytest.raises(ClientError):
            client.call(code, payload, [fd] * count)
        os.close(fd)


@pytest.mark.parametrize(
    ("code", "payload", "count"),
    [
        (Command.DEVICE_GET_INFO, deviceinfo.device_info_payload(0, 0, 0), 1),
        (Command.DMA_UNMAP, message.dma_unmap_payload(message.DmaUnmap(0, PAGE, False)), 1),
        (Command.DMA_MAP, message.dma_map_payload(message.DmaMap(PAGE, PAGE, 0, True, True)), 2),
        (Command.REGION_READ, message.region_access_payload(RegionAccess(0, CONFIG_REGION, 4)), 1),
        (Command.DEVICE_RESET, b"", 3),
    ],
)
def test_descriptors_that_a_message_need_not_carry_are_closed(code: int, payload: bytes, count: int) -> None:
    """As the protocol's own server library does. SPDK's client sends the memory's descriptor with DMA_UNMAP."""
    with connected(PlainDevice()) as client:
        client.map_ram(0, PAGE)
        ram = os.memfd_create("ram")
        os.ftruncate(ram, PAGE)
        read, write = os.pipe()
        client.call(code, payload, [ram if code is Command.DMA_MAP else write] + [write] * (count - 1))
        os.close(write)
        assert os.read(read, 1) == b""  # nobody has the other end
        for fd in (read, ram):
            os.close(fd)


@pytest.mark.parametrize(
    ("code", "payload"),
    [
        (Command.DMA_MAP, message.dma_map_payload(message.DmaMap(PAGE, PAGE, 0, True, True))),
        (Command.DEVICE_SET_IRQS, irqs(EVENTFDS, MSIX, 0, 1)),
        (Command.DMA_UNMAP, message.dma_unmap_payload(message.DmaUnmap(0, PAGE, False))),
    ],
)
def test_a_message_whose_descriptor_is_lost_is_refused_where_it_needs_it(code: Command, payload: bytes) -> None:
    """Memory would be reached by message for ever, an interrupt be taken away: the client must know."""
    device = PlainDevice()
    with connected(device) as client, open(os.devnull) as null:
        client.map_ram(0, PAGE)
        mapped = device.memory.ranges()
        with few_descriptors(0):
            if code is Command.DMA_UNMAP:
                client.call(code, payload, [null.fileno()])
                return
            refused(errno.EMFILE, lambda: client.call(code, payload, [null.fileno()]))
        assert device.memory.ranges() == mapped
        assert not device.interrupts.msix_enabled


def test_descriptors_with_a_payload_are_closed() -> None:
    with connected(PlainDevice()) as client, no_descriptor_left():
        fd = os.eventfd(0)
        payload = message.region_access_payload(RegionAccess(0, CONFIG_REGION, 4, b"\0\0\0\0"))
        data = message.command(1, Command.REGION_WRITE, payload, message.FLAG_NO_REPLY)
        client.send_raw(data[: message.HEADER_SIZE])
        client.send_raw(data[message.HEADER_SIZE :], [fd])
        client.config(0, 4)
        os.close(fd)


def test_messages_may_arrive_byte_by_byte() -> None:
    device = PlainDevice()
    with connected(device) as client:
        payload = message.region_access_payload(RegionAccess(0x1000, 0, 4, b"abcd"))
        for byte in message.command(1, Command.REGION_WRITE, payload, message.FLAG_NO_REPLY):
            client.send_raw(bytes([byte]))
        assert client.read(BAR0_REGION, 0x1000, 4) == b"abcd"


def test_a_reply_to_another_command_ends_the_client_and_whoever_waited_for_it() -> None:
    device = PlainDevice()
    with connected(device) as client:
        client.map_ram(0, PAGE, shared=False)
        _, reading, errors = unanswered_read(device, client)
        ((header, _),) = client.unanswered
        wrong = header._replace(command=Command.DMA_WRITE)
        client.send_raw(message.reply(wrong, message.dma_access_payload(0, 8)))
        ended(reading)
        assert errors == ["the vfio-user client is gone"]
        assert client.closed.wait(20)
