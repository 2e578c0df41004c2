"""`-drive` and `-blockdev`: which of them nvmove opens itself (raw images and null disks), and with what options.

A drive is nvmove's only when every word of it is understood here; all others stay QEMU's, which knows them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from nvmove.block.config import CACHE_MODES, NULL_DRIVERS, NULL_OPTIONS, DriveConfig, OpenOptions
from nvmove.block.null import describe
from nvmove.options import syntax
from nvmove.options.nulls import null_config, null_drive
from nvmove.options.syntax import Option

DEFAULT_WERROR, DEFAULT_RERROR = "enospc", "report"
"""What `auto` means: QEMU's BlockBackend has these."""

_ACTIONS = ("report", "ignore", "enospc", "stop")
_BACKEND_ONLY = ("throttling.", "stats-", "bps", "iops", "group")
"""Options of QEMU's BlockBackend: its NBD export of the node would pass them by."""

_DRIVE_KEYS = frozenset(
    [
        "id",
        "if",
        "file",
        "file.filename",
        "file.driver",
        "file.locking",
        "format",
        "driver",
        "media",
        "index",
        "bus",
        "unit",
        "node-name",
        "readonly",
        "read-only",
        "auto-read-only",
        "cache",
        "cache.writeback",
        "cache.direct",
        "cache.no-flush",
        "discard",
        "detect-zeroes",
        "aio",
        "werror",
        "rerror",
        "snapshot",
    ]
)
_RAW_NODE_KEYS = frozenset(
    [
        "driver",
        "node-name",
        "read-only",
        "auto-read-only",
        "discard",
        "detect-zeroes",
        "cache.direct",
        "cache.no-flush",
        "file",
    ]
)
_FILE_NODE_KEYS = frozenset(
    [
        "driver",
        "node-name",
        "filename",
        "locking",
        "aio",
        "read-only",
        "auto-read-only",
        "discard",
        "detect-zeroes",
        "cache.direct",
        "cache.no-flush",
    ]
)
_NULL_NODE_KEYS = _FILE_NODE_KEYS - {"filename", "locking", "aio"} | set(NULL_OPTIONS)
_INHERITED = ("cache.direct", "cache.no-flush", "read-only", "auto-read-only")
_LOCAL = ("file", "host_device")


class Drive(msgspec.Struct, frozen=True, kw_only=True):
    """A drive that an nvme device uses."""

    config: DriveConfig
    in_qemu: bool
    """QEMU keeps it and exports it; else nvmove opens it."""
    option: Option
    nodes: tuple[str, ...] = ()
    """The node names that disappear from QEMU when nvmove opens it."""


def read_drive(option: Option, snapshot: bool, owner: str = "auto") -> Drive:
    """Read a `-drive`; with `snapshot` (QEMU's -snapshot) its changes are to be lost, which is QEMU's to do.

    `owner` is the device's image-owner. Raises OptionError.
    """
    werror, rerror = error_actions(option)
    for name in option.values:
        if name.startswith(_BACKEND_ONLY):
            raise option.error(f"{name} is not supported yet; use -object throttle-group and -blockdev driver=throttle")
    given = option
    null = null_drive(option)
    if null is not None:
        option = null.rest
    cdrom = option.get("media") == "cdrom"
    config = DriveConfig(
        id=option.get("id"),
        node_name=option.get("node-name"),
        file=option.get("file") or option.get("file.filename"),
        format=option.get("format") or option.get("driver") or None,
        options=_drive_options(option, cdrom),
        aio=_aio(option, "aio"),
        werror=werror,
        rerror=rerror,
        null=null.config if null is not None else None,
    )
    path = config.file if null is not None else _local_path(config.file, option.get("file.driver"))
    in_qemu = (
        snapshot
        or syntax.boolean(option, "snapshot", False)
        or config.format not in ("raw", *(() if null is None else NULL_DRIVERS))
        or path is None
        or not set(option.values) <= _DRIVE_KEYS
    )
    in_qemu = _in_qemu(given, in_qemu, owner)
    if path is not None and not in_qemu:
        config = msgspec.structs.replace(config, file=path)
    return Drive(config=config, in_qemu=in_qemu, option=given, nodes=(config.node_name,) if config.node_name else ())


def without_error_actions(option: Option) -> Option:
    """Return a `-drive` for QEMU: what nvmove does in its place is taken out."""
    return option.without("werror", "rerror")


def error_actions(option: Option) -> tuple[Any, Any]:
    """Return (werror, rerror), with `auto` resolved; raises OptionError, as QEMU does for `rerror=enospc`."""
    werror, rerror = option.get("werror", "auto"), option.get("rerror", "auto")
    if werror not in (*_ACTIONS, "auto"):
        raise option.error(f"'{werror}' invalid write error action")
    if rerror not in (*_ACTIONS, "auto") or rerror == "enospc":
        raise option.error(f"'{rerror}' invalid read error action")
    return resolve(werror, DEFAULT_WERROR), resolve(rerror, DEFAULT_RERROR)


def resolve(value: str, default: str) -> str:
    """Return an error action; `auto` is `default`."""
    return default if value == "auto" else value


def with_device_actions(config: DriveConfig, werror: str, rerror: str) -> DriveConfig:
    """Return a drive with the actions that its device says (`-device nvme,werror=…`): they win, `auto` says nothing."""
    given = {"werror": resolve(werror, config.werror), "rerror": resolve(rerror, config.rerror)}
    return msgspec.structs.replace(config, **given)


def read_blockdev(node: Option, nodes: Mapping[str, Option], shared: frozenset[str], owner: str = "auto") -> Drive:
    """Read a `-blockdev`; `nodes` are all of them by name, `shared` the names that something else refers to too.

    `owner` is the device's image-owner. Raises OptionError.
    """
    name = node.get("node-name")
    plain = _flat(node)
    protocol, below = plain, ""
    if plain.values.get("driver") == "raw":
        below = str(plain.values.get("file", ""))
        if below in nodes:
            protocol = _flat(nodes[below])
        elif not below:
            plain, protocol = _inline(plain)
            below = str(protocol.values.get("node-name", ""))
    driver = str(protocol.values.get("driver", ""))
    null = null_config(protocol) if driver in NULL_DRIVERS else None
    known_below = _FILE_NODE_KEYS if null is None else _NULL_NODE_KEYS
    known = _RAW_NODE_KEYS if plain.values.get("driver") == "raw" else known_below
    local = null is not None or (driver in _LOCAL and "filename" in protocol.values)
    in_qemu = (
        not local
        or not set(plain.values) <= known
        or not set(protocol.values) <= known_below
        or bool({name, below} & shared)
    )
    in_qemu = _in_qemu(node, in_qemu, owner)
    options = _node_options(plain, protocol)
    config = DriveConfig(
        node_name=name,
        file=describe(driver, null) if null is not None else str(protocol.values.get("filename", "")),
        format="raw" if local and null is None else str(plain.values.get("driver", "")) or None,
        options=options,
        null=null,
        aio="threads" if in_qemu else _aio(protocol, "aio"),
    )
    gone = (name, below) if below and not in_qemu else (name,)
    return Drive(config=config, in_qemu=in_qemu, option=node, nodes=gone)


def _in_qemu(drive: Option, needs_qemu: bool, owner: str) -> bool:
    if needs_qemu and owner == "nvmove":
        raise drive.error("image-owner=nvmove is for raw images whose options nvmove knows; this one needs QEMU")
    return needs_qemu or owner == "qemu"


def _inline(node: Option) -> tuple[Option, Option]:
    """Return a node and the one described within it (`file.…`), with the defaults that QEMU lets it inherit."""
    top = {key: value for key, value in node.values.items() if not key.startswith("file.")}
    below = {key.removeprefix("file."): value for key, value in node.values.items() if key.startswith("file.")}
    inherited = {key: top[key] for key in _INHERITED if key in top}
    return (
        Option(node.where, top, node.is_json),
        Option(node.where, {"discard": "unmap", **inherited, **below}, node.is_json),
    )


def _flat(option: Option) -> Option:
    return Option(option.where, syntax.flatten(option.values), option.is_json)


def _local_path(file: str, driver: str) -> str | None:
    """Return the path of a file on this machine, None for what only QEMU's protocols reach."""
    prefix, colon, rest = file.partition(":")
    if colon and "/" not in prefix:
        # QEMU takes what stands before the first colon as a protocol, unless a slash comes first
        return rest if prefix in _LOCAL and rest and driver in ("", *_LOCAL) else None
    return file if file and driver in ("", *_LOCAL) else None


def _drive_options(option: Option, cdrom: bool) -> OpenOptions:
    mode = option.get("cache", "writeback")
    if mode not in CACHE_MODES:
        raise option.error("invalid cache option")
    writeback, direct, no_flush = CACHE_MODES[mode]
    direct = syntax.boolean(option, "cache.direct", direct)
    if option.get("aio") == "native" and not direct:
        raise option.error("aio=native was specified, but it requires cache.direct=on, which was not specified.")
    read_only = "readonly" if "readonly" in option.values else "read-only"
    return OpenOptions(
        read_only=syntax.boolean(option, read_only, cdrom),
        auto_read_only=syntax.boolean(option, "auto-read-only", False),
        writeback=syntax.boolean(option, "cache.writeback", writeback),
        direct=direct,
        no_flush=syntax.boolean(option, "cache.no-flush", no_flush),
        discard=_discard(option),
        detect_zeroes=_detect_zeroes(option),
        locking=option.get("file.locking", "auto") != "off",
    )


def _node_options(top: Option, protocol: Option) -> OpenOptions:
    """Return the options of a node and its file: each node on the way to the disk has its say.

    A discard passes only when both let it; the file is opened as the file's own options say.
    """

    def switch(name: str) -> bool:
        return syntax.boolean(top, name, False) or syntax.boolean(protocol, name, False)

    zeroes = _detect_zeroes(top)
    return OpenOptions(
        read_only=switch("read-only"),
        auto_read_only=syntax.boolean(protocol, "auto-read-only", False),
        direct=syntax.boolean(protocol, "cache.direct", False),
        no_flush=switch("cache.no-flush"),
        discard="unmap" if _discard(top) == "unmap" and _discard(protocol) == "unmap" else "ignore",
        detect_zeroes=zeroes if zeroes != "off" else _detect_zeroes(protocol),
        locking=protocol.get("locking", "auto") != "off",
    )


def _discard(option: Option) -> Any:
    value = option.get("discard", "ignore")
    if value in ("ignore", "off"):
        return "ignore"
    if value in ("unmap", "on"):
        return "unmap"
    raise option.error("Invalid discard option")


def _detect_zeroes(option: Option) -> Any:
    value = option.get("detect-zeroes", "off")
    if value not in ("off", "on", "unmap"):
        raise option.error(f"invalid parameter value: {value}")
    return value


def _aio(option: Option, name: str) -> Any:
    value = option.get(name, "threads")
    if value not in ("threads", "native", "io_uring"):
        raise option.error("invalid aio option")
    return value
