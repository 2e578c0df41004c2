"""What a device says of itself: VFIO_USER_DEVICE_GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS and GET_IRQ_INFO.

Source: QEMU docs/interop/vfio-user.rst, and linux/vfio.h for the structures and flags that these messages carry. Each
has its size, `argsz`, in front. What is malformed raises RequestError with EINVAL.
"""

from __future__ import annotations

import errno
import struct

import msgspec

from nvmove.vfio.message import RequestError, unpack

_DEVICE_INFO = struct.Struct("<IIII")
_REGION_INFO = struct.Struct("<IIIIQQ")
_SPARSE_MMAP = struct.Struct("<HHIII")
"""linux/vfio.h, vfio_region_info_cap_sparse_mmap: id, version, next, areas, reserved."""
_AREA = struct.Struct("<QQ")
_IRQ_INFO = struct.Struct("<IIII")
REGION_INFO_SIZE = _REGION_INFO.size
MAPPABLE_REGION_INFO_SIZE = _REGION_INFO.size + _SPARSE_MMAP.size + _AREA.size
"""The whole reply about a region of which one area may be mapped."""

# Flags of linux/vfio.h.
DEVICE_FLAGS_RESET, DEVICE_FLAGS_PCI = 1, 2
REGION_READ, REGION_WRITE, REGION_MMAP, REGION_CAPS = 1, 2, 4, 8
_CAP_SPARSE_MMAP = 1
IRQ_EVENTFD, IRQ_MASKABLE, IRQ_AUTOMASKED = 1, 2, 4


def _checked_argsz(argsz: int, layout: struct.Struct) -> None:
    if argsz < layout.size:
        raise RequestError(errno.EINVAL, f"argsz {argsz}, expected at least {layout.size}")


def parse_device_info(payload: memoryview) -> tuple[int, int, int]:
    """Decode (flags, regions, irqs): all 0 in a request."""
    argsz, flags, regions, irqs = unpack(_DEVICE_INFO, payload)
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
    argsz, flags, index, cap_offset, size, _offset = unpack(_REGION_INFO, payload)
    _checked_argsz(argsz, _REGION_INFO)
    areas: tuple[tuple[int, int], ...] = ()
    if flags & REGION_CAPS and _REGION_INFO.size <= cap_offset < len(payload):
        kind, _version, _next, count, _reserved = unpack(_SPARSE_MMAP, payload[cap_offset:])
        data = payload[cap_offset + _SPARSE_MMAP.size :][: count * _AREA.size]
        if kind == _CAP_SPARSE_MMAP and len(data) == count * _AREA.size:
            areas = tuple(_AREA.iter_unpack(data))
    return RegionReply(argsz, flags, index, size, areas)


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
    argsz, flags, index, count = unpack(_IRQ_INFO, payload)
    _checked_argsz(argsz, _IRQ_INFO)
    return index, flags, count


def indexed_info_payload(index: int, flags: int = 0, count: int = 0) -> bytes:
    """Encode GET_IRQ_INFO and GET_REGION_IO_FDS, requests and replies."""
    return _IRQ_INFO.pack(_IRQ_INFO.size, flags, index, count)
