"""Whatever a client sends, the server answers with an error or hangs up: it lives, and no descriptor is left."""

from __future__ import annotations

import gc
import logging
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmove.vfio import deviceinfo, message
from nvmove.vfio.client import VfioUserClient
from nvmove.vfio.message import Command
from nvmove.vfio.migration import Migration
from nvmove.vfio.version import parse_version, version_payload
from tests.vfio_peer import MovedState, PlainDevice, served

U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
EDGES = st.sampled_from([0, 1, 3, 4, 5, 7, 8, 15, 16, 24, 4095, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
NUMBER = st.one_of(EDGES, U32)
WIDE = st.one_of(EDGES, U64, st.sampled_from([1 << 63, (1 << 64) - 1, (1 << 64) - 4096]))
PAGES = st.sampled_from([0, 4096, 8192, 1 << 20, 1])
ACCESS = st.builds(struct.Struct("<QII").pack, WIDE, st.one_of(st.sampled_from([0, 7]), NUMBER), NUMBER)
WRITE = st.binary(max_size=64).flatmap(
    lambda data: st.builds(
        lambda at, region: struct.pack("<QII", at, region, len(data)) + data, EDGES, st.integers(0, 9)
    )
)
MAP = st.builds(struct.Struct("<IIQQQ").pack, NUMBER, st.integers(0, 4), st.one_of(PAGES, WIDE), PAGES, PAGES)
UNMAP = st.builds(struct.Struct("<IIQQ").pack, NUMBER, st.integers(0, 4), st.one_of(PAGES, WIDE), PAGES)
INFO = st.builds(struct.Struct("<IIIIQQ").pack, NUMBER, NUMBER, st.integers(0, 10), NUMBER, WIDE, WIDE)
IRQ_FLAGS = st.one_of(st.sampled_from([0x24, 0x24, 0x21, 0x22, 0x11, 0x12, 0x14, 0x09, 0x0C]), st.integers(0, 255))
IRQS = st.builds(
    lambda flags, index, start, count, data: struct.pack("<IIIII", 20, flags, index, start, count) + data,
    *(IRQ_FLAGS, st.integers(0, 5), st.one_of(st.integers(0, 4), U32), st.one_of(st.integers(0, 4), U32)),
    st.binary(max_size=9),
)
MULTI = st.builds(lambda count, data: struct.pack("<Q", count) + data, st.integers(0, 3), st.binary(max_size=72))
VERSION = st.builds(lambda a, b, text: struct.pack("<HH", a, b) + text, U16, U16, st.binary(max_size=60))
FEATURE = st.builds(
    lambda argsz, feature, method, data: struct.pack("<II", argsz, feature | method << 16) + data,
    *(st.one_of(st.just(1 << 20), NUMBER), st.integers(0, 9), st.integers(0, 7)),
    st.one_of(
        st.builds(struct.Struct("<Ii").pack, st.integers(0, 8), st.just(-1)),
        st.builds(struct.Struct("<QII").pack, PAGES, st.integers(0, 1), st.integers(0, 1)),
        st.builds(struct.Struct("<QIIQQ").pack, PAGES, st.just(1), st.just(0), WIDE, WIDE),
        st.builds(struct.Struct("<QQQ").pack, st.one_of(PAGES, WIDE), st.one_of(PAGES, WIDE), PAGES),
    ),
)
DATA = st.binary(max_size=40).flatmap(
    lambda data: st.builds(lambda argsz, size: struct.pack("<II", argsz, size) + data, NUMBER, st.just(len(data)))
)
BY_COMMAND: dict[int, st.SearchStrategy[bytes]] = {
    Command.VERSION: VERSION,
    Command.DMA_MAP: MAP,
    Command.DMA_UNMAP: UNMAP,
    Command.DEVICE_GET_INFO: INFO,
    Command.DEVICE_GET_REGION_INFO: INFO,
    Command.DEVICE_GET_REGION_IO_FDS: INFO,
    Command.DEVICE_GET_IRQ_INFO: INFO,
    Command.DEVICE_SET_IRQS: IRQS,
    Command.REGION_READ: ACCESS,
    Command.REGION_WRITE: WRITE,
    Command.REGION_WRITE_MULTI: MULTI,
    Command.DEVICE_RESET: st.just(b""),
    Command.DEVICE_FEATURE: FEATURE,
    Command.MIG_DATA_READ: DATA,
    Command.MIG_DATA_WRITE: DATA,
}
NOISE = st.binary(max_size=100)
PAYLOADS = st.one_of(NOISE, *BY_COMMAND.values())
FLAGS = st.sampled_from([0, 0, 0, message.FLAG_NO_REPLY])
SANE = st.sampled_from(list(BY_COMMAND)).flatmap(
    lambda code: st.tuples(st.tuples(U16, st.just(code), st.none(), FLAGS), BY_COMMAND[code], st.integers(0, 3))
)
HEADERS = st.tuples(
    U16,
    st.one_of(st.sampled_from(list(Command)), U16),
    st.one_of(st.just(None), NUMBER),
    st.one_of(st.sampled_from([0, 0, 0, message.FLAG_NO_REPLY, 1, 2, 0x21]), U32),
)
INSANE = st.tuples(HEADERS, PAYLOADS, st.integers(0, 3))
MESSAGES = st.lists(st.one_of(SANE, SANE, SANE, INSANE), max_size=12)


class Defects(logging.Handler):
    """What the server logged as its own fault."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage() + str(record.exc_info))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def encode(header: tuple[int, int, int | None, int], payload: bytes) -> bytes:
    message_id, code, size, flags = header
    return struct.pack("<HHIII", message_id, code, 16 + len(payload) if size is None else size, flags, 0) + payload


def drain(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(1 << 16):
        pass


@pytest.fixture(autouse=True, scope="module")
def nothing_is_about_to_be_freed() -> None:
    """Descriptors are counted here: those of earlier tests' garbage are not to go meanwhile."""
    gc.collect()


@settings(max_examples=300, deadline=None)
@given(messages=MESSAGES, negotiated=st.booleans())
def test_hostile_messages_end_in_an_error_or_a_closed_connection(
    messages: list[tuple[tuple[int, int, int | None, int], bytes, int]], negotiated: bool
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = PlainDevice()
    device.migration = Migration(MovedState(b""))
    defects = Defects()
    logging.getLogger("nvmove").addHandler(defects)
    fd = os.memfd_create("x")
    try:
        os.ftruncate(fd, 8192)
        with served(device) as sock:
            sock.settimeout(10)
            if negotiated:
                sock.sendall(message.command(0, Command.VERSION, version_payload(True)))
            try:
                for header, payload, count in messages:
                    socket.send_fds(sock, [encode(header, payload)], [fd] * count)
                drain(sock)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it hung up
    finally:
        device.migration.close()
        logging.getLogger("nvmove").removeHandler(defects)
        os.close(fd)
    assert defects.messages == []
    assert device.client is None
    assert device.memory.ranges() == []
    assert before == len(os.listdir("/proc/self/fd"))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_noise_never_stops_the_server(data: bytes) -> None:
    device = PlainDevice()
    with served(device) as sock:
        sock.settimeout(10)
        try:
            sock.sendall(data)
            drain(sock)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up
    with served(device) as sock, VfioUserClient(sock) as client:
        assert client.config(0, 2) == b"\x36\x1b"


@given(data=st.binary(min_size=16, max_size=16))
def test_a_header_is_parsed_or_refused(data: bytes) -> None:
    try:
        header = message.parse_header(data)
    except message.StreamError:
        return
    assert 16 <= header.size <= message.MAX_MESSAGE_SIZE


@pytest.mark.parametrize(
    "parse",
    [
        parse_version,
        message.parse_dma_map,
        message.parse_dma_unmap,
        deviceinfo.parse_device_info,
        deviceinfo.parse_region_info,
        deviceinfo.parse_indexed_info,
        message.parse_irq_set,
        message.parse_region_read,
        message.parse_region_write,
        message.parse_write_multi,
        message.parse_dma_access,
    ],
)
@given(payload=PAYLOADS)
def test_a_payload_is_parsed_or_refused(parse: object, payload: bytes) -> None:
    assert callable(parse)
    try:
        parse(memoryview(payload))
    except message.RequestError as error:
        assert error.errno
