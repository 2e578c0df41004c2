"""The vfio-user wire format, version 0.0: bytes to requests and replies to bytes. No sockets, no state.

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
PROTOCOL = (0, 0)

_HEADER = struct.Struct("<HHIII")
HEADER_SIZE = _HEADER.size
_VERSION = struct.Struct("<HH")
_DMA_MAP = struct.Struct("<IIQQQ")
_DMA_UNMAP = struct.Struct("<IIQQ")
_DEVICE_INFO = struct.Struct("<IIII")
_REGION_INFO = struct.Struct("<IIIIQQ")
_SPARSE_MMAP = struct.Struct("<HHIII")
"""linux/vfio.h, vfio_region_info_cap_sparse_mmap: id, version, next, areas, reserved."""
_AREA = struct.Struct("<QQ")
_IRQ_INFO = struct.Struct("<IIII")
_IRQ_SET = struct.Struct("<IIIII")
_REGION_ACCESS = struct.Struct("<QII")
_WRITE_MULTI = struct.Struct("<Q")
_WRITE_ONE = struct.Struct("<QII8s")
_DMA_ACCESS = struct.Struct("<QQ")
DMA_ACCESS_SIZE = _DMA_ACCESS.size

# DMA_MAP and DMA_UNMAP flags.
_MAP_READABLE, _MAP_WRITABLE = 1, 2
_UNMAP_DIRTY_BITMAP, _UNMAP_ALL = 1, 2
# Flags of linux/vfio.h.
DEVICE_FLAGS_RESET, DEVICE_FLAGS_PCI = 1, 2
REGION_READ, REGION_WRITE, REGION_MMAP, REGION_CAPS = 1, 2, 4, 8
_CAP_SPARSE_MMAP = 1
IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED = 1, 2, 4
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


def _unpack(layout: struct.Struct, payload: memoryview) -> tuple[Any, ...]:
    if len(payload) < layout.size:
        raise RequestError(errno.EINVAL, f"payload of {len(payload)} bytes, expected at least {layout.size}")
    return layout.unpack_from(payload)


# VERSION


class _Capabilities(msgspec.Struct):
    """What a peer may say of itself; what we do not use is skipped by the decoder, as the protocol wants."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = MAX_DATA_XFER_SIZE
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    write_multiple: bool = False
    migration: dict[str, Any] | None = None


class _VersionData(msgspec.Struct):
    capabilities: _Capabilities = msgspec.field(default_factory=_Capabilities)


class Version(NamedTuple):
    """A proposal or an answer of VFIO_USER_VERSION."""

    major: int
    minor: int
    max_msg_fds: int
    max_data_xfer_size: int
    write_multiple: bool
    migration: bool = False


def parse_version(payload: memoryview) -> Version:
    """Decode a version message; raise RequestError EINVAL for text that is not the protocol's JSON."""
    major, minor = _unpack(_VERSION, payload)
    text = bytes(payload[_VERSION.size :])
    if text and not text.endswith(b"\0"):
        raise RequestError(errno.EINVAL, "version data without its terminating NUL")
    try:
        data = msgspec.json.decode(text.rstrip(b"\0") or b"{}", type=_VersionData)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(errno.EINVAL, f"version data: {error}") from error
    capabilities = data.capabilities
    if capabilities.max_data_xfer_size < 1 or capabilities.max_msg_fds < 0:
        raise RequestError(errno.EINVAL, "version data: a limit that allows nothing")
    return Version(
        major,
        minor,
        capabilities.max_msg_fds,
        capabilities.max_data_xfer_size,
        capabilities.write_multiple,
        capabilities.migration is not None,
    )


def version_payload(write_multiple: bool, migration: bool = False) -> bytes:
    """Encode our side of the negotiation. Capabilities must be a subset of the peer's, hence the parameters."""
    capabilities: dict[str, int | bool | dict[str, int]] = {
        "max_msg_fds": MAX_MSG_FDS,
        "max_data_xfer_size": MAX_DATA_XFER_SIZE,
        "pgsizes": 4096,
    }
    if write_multiple:
        capabilities["write_multiple"] = True
    if migration:
        capabilities["migration"] = {"pgsize": 4096}
    return _VERSION.pack(*PROTOCOL) + msgspec.json.encode({"capabilities": capabilities}) + b"\0"


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
    _argsz, flags, offset, address, size = _unpack(_DMA_MAP, payload)
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
    _argsz, flags, address, size = _unpack(_DMA_UNMAP, payload)
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


# DEVICE_GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO


def _checked_argsz(argsz: int, layout: struct.Struct) -> None:
    if argsz < layout.size:
        raise RequestError(errno.EINVAL, f"argsz {argsz}, expected at least {layout.size}")


def parse_device_info(payload: memoryview) -> tuple[int, int, int]:
    """Decode (flags, regions, irqs): all 0 in a request."""
    argsz, flags, regions, irqs = _unpack(_DEVICE_INFO, payload)
    _checked_argsz(argsz, _DEVICE_INFO)
    return flags, regions, irqs


def device_info_payload(flags: int, regions: int, irqs: int) -> bytes:
    """Encode the request (all 0) and the reply."""
    return _DEVICE_INFO.pack(_DEVICE_INFO.size, flags, regions, irqs)


class RegionReply(msgspec.Struct, frozen=True):
    """VFIO_USER_DEVICE_GET_REGION_INFO. In a request `argsz` is how much the client has room for, the rest is 0."""

    argsz: int
    flags: int
    index: int
    size: int
    areas: tuple[tuple[int, int], ...] = ()
    """Offset and size of what of the region may be mapped, at the same offsets of the message's descriptor."""


def parse_region_info(payload: memoryview) -> RegionReply:
    """Decode; of the capabilities the sparse mmap areas, where the message has them."""
    argsz, flags, index, cap_offset, size, _offset = _unpack(_REGION_INFO, payload)
    _checked_argsz(argsz, _REGION_INFO)
    areas: tuple[tuple[int, int], ...] = ()
    if flags & REGION_CAPS and _REGION_INFO.size <= cap_offset < len(payload):
        kind, _version, _next, count, _reserved = _unpack(_SPARSE_MMAP, payload[cap_offset:])
        data = payload[cap_offset + _SPARSE_MMAP.size :][: count * _AREA.size]
        if kind == _CAP_SPARSE_MMAP and len(data) == count * _AREA.size:
            areas = tuple(_AREA.iter_unpack(data))
    return RegionReply(argsz, flags, index, size, areas)


REGION_INFO_SIZE = _REGION_INFO.size
MAPPABLE_REGION_INFO_SIZE = _REGION_INFO.size + _SPARSE_MMAP.size + _AREA.size
"""The whole reply about a region of which one area may be mapped."""


def region_info_payload(
    index: int, flags: int = 0, size: int = 0, area: tuple[int, int] | None = None, argsz: int = REGION_INFO_SIZE
) -> bytes:
    """Encode the request and the reply.

    A region with a mappable `area` takes more than the structure: it comes whole to a client that has room for it in
    `argsz`. To others the reply says how much it takes.
    """
    if area is None:
        return _REGION_INFO.pack(argsz, flags, index, 0, size, 0)
    flags |= REGION_MMAP
    if argsz < MAPPABLE_REGION_INFO_SIZE:
        return _REGION_INFO.pack(MAPPABLE_REGION_INFO_SIZE, flags, index, 0, size, 0)
    head = _REGION_INFO.pack(MAPPABLE_REGION_INFO_SIZE, flags | REGION_CAPS, index, _REGION_INFO.size, size, 0)
    return head + _SPARSE_MMAP.pack(_CAP_SPARSE_MMAP, 1, 0, 1, 0) + _AREA.pack(*area)


def parse_indexed_info(payload: memoryview) -> tuple[int, int, int]:
    """Decode (index, flags, count) of GET_IRQ_INFO and of GET_REGION_IO_FDS, whose head is the same."""
    argsz, flags, index, count = _unpack(_IRQ_INFO, payload)
    _checked_argsz(argsz, _IRQ_INFO)
    return index, flags, count


def indexed_info_payload(index: int, flags: int = 0, count: int = 0) -> bytes:
    """Encode GET_IRQ_INFO and GET_REGION_IO_FDS, requests and replies."""
    return _IRQ_INFO.pack(_IRQ_INFO.size, flags, index, count)


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
    _argsz, flags, index, start, count = _unpack(_IRQ_SET, payload)
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
    access = RegionAccess(*_unpack(_REGION_ACCESS, payload))
    if access.count > MAX_DATA_XFER_SIZE:
        raise RequestError(errno.EINVAL, f"REGION_READ of {access.count} bytes")
    return access


def parse_region_write(payload: memoryview) -> RegionAccess:
    """Decode; raise RequestError EINVAL when count and data differ in size."""
    offset, region, count = _unpack(_REGION_ACCESS, payload)
    data = bytes(payload[_REGION_ACCESS.size :])
    if len(data) != count:
        raise RequestError(errno.EINVAL, f"REGION_WRITE of {count} bytes with {len(data)} bytes of data")
    return RegionAccess(offset, region, count, data)


def region_access_payload(access: RegionAccess) -> bytes:
    """Encode requests and replies of both: the data follows where there is any."""
    return _REGION_ACCESS.pack(access.offset, access.region, access.count) + access.data


def parse_write_multi(payload: memoryview) -> Iterator[RegionAccess]:
    """Decode the posted writes that QEMU batches; each has room for 8 bytes. Raises RequestError before the first."""
    (count,) = _unpack(_WRITE_MULTI, payload)
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
    address, count = _unpack(_DMA_ACCESS, payload)
    return address, count, payload[_DMA_ACCESS.size :]


def dma_command_parts(
    message_id: int, code: int, address: int, data: Buffer, count: int, flags: int = 0
) -> tuple[Buffer, Buffer]:
    """Encode a whole DMA_READ or DMA_WRITE command, in parts so that the data need not be copied twice.

    `flags` may hold FLAG_NO_REPLY.
    """
    size = HEADER_SIZE + DMA_ACCESS_SIZE + len(data)
    return _HEADER.pack(message_id, code, size, TYPE_COMMAND | flags, 0) + _DMA_ACCESS.pack(address, count), data
