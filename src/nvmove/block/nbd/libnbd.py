"""The part of libnbd that nbd.py uses, by ctypes (libnbd(3), 1.14 or later); loaded at first use.

ctypes.CDLL drops the GIL during each call. No completion callbacks are given: what has completed is asked for
(nbd_aio_peek_command_completed), so no C code ever calls into Python, and nothing needs to be kept alive for it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Mapping
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

from nvmove.block.backend import BackendError

# libnbd.h, and the types of NBD's proto.md
CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6
DIRECTION_READ = 1
DIRECTION_WRITE = 2
SIZE_MINIMUM = 0
SIZE_MAXIMUM = 2
TLS_DISABLE = 0
ALLOW_TRANSPORT_TCP = 1
ALLOW_TRANSPORT_UNIX = 2


class NbdError(Exception):
    """A call of libnbd failed: its message, and the errno (0 when it has none)."""

    def __init__(self, message: str, error: int) -> None:
        super().__init__(message)
        self.errno = error


class _Completion(ctypes.Structure):
    """nbd_completion_callback; all NULL: none."""

    _fields_ = (("callback", c_void_p), ("user_data", c_void_p), ("free", c_void_p))


_NO_CALLBACK = _Completion()

_SIGNATURES: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "nbd_create": (c_void_p, ()),
    "nbd_close": (None, (c_void_p,)),
    "nbd_get_error": (c_char_p, ()),
    "nbd_get_errno": (c_int, ()),
    "nbd_set_pread_initialize": (c_int, (c_void_p, c_bool)),
    "nbd_set_request_structured_replies": (c_int, (c_void_p, c_bool)),
    "nbd_set_uri_allow_transports": (c_int, (c_void_p, c_uint32)),
    "nbd_set_uri_allow_tls": (c_int, (c_void_p, c_int)),
    "nbd_aio_connect_uri": (c_int, (c_void_p, c_char_p)),
    "nbd_aio_disconnect": (c_int, (c_void_p, c_uint32)),
    "nbd_aio_is_ready": (c_int, (c_void_p,)),
    "nbd_aio_is_dead": (c_int, (c_void_p,)),
    "nbd_aio_is_closed": (c_int, (c_void_p,)),
    "nbd_aio_get_fd": (c_int, (c_void_p,)),
    "nbd_aio_get_direction": (c_uint, (c_void_p,)),
    "nbd_aio_notify_read": (c_int, (c_void_p,)),
    "nbd_aio_notify_write": (c_int, (c_void_p,)),
    "nbd_aio_pread": (c_int64, (c_void_p, c_void_p, c_size_t, c_uint64, _Completion, c_uint32)),
    "nbd_aio_pwrite": (c_int64, (c_void_p, c_void_p, c_size_t, c_uint64, _Completion, c_uint32)),
    "nbd_aio_flush": (c_int64, (c_void_p, _Completion, c_uint32)),
    "nbd_aio_zero": (c_int64, (c_void_p, c_uint64, c_uint64, _Completion, c_uint32)),
    "nbd_aio_trim": (c_int64, (c_void_p, c_uint64, c_uint64, _Completion, c_uint32)),
    "nbd_aio_peek_command_completed": (c_int64, (c_void_p,)),
    "nbd_aio_command_completed": (c_int, (c_void_p, c_uint64)),
    "nbd_get_size": (c_int64, (c_void_p,)),
    "nbd_get_block_size": (c_int64, (c_void_p, c_int)),
    "nbd_is_read_only": (c_int, (c_void_p,)),
    "nbd_can_fua": (c_int, (c_void_p,)),
    "nbd_can_flush": (c_int, (c_void_p,)),
    "nbd_can_zero": (c_int, (c_void_p,)),
    "nbd_can_trim": (c_int, (c_void_p,)),
    "nbd_can_multi_conn": (c_int, (c_void_p,)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Load libnbd; raises BackendError when this machine has none."""
    try:
        loaded = ctypes.CDLL("libnbd.so.0")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except OSError:
        raise BackendError("an NBD disk needs libnbd (apt-get install libnbd0)") from None
    except AttributeError as error:
        raise BackendError(f"an NBD disk needs libnbd 1.14 or later: {error}") from None
    return loaded


class Handle:
    """A struct nbd_handle. libnbd locks it: any thread may call, but nobody during or after `close`."""

    def __init__(self, *, simple: bool = False) -> None:
        """With `simple` the server is asked for nothing but simple replies, and requests have 32 bits for a length."""
        self._nbd = library()
        self._handle = self._nbd.nbd_create()
        if not self._handle:
            raise self._error()
        self._checked(self._nbd.nbd_set_pread_initialize(self._handle, False))
        self._checked(self._nbd.nbd_set_request_structured_replies(self._handle, not simple))
        transports = ALLOW_TRANSPORT_TCP | ALLOW_TRANSPORT_UNIX
        self._checked(self._nbd.nbd_set_uri_allow_transports(self._handle, transports))
        self._checked(self._nbd.nbd_set_uri_allow_tls(self._handle, TLS_DISABLE))

    def close(self) -> None:
        """Free the handle; commands under way are forgotten, and their memory is touched no more."""
        self._nbd.nbd_close(self._handle)

    def connect(self, uri: str) -> None:
        """Start to connect; raises NbdError."""
        self._checked(self._nbd.nbd_aio_connect_uri(self._handle, uri.encode()))

    def disconnect(self) -> None:
        """Start to take leave of the server; raises NbdError."""
        self._checked(self._nbd.nbd_aio_disconnect(self._handle, 0))

    @property
    def is_ready(self) -> bool:
        """Whether the handshake is over and commands can be sent."""
        return bool(self._nbd.nbd_aio_is_ready(self._handle) > 0)

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended, well or badly."""
        handle = self._handle
        return bool(self._nbd.nbd_aio_is_dead(handle) > 0 or self._nbd.nbd_aio_is_closed(handle) > 0)

    @property
    def fd(self) -> int:
        """The socket to poll; -1 when there is none."""
        return int(self._nbd.nbd_aio_get_fd(self._handle))

    @property
    def direction(self) -> int:
        """What the socket is to be polled for: DIRECTION_READ, DIRECTION_WRITE, both or neither."""
        return int(self._nbd.nbd_aio_get_direction(self._handle))

    def notify_read(self) -> None:
        """The socket can be read; raises NbdError."""
        self._checked(self._nbd.nbd_aio_notify_read(self._handle))

    def notify_write(self) -> None:
        """The socket can be written; raises NbdError."""
        self._checked(self._nbd.nbd_aio_notify_write(self._handle))

    def pread(self, address: int, length: int, offset: int) -> int:
        """Start a read into memory and return the command's cookie; raises NbdError, as the next four do."""
        return self._checked(self._nbd.nbd_aio_pread(self._handle, address, length, offset, _NO_CALLBACK, 0))

    def pwrite(self, address: int, length: int, offset: int, flags: int) -> int:
        """Start a write from memory."""
        return self._checked(self._nbd.nbd_aio_pwrite(self._handle, address, length, offset, _NO_CALLBACK, flags))

    def flush(self) -> int:
        """Start a flush."""
        return self._checked(self._nbd.nbd_aio_flush(self._handle, _NO_CALLBACK, 0))

    def zero(self, length: int, offset: int, flags: int) -> int:
        """Start to make a range zeroes."""
        return self._checked(self._nbd.nbd_aio_zero(self._handle, length, offset, _NO_CALLBACK, flags))

    def trim(self, length: int, offset: int) -> int:
        """Start to give a range back."""
        return self._checked(self._nbd.nbd_aio_trim(self._handle, length, offset, _NO_CALLBACK, 0))

    def completed(self) -> tuple[int, int] | None:
        """Retire a command that is over and return its cookie and errno, or None when there is none."""
        cookie = int(self._nbd.nbd_aio_peek_command_completed(self._handle))
        if cookie <= 0:  # none is over (0), or none is under way (-1)
            return None
        if self._nbd.nbd_aio_command_completed(self._handle, cookie) >= 0:
            return cookie, 0
        return cookie, int(self._nbd.nbd_get_errno()) or errno.EIO

    def size(self) -> int:
        """The export's size in bytes; raises NbdError."""
        return self._checked(self._nbd.nbd_get_size(self._handle))

    def block_size(self, which: int) -> int:
        """SIZE_MINIMUM or SIZE_MAXIMUM in bytes, 0 when the server does not say; raises NbdError."""
        return self._checked(self._nbd.nbd_get_block_size(self._handle, which))

    def can(self, what: str) -> bool:
        """Whether the export `is_read_only`, or `can_fua`, `can_flush`, `can_zero`, `can_trim`,
        `can_multi_conn`; raises NbdError."""
        return self._checked(getattr(self._nbd, f"nbd_{what}")(self._handle)) > 0

    def _checked(self, result: int) -> int:
        if result < 0:
            raise self._error()
        return int(result)

    def _error(self) -> NbdError:
        message = (self._nbd.nbd_get_error() or b"").decode(errors="replace")
        function, separator, rest = message.partition(": ")
        return NbdError(rest if separator and function.startswith("nbd_") else message, self._nbd.nbd_get_errno())
