"""The data pointer: PRPs (Base 4.1.1) and SGLs (Base 4.1.2) resolved to segments of guest memory.

Whatever the guest builds, the work is bounded by the transfer's length: chained PRP lists must start on a page, so that
each gives at least a page of data, and SGLs have a maximum number of descriptors.
"""

from __future__ import annotations

from typing import Protocol

from nvmove.nvme.errors import CommandError
from nvmove.nvme.seams import Segment
from nvmove.nvme.spec import (
    PRP_SIZE,
    PSDT,
    SGL_DATA_BLOCK,
    SGL_DESCRIPTOR,
    SGL_LAST_SEGMENT,
    SGL_SEGMENT,
    SGL_SIZE,
    Status,
    field,
)

MAX_SGL_DESCRIPTORS = 8192
"""Across all segments of one command; a longer list (or a loop of segments) is refused."""

LOCATION = 24
"""Where in the SQE the data pointer is, for the Error Information log."""


class Reader(Protocol):
    """Guest memory, for lists and segments."""

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes; raise DmaError."""


class Described(Protocol):
    """A command that says where its data is."""

    flags: int
    dptr: bytes

    @property
    def is_admin(self) -> bool:
        """Whether it came through the admin queue, which has no SGLs."""


def resolve(command: Described, length: int, page_size: int, memory: Reader) -> list[Segment]:
    """Return the segments of `command`'s data, `length` bytes in order; raise CommandError, DmaError."""
    psdt = field(command.flags, PSDT)
    if psdt == 0:
        prp1 = int.from_bytes(command.dptr[:8], "little")
        prp2 = int.from_bytes(command.dptr[8:], "little")
        return _prps(prp1, prp2, length, page_size, memory)
    if psdt == 3 or command.is_admin:
        raise CommandError(Status.INVALID_FIELD)
    return _sgl(command.dptr, length, memory)


def _prps(prp1: int, prp2: int, length: int, page_size: int, memory: Reader) -> list[Segment]:
    if length == 0:
        return []
    offset = prp1 & (page_size - 1)
    if offset & 3:
        raise CommandError(Status.INVALID_PRP_OFFSET, location=LOCATION)
    first = min(length, page_size - offset)
    segments = [Segment(prp1, first)]
    rest = length - first
    if rest == 0:
        return segments
    if rest <= page_size:
        if prp2 & (page_size - 1):
            raise CommandError(Status.INVALID_PRP_OFFSET, location=LOCATION)
        return _append(segments, prp2, rest)
    if prp2 & (PRP_SIZE - 1):
        raise CommandError(Status.INVALID_PRP_OFFSET, location=LOCATION)
    pointer = prp2
    while True:
        room = (page_size - (pointer & (page_size - 1))) // PRP_SIZE
        wanted = -(-rest // page_size)
        chained = wanted > room
        count = room if chained else wanted
        entries = memoryview(memory.read(pointer, count * PRP_SIZE)).cast("Q")
        for entry in entries[: count - 1] if chained else entries:
            if entry & (page_size - 1):
                raise CommandError(Status.INVALID_PRP_OFFSET, location=LOCATION)
            _append(segments, entry, min(rest, page_size))
            rest -= min(rest, page_size)
        if not chained:
            return segments
        pointer = entries[-1]
        if pointer & (page_size - 1):
            raise CommandError(Status.INVALID_PRP_OFFSET, location=LOCATION)


def _append(segments: list[Segment], address: int, length: int) -> list[Segment]:
    """Add a run of memory, as part of the last one where it continues it."""
    last = segments[-1] if segments else None
    if last is not None and last.address + last.length == address:
        segments[-1] = Segment(last.address, last.length + length)
    elif length:
        segments.append(Segment(address, length))
    return segments


def _sgl(descriptor: bytes, length: int, memory: Reader) -> list[Segment]:
    """Resolve the SGL that begins with the one descriptor in the command."""
    segments: list[Segment] = []
    rest = length
    seen = 0
    descriptors = descriptor
    is_last = True
    while True:
        seen += len(descriptors) // SGL_SIZE
        if seen > MAX_SGL_DESCRIPTORS:
            raise CommandError(Status.INVALID_SGL_COUNT)
        following: tuple[int, int, int] | None = None
        entries = list(SGL_DESCRIPTOR.iter_unpack(descriptors))
        for index, (address, size, identifier) in enumerate(entries):
            kind, subtype = identifier >> 4, identifier & 0xF
            if subtype:
                raise CommandError(Status.SGL_TYPE_INVALID)
            if kind == SGL_DATA_BLOCK:
                if size > rest:
                    raise CommandError(Status.DATA_SGL_LENGTH_INVALID)
                _append(segments, address, size)
                rest -= size
            elif kind in {SGL_SEGMENT, SGL_LAST_SEGMENT}:
                if index != len(entries) - 1 or (is_last and descriptors is not descriptor):
                    raise CommandError(Status.INVALID_SGL_SEGMENT)
                following = address, size, kind
            else:  # bit buckets too: Identify's SGLS does not offer them
                raise CommandError(Status.SGL_TYPE_INVALID)
        if following is None:
            if not is_last:
                raise CommandError(Status.INVALID_SGL_SEGMENT)
            break
        address, size, kind = following
        if size == 0 or size % SGL_SIZE:
            raise CommandError(Status.INVALID_SGL_SEGMENT)
        if size // SGL_SIZE + seen > MAX_SGL_DESCRIPTORS:
            raise CommandError(Status.INVALID_SGL_COUNT)
        is_last = kind == SGL_LAST_SEGMENT
        descriptors = memory.read(address, size)
    if rest:
        raise CommandError(Status.DATA_SGL_LENGTH_INVALID)
    return segments
