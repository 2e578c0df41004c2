"""VFIO_USER_DEVICE_FEATURE, MIG_DATA_READ and MIG_DATA_WRITE: wire format, and what each asks of the device.

Source: the vfio-user specification's chapters of these names, and linux/vfio.h, struct vfio_device_feature.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Callable

from nvmove.vfio.dirty import PAGE, DirtyLog, bitmap_size
from nvmove.vfio.message import MAX_DATA_XFER_SIZE, RequestError, unpack
from nvmove.vfio.migration import Migration, State

_FEATURE_HEADER = struct.Struct("<II")
FEATURE_HEADER_SIZE = _FEATURE_HEADER.size
_MIGRATION_FLAGS = struct.Struct("<Q")
_DEVICE_STATE = struct.Struct("<Ii")
_LOG_START = struct.Struct("<QII")
_LOG_RANGE = struct.Struct("<QQ")
_LOG_REPORT = struct.Struct("<QQQ")
_DATA = struct.Struct("<II")
DATA_HEADER_SIZE = _DATA.size

# Flags of DEVICE_FEATURE; the low 16 bits are the feature.
_FEATURE_MASK = 0xFFFF
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
# What VFIO_DEVICE_FEATURE_MIGRATION says is supported besides RUNNING and ERROR.
MIGRATION_STOP_COPY, MIGRATION_PRE_COPY = 1 << 0, 1 << 2


class Feature(enum.IntEnum):
    """Device features (linux/vfio.h)."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8


def device_feature(
    migration: Migration | None, payload: memoryview, later: Callable[[bytes], Callable[[int], None]]
) -> bytes | None:
    """Do a DEVICE_FEATURE; return the reply, or None: `later(reply)` returns what is called with its errno, 0 for none.

    Raises RequestError.

    A feature that is not there is ENOTTY, a method that it does not have EINVAL, as with VFIO.
    """
    argsz, flags = unpack(_FEATURE_HEADER, payload)
    number, methods = flags & _FEATURE_MASK, flags & (GET | SET)
    if flags & ~(_FEATURE_MASK | GET | SET | PROBE) or argsz < FEATURE_HEADER_SIZE:
        raise RequestError(errno.EINVAL, f"DEVICE_FEATURE flags {flags:#x}, argsz {argsz}")
    if migration is None or number not in set(Feature):
        raise RequestError(errno.ENOTTY, f"DEVICE_FEATURE {number} is not supported")
    feature = Feature(number)
    supported = GET * (feature in _GET) | SET * (feature in _SET)
    if methods & ~supported or (not flags & PROBE and methods not in {GET, SET}):
        raise RequestError(errno.EINVAL, f"DEVICE_FEATURE {feature.name}, flags {flags:#x}")
    if flags & PROBE:
        return bytes(payload)
    data = payload[FEATURE_HEADER_SIZE:]
    if methods == SET:
        _SET[feature](migration, data, lambda reply: later(feature_payload(feature, SET, reply)))
        return None
    reply = _GET[feature](migration, data)
    size = FEATURE_HEADER_SIZE + len(reply)
    if argsz < size:
        raise RequestError(errno.EINVAL, f"DEVICE_FEATURE {feature.name}: argsz {argsz}, the reply has {size} bytes")
    return feature_payload(feature, GET, reply)


Later = Callable[[bytes], Callable[[int], None]]
"""From a reply's data to what answers with it."""


def _set_state(migration: Migration, data: memoryview, later: Later) -> None:
    state, _fd = unpack(_DEVICE_STATE, data)
    if state not in set(State) - {State.ERROR}:
        raise RequestError(errno.EINVAL, f"MIG_DEVICE_STATE {state}")
    migration.set_state(State(state), later(bytes(data)))


def _migration(migration: Migration, data: memoryview) -> bytes:
    return _MIGRATION_FLAGS.pack(MIGRATION_STOP_COPY | MIGRATION_PRE_COPY)


def _get_state(migration: Migration, data: memoryview) -> bytes:
    return state_payload(migration.get_state())


def _log_start(migration: Migration, data: memoryview, later: Later) -> None:
    page_size, count, reserved = unpack(_LOG_START, data)
    ranges = data[_LOG_START.size :]
    if not _is_power_of_two(page_size) or reserved or len(ranges) != count * _LOG_RANGE.size:
        raise RequestError(errno.EINVAL, f"DMA_LOGGING_START: page size {page_size}, {count} ranges")
    logged = [_range(start, length) for start, length in _LOG_RANGE.iter_unpack(ranges)]
    migration.start_log(DirtyLog(logged), later(_LOG_START.pack(PAGE, count, 0) + bytes(ranges)))


def _log_stop(migration: Migration, data: memoryview, later: Later) -> None:
    migration.stop_log(later(bytes(data)))


def _log_report(migration: Migration, data: memoryview) -> bytes:
    start, length, page_size = unpack(_LOG_REPORT, data)
    if not _is_power_of_two(page_size) or start % page_size or bitmap_size(length, page_size) > MAX_DATA_XFER_SIZE:
        raise RequestError(errno.EINVAL, f"DMA_LOGGING_REPORT of {length:#x} at {start:#x}, page size {page_size}")
    _range(start, length)
    log = migration.dirty_log
    if log is None:
        raise RequestError(errno.EINVAL, "DMA_LOGGING_REPORT: it is not started")
    return _LOG_REPORT.pack(start, length, page_size) + log.report(start, length, page_size)


_GET: dict[Feature, Callable[[Migration, memoryview], bytes]] = {
    Feature.MIGRATION: _migration,
    Feature.MIG_DEVICE_STATE: _get_state,
    Feature.DMA_LOGGING_REPORT: _log_report,
}
_SET: dict[Feature, Callable[[Migration, memoryview, Later], None]] = {
    Feature.MIG_DEVICE_STATE: _set_state,
    Feature.DMA_LOGGING_START: _log_start,
    Feature.DMA_LOGGING_STOP: _log_stop,
}


def _range(start: int, length: int) -> range:
    if not length or start + length > 1 << 64:
        raise RequestError(errno.EINVAL, f"DMA logging of {length:#x} bytes at {start:#x}")
    return range(start, start + length)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def migration_read(migration: Migration | None, payload: memoryview) -> bytes:
    """Do a MIG_DATA_READ; return the reply. Raises RequestError."""
    argsz, size = unpack(_DATA, payload)
    if argsz < DATA_HEADER_SIZE or size > MAX_DATA_XFER_SIZE:
        raise RequestError(errno.EINVAL, f"MIG_DATA_READ of {size} bytes, argsz {argsz}")
    data = _required(migration).read(size)
    return _DATA.pack(DATA_HEADER_SIZE + len(data), len(data)) + data


def migration_write(migration: Migration | None, payload: memoryview) -> bytes:
    """Do a MIG_DATA_WRITE; return the reply. Raises RequestError."""
    argsz, size = unpack(_DATA, payload)
    data = payload[DATA_HEADER_SIZE:]
    if argsz < DATA_HEADER_SIZE or size != len(data) or size > MAX_DATA_XFER_SIZE:
        raise RequestError(errno.EINVAL, f"MIG_DATA_WRITE of {size} bytes with {len(data)}, argsz {argsz}")
    _required(migration).write(data)
    return b""


def _required(migration: Migration | None) -> Migration:
    if migration is None:
        raise RequestError(errno.ENOTSUP, "migration by the client is not supported")
    return migration


# The client's side, and what replies share with requests.


def feature_payload(feature: int, method: int, data: bytes = b"", room: int = 0) -> bytes:
    """Encode a DEVICE_FEATURE; `room` is how many bytes of data the reply may have, when more."""
    return _FEATURE_HEADER.pack(FEATURE_HEADER_SIZE + max(len(data), room), feature | method) + data


def state_payload(state: int) -> bytes:
    """Encode MIG_DEVICE_STATE's data; `data_fd` is not used."""
    return _DEVICE_STATE.pack(state, -1)


def log_start_payload(page_size: int, ranges: list[tuple[int, int]]) -> bytes:
    """Encode DMA_LOGGING_START's data; `ranges` are (address, length)."""
    return _LOG_START.pack(page_size, len(ranges), 0) + b"".join(_LOG_RANGE.pack(*one) for one in ranges)


def log_report_payload(start: int, length: int, page_size: int) -> bytes:
    """Encode DMA_LOGGING_REPORT's data in a request."""
    return _LOG_REPORT.pack(start, length, page_size)


def data_payload(size: int, data: bytes = b"") -> bytes:
    """Encode MIG_DATA_READ's request of `size` bytes, or MIG_DATA_WRITE's with its data."""
    return _DATA.pack(DATA_HEADER_SIZE + size, size) + data
