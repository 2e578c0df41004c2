"""The vfio-user wire format, version 0.0: bytes to requests and replies to bytes. No sockets, no state.

Apart from this are what the peers say of themselves (vfio/version.py) and of the device (vfio/deviceinfo.py), and what
a migration takes (vfio/features.py).

Source: QEMU docs/interop/vfio-user.rst. All integers are in host order, which is little-endian wherever QEMU runs NVMe.
A request that is malformed raises `RequestError` with the errno of its error reply; a header after which nothing in the
stream can be trusted raises `StreamError`, and the connection must be closed.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec


class StreamError(Exception):
    """The byte stream cannot be followed any further: close the connection."""


class RequestError(Exception):
    """A request that is refused: `errno` goes into the error reply."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.errno = code


class Command(enum.IntEnum):
    """Message commands (vfio-user, Commands)."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


Buffer = bytes | bytearray | memoryview

# Header flags (vfio-user, Header).
TYPE_MASK = 0xF
TYPE_COMMAND = 0x0
TYPE_REPLY = 0x1
FLAG_NO_REPLY = 0x10
FLAG_ERROR = 0x20

MAX_MSG_FDS = 16
"""Descriptors in one message, both ways: QEMU refuses more in max_msg_fds, and needs no more."""
MAX_DATA_XFER_SIZE = 1 << 20
"""Data bytes in one message: the protocol's default."""
MAX_MESSAGE_SIZE = MAX_DATA_XFER_SIZE + 4096
"""A header that announces more ends the connection. 4096 is room for what precedes the data."""

_HEADER = struct.Struct("<HHIII")
HEADER_SIZE = _HEADER.size
_DMA_MAP = struct.Struct("<IIQQQ")
_DMA_UNMAP = struct.Struct("<IIQQ")
_IRQ_SET = struct.Struct("<IIIII")
_REGION_ACCESS = struct.Struct("<QII")
_WRITE_MULTI = struct.Struct("<Q")
_WRITE_ONE = struct.Struct("<QII8s")
_DMA_ACCESS = struct.Struct("<QQ")
DMA_ACCESS_SIZE = _DMA_ACCESS.size

# DMA_MAP and DMA_UNMAP flags.
_MAP_READABLE, _MAP_WRITABLE = 1, 2
_UNMAP_DIRTY_BITMAP, _UNMAP_ALL = 1, 2
# DEVICE_SET_IRQS flags (linux/vfio.h).
SET_DATA_NONE, SET_DATA_BOOL, SET_DATA_EVENTFD = 1, 2, 4
SET_MASK, SET_UNMASK, SET_TRIGGER = 8, 16, 32


class Header(NamedTuple):
    """What precedes every message; `size` counts these 16 bytes too."""

    id: int
    command: int
    size: int
    flags: int
    error: int = 0

    @property
    def is_reply(self) -> bool:
        """Whether the peer answers a command of ours."""
        return self.flags & TYPE_MASK == TYPE_REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether the sender waits for an answer: all but posted writes do."""
        return not self.flags & FLAG_NO_REPLY


def _can_be(size: int) -> bool:
    return HEADER_SIZE <= size <= MAX_MESSAGE_SIZE


def announced_size(data: Buffer) -> int | None:
    """Return how many bytes the message has that these 16 begin; None when that cannot be."""
    size = Header(*_HEADER.unpack(data)).size
    return size if _can_be(size) else None


def parse_header(data: Buffer) -> Header:
    """Decode 16 bytes; raise StreamError when what follows cannot be delimited."""
    header = Header(*_HEADER.unpack(data))
    if not _can_be(header.size):
        raise StreamError(f"message of {header.size} bytes")
    if header.flags & TYPE_MASK not in {TYPE_COMMAND, TYPE_REPLY}:
        raise StreamError(f"message type {header.flags & TYPE_MASK}")
    return header


def command(message_id: int, code: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """Encode a whole command message; `flags` may hold FLAG_NO_REPLY."""
    return _HEADER.pack(message_id, code, HEADER_SIZE + len(payload), flags, 0) + payload


def reply(header: Header, payload: bytes = b"") -> bytes:
    """Encode the successful reply to `header`."""
    return _HEADER.pack(header.id, header.command, HEADER_SIZE + len(payload), TYPE_REPLY, 0) + payload


def error_reply(header: Header, code: int) -> bytes:
    """Encode the error reply to `header`: a header alone."""
    return _HEADER.pack(header.id, header.command, HEADER_SIZE, TYPE_REPLY | FLAG_ERROR, code)


def unpack(layout: struct.Struct, payload: memoryview) -> tuple[Any, ...]:
    """Decode what a payload begins with; raise RequestError EINVAL when it is shorter than that."""
    if len(payload) < layout.size:
        raise RequestError(errno.EINVAL, f"payload of {len(payload)} bytes, expected at least {layout.size}")
    return layout.unpack_from(payload)


# DMA_MAP, DMA_UNMAP


class DmaMap(NamedTuple):
    """VFIO_USER_DMA_MAP: `size` bytes at guest address `address` are at `offset` of the message's descriptor."""

    address: int
    size: int
    offset: int
    readable: bool
    writable: bool


def parse_dma_map(payload: memoryview) -> DmaMap:
    """Decode; raise RequestError EINVAL for unknown flags and ranges that are empty or leave 64 bits."""
    _argsz, flags, offset, address, size = unpack(_DMA_MAP, payload)
    if not flags or flags & ~(_MAP_READABLE | _MAP_WRITABLE):
        raise RequestError(errno.EINVAL, f"DMA_MAP flags {flags:#x}")
    if not size or address + size > 1 << 64 or offset + size >= 1 << 63:
        raise RequestError(errno.EINVAL, f"DMA_MAP of {size:#x} bytes at {address:#x}, offset {offset:#x}")
    return DmaMap(address, size, offset, bool(flags & _MAP_READABLE), bool(flags & _MAP_WRITABLE))


def dma_map_payload(request: DmaMap) -> bytes:
    """Encode."""
    flags = (_MAP_READABLE if request.readable else 0) | (_MAP_WRITABLE if request.writable else 0)
    return _DMA_MAP.pack(_DMA_MAP.size, flags, request.offset, request.address, request.size)


class DmaUnmap(NamedTuple):
    """VFIO_USER_DMA_UNMAP. With `all`, address and size are 0."""

    address: int
    size: int
    all: bool


def parse_dma_unmap(payload: memoryview) -> DmaUnmap:
    """Decode; raise RequestError ENOTSUP for the dirty bitmap (we never offer it), EINVAL for what makes no sense."""
    _argsz, flags, address, size = unpack(_DMA_UNMAP, payload)
    if flags & _UNMAP_DIRTY_BITMAP:
        raise RequestError(errno.ENOTSUP, "DMA_UNMAP asks for a dirty bitmap")
    if flags & ~_UNMAP_ALL:
        raise RequestError(errno.EINVAL, f"DMA_UNMAP flags {flags:#x}")
    everything = bool(flags & _UNMAP_ALL)
    if everything != (size == 0) or (everything and address) or address + size > 1 << 64:
        raise RequestError(errno.EINVAL, f"DMA_UNMAP of {size:#x} bytes at {address:#x}, flags {flags:#x}")
    return DmaUnmap(address, size, everything)


def dma_unmap_payload(request: DmaUnmap) -> bytes:
    """Encode: the request, and the reply, which repeats it."""
    return _DMA_UNMAP.pack(_DMA_UNMAP.size, _UNMAP_ALL if request.all else 0, request.address, request.size)


# DEVICE_SET_IRQS


class IrqSet(msgspec.Struct, frozen=True):
    """VFIO_USER_DEVICE_SET_IRQS: one SET_DATA_* and one SET_* action in `flags`; `fire` is DATA_BOOL's array."""

    index: int
    start: int
    count: int
    flags: int
    fire: tuple[bool, ...] = ()


def parse_irq_set(payload: memoryview) -> IrqSet:
    """Decode; raise RequestError EINVAL when not exactly one data flag and one action are set, or data is missing."""
    _argsz, flags, index, start, count = unpack(_IRQ_SET, payload)
    data, action = flags & 0x07, flags & 0x38
    if flags & ~0x3F or data.bit_count() != 1 or action.bit_count() != 1:
        raise RequestError(errno.EINVAL, f"SET_IRQS flags {flags:#x}")
    booleans = payload[_IRQ_SET.size :]
    if data != SET_DATA_BOOL:
        return IrqSet(index, start, count, flags)
    if len(booleans) < count:
        raise RequestError(errno.EINVAL, f"SET_IRQS with {len(booleans)} booleans for {count} interrupts")
    return IrqSet(index, start, count, flags, tuple(byte != 0 for byte in booleans[:count]))


def irq_set_payload(request: IrqSet) -> bytes:
    """Encode."""
    booleans = bytes(request.fire)
    return (
        _IRQ_SET.pack(_IRQ_SET.size + len(booleans), request.flags, request.index, request.start, request.count)
        + booleans
    )


# REGION_READ, REGION_WRITE, REGION_WRITE_MULTI


class RegionAccess(msgspec.Struct, frozen=True):
    """`count` bytes at `offset` of region `region`; a write's data beside it."""

    offset: int
    region: int
    count: int
    data: bytes = b""


def parse_region_read(payload: memoryview) -> RegionAccess:
    """Decode; raise RequestError EINVAL for more than the negotiated size."""
    access = RegionAccess(*unpack(_REGION_ACCESS, payload))
    if access.count > MAX_DATA_XFER_SIZE:
        raise RequestError(errno.EINVAL, f"REGION_READ of {access.count} bytes")
    return access


def parse_region_write(payload: memoryview) -> RegionAccess:
    """Decode; raise RequestError EINVAL when count and data differ in size."""
    offset, region, count = unpack(_REGION_ACCESS, payload)
    data = bytes(payload[_REGION_ACCESS.size :])
    if len(data) != count:
        raise RequestError(errno.EINVAL, f"REGION_WRITE of {count} bytes with {len(data)} bytes of data")
    return RegionAccess(offset, region, count, data)


def region_access_payload(access: RegionAccess) -> bytes:
    """Encode requests and replies of both: the data follows where there is any."""
    return _REGION_ACCESS.pack(access.offset, access.region, access.count) + access.data


def parse_write_multi(payload: memoryview) -> Iterator[RegionAccess]:
    """Decode the posted writes that QEMU batches; each has room for 8 bytes. Raises RequestError before the first."""
    (count,) = unpack(_WRITE_MULTI, payload)
    entries = payload[_WRITE_MULTI.size :]
    if count * _WRITE_ONE.size != len(entries):
        raise RequestError(errno.EINVAL, f"REGION_WRITE_MULTI of {count} writes in {len(entries)} bytes")
    writes = [RegionAccess(*entry) for entry in _WRITE_ONE.iter_unpack(entries)]
    if any(write.count > len(write.data) for write in writes):
        raise RequestError(errno.EINVAL, "REGION_WRITE_MULTI with a write of more than 8 bytes")
    return (RegionAccess(write.offset, write.region, write.count, write.data[: write.count]) for write in writes)


def write_multi_payload(writes: list[RegionAccess]) -> bytes:
    """Encode; each write has at most 8 bytes."""
    return _WRITE_MULTI.pack(len(writes)) + b"".join(
        _WRITE_ONE.pack(write.offset, write.region, write.count, write.data) for write in writes
    )


# DMA_READ, DMA_WRITE (server to client)


def dma_access_payload(address: int, count: int, data: bytes | bytearray | memoryview = b"") -> bytes:
    """Encode requests and replies; `data` in a write's request and a read's reply."""
    return b"".join((_DMA_ACCESS.pack(address, count), data))


def parse_dma_access(payload: memoryview) -> tuple[int, int, memoryview]:
    """Decode (address, count, data)."""
    address, count = unpack(_DMA_ACCESS, payload)
    return address, count, payload[_DMA_ACCESS.size :]


def dma_command_parts(
    message_id: int, code: int, address: int, data: Buffer, count: int, flags: int = 0
) -> tuple[Buffer, Buffer]:
    """Encode a whole DMA_READ or DMA_WRITE command, in parts so that the data need not be copied twice.

    `flags` may hold FLAG_NO_REPLY.
    """
    size = HEADER_SIZE + DMA_ACCESS_SIZE + len(data)
    return _HEADER.pack(message_id, code, size, TYPE_COMMAND | flags, 0) + _DMA_ACCESS.pack(address, count), data
