"""detect-zeroes: a write of nothing but zeroes becomes a write-zeroes."""

from __future__ import annotations

from collections.abc import Sequence

from nvmove.block.backend import Operation, Request
from nvmove.block.config import OpenOptions

_PROBE = 64
"""Bytes looked at before a whole buffer is."""


def is_zero(buffers: Sequence[memoryview]) -> bool:
    """Tell whether `buffers` hold nothing but zero bytes."""
    if any(any(buffer[:_PROBE]) for buffer in buffers):
        return False
    return all(buffer.tobytes().count(0) == len(buffer) for buffer in buffers)


def detect_zeroes(request: Request, options: OpenOptions) -> Request:
    """Return the request to do for `request`: itself, or the write-zeroes it amounts to."""
    if options.detect_zeroes == "off" or request.operation is not Operation.WRITE or not is_zero(request.buffers):
        return request
    return Request(
        Operation.WRITE_ZEROES,
        request.done,
        request.offset,
        request.length,
        fua=request.fua,
        may_unmap=options.detect_zeroes == "unmap",
    )
