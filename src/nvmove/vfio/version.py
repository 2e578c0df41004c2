"""VFIO_USER_VERSION: what the peers of a vfio-user connection say of themselves before anything else.

Source: QEMU docs/interop/vfio-user.rst, VFIO_USER_VERSION. The only message that is text: JSON after two numbers.
"""

from __future__ import annotations

import errno
import struct
from typing import Any, NamedTuple

import msgspec

from nvmove.vfio.message import MAX_DATA_XFER_SIZE, MAX_MSG_FDS, RequestError, unpack

PROTOCOL = (0, 0)
"""The version that is spoken, major and minor."""

_VERSION = struct.Struct("<HH")


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
    major, minor = unpack(_VERSION, payload)
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
