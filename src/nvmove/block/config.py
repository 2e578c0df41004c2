"""What a drive is configured with: QEMU's -drive options, typed; names, values and defaults are QEMU's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from nvmove.block.backend import BackendError

CACHE_MODES: Mapping[str, tuple[bool, bool, bool]] = {
    # cache=: cache.writeback, cache.direct, cache.no-flush (qemu-system-x86_64(1), -drive cache=)
    "writeback": (True, False, False),
    "none": (True, True, False),
    "off": (True, True, False),
    "writethrough": (False, False, False),
    "directsync": (False, True, False),
    "unsafe": (True, False, True),
}

_SWITCH = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}
_DISCARD: Mapping[str, Literal["ignore", "unmap"]] = {
    "ignore": "ignore",
    "off": "ignore",
    "unmap": "unmap",
    "on": "unmap",
}


class OpenOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an image is opened and used."""

    read_only: bool = False
    auto_read_only: bool = False
    """An image that cannot be opened for writing is opened read-only."""
    writeback: bool = True
    """Off: each write is on stable storage before it completes."""
    direct: bool = False
    """O_DIRECT: past the host's page cache."""
    no_flush: bool = False
    """Flushes do nothing."""
    discard: Literal["ignore", "unmap"] = "ignore"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    locking: bool = True
    """Image locks as QEMU's (off: file.locking=off)."""
    share_rw: bool = False
    """Others may write to the image meanwhile (the device's share-rw=on)."""

    @property
    def unmap(self) -> bool:
        """Whether the image's space may be given back."""
        return self.discard == "unmap"


NULL_DRIVERS = ("null-co", "null-aio")
NULL_OPTIONS = ("size", "read-zeroes", "latency-ns")


class NullConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A disk without content: the options of QEMU's null-co and null-aio, which are the same here."""

    size: int = 1 << 30
    read_zeroes: bool = False
    """Reads give zeroes; else they leave memory as it is."""
    latency_ns: int = 0
    """Nanoseconds before a request completes."""


class DriveConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`-drive`."""

    id: str = ""
    node_name: str = ""
    file: str
    format: str | None = None
    """None: not given; QEMU would guess it."""
    options: OpenOptions = OpenOptions()
    aio: Literal["threads", "native", "io_uring"] = "threads"
    """Taken as QEMU takes it; raw images are read and written in the queue's own thread whatever it says."""
    werror: Literal["report", "ignore", "enospc", "stop"] = "enospc"
    rerror: Literal["report", "ignore", "stop"] = "report"
    null: NullConfig | None = None
    """What is opened in place of `file`, which only names it then."""
    others: tuple[tuple[str, str], ...] = ()
    """Options that only QEMU's block layer has (throttling, a format's own, …), in order."""

    @classmethod
    def from_options(cls, given: Mapping[str, str]) -> DriveConfig:
        """Read the key=value pairs of a -drive option (escapes undone); raises BackendError with one line.

        `if=none` is the caller's to check, and dropped here.
        """
        return _Reader(given).drive()


class _Reader:
    """Takes the options one by one; what is left over is QEMU's alone."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._left = dict(given)
        self._left.pop("if", None)
        self._drive = given.get("id") or given.get("node-name") or given.get("file") or ""

    def drive(self) -> DriveConfig:
        file = self._text("file", "file.filename")
        if not file:
            raise self._error("needs file=PATH")
        options = self._open_options()
        aio = self._choice("aio", ("threads", "native", "io_uring"), "threads")
        if aio == "native" and not options.direct:
            raise self._error("aio=native needs cache=none or cache=directsync")
        raw_error_values = ("report", "ignore", "enospc", "stop", "auto")
        werror = self._choice("werror", raw_error_values, "enospc").replace("auto", "enospc")
        rerror = self._choice("rerror", tuple(v for v in raw_error_values if v != "enospc"), "report")
        return msgspec.convert(
            {
                "id": self._text("id"),
                "node_name": self._text("node-name"),
                "file": file,
                "format": self._text("format", "driver") or None,
                "options": options,
                "aio": aio,
                "werror": werror,
                "rerror": rerror.replace("auto", "report"),
                "others": tuple(self._left.items()),
            },
            DriveConfig,
        )

    def _open_options(self) -> OpenOptions:
        mode = self._choice("cache", tuple(CACHE_MODES), "writeback")
        writeback, direct, no_flush = CACHE_MODES[mode]
        discard = _DISCARD[self._choice("discard", tuple(_DISCARD), "ignore")]
        zeroes = self._choice("detect-zeroes", ("off", "on", "unmap"), "off")
        options = {
            "read_only": self._switch(("readonly", "read-only"), False),
            "auto_read_only": self._switch(("auto-read-only",), False),
            "writeback": self._switch(("cache.writeback",), writeback),
            "direct": self._switch(("cache.direct",), direct),
            "no_flush": self._switch(("cache.no-flush",), no_flush),
            "discard": discard,
            "detect_zeroes": zeroes,
            "locking": self._choice("file.locking", ("auto", "on", "off"), "auto") != "off",
        }
        return msgspec.convert(options, OpenOptions)

    def _text(self, *names: str) -> str:
        """Take the value of an option that has several names."""
        found = [self._left.pop(name) for name in names if name in self._left]
        if len(found) > 1:
            raise self._error(f"{names[0]} is given twice, also as {names[1]}")
        return found[0] if found else ""

    def _choice(self, name: str, values: tuple[str, ...], default: str) -> str:
        value = self._left.pop(name, default)
        if value not in values:
            raise self._error(f"{name}={value} is not one of {', '.join(values)}")
        return value

    def _switch(self, names: tuple[str, ...], default: bool) -> bool:
        value = self._text(*names)
        if not value:
            return default
        if value not in _SWITCH:
            raise self._error(f"{names[0]}={value} is neither on nor off")
        return _SWITCH[value]

    def _error(self, what: str) -> BackendError:
        return BackendError(f"drive '{self._drive}': {what}")
