"""`query-block` and `info block` for the disks of nvmove devices: what QEMU would say were the devices its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvmove.block.backend import Backend
from nvmove.block.config import DriveConfig
from nvmove.nvme.counters import Counters
from nvmove.vm.disks.iostatus import IoStatus
from nvmove.vm.moves.machinestate import OK


@dataclass(frozen=True, slots=True)
class ServedDrive:
    """A drive that an nvmove device uses."""

    name: str
    """The -drive's id; empty for a -blockdev."""
    node: str
    """Its block node's name."""
    qdev: str
    """The device's id in QEMU."""
    config: DriveConfig
    backend: Backend
    in_qemu: bool
    """Whether the image is QEMU's (and exported to us) or opened by nvmove itself."""
    io: IoStatus = field(default_factory=IoStatus)
    counters: Callable[[], Counters] = Counters
    """What was asked of it since the VM exists."""
    export: str = ""
    """Where it is QEMU's: the id of its export to us."""

    @property
    def label(self) -> str:
        """What HMP calls it."""
        return self.name or self.node


def _io_status(drive: ServedDrive) -> dict[str, str]:
    return {"io-status": drive.io.value} if drive.io.is_shown else {}


def _io_status_lines(info: Mapping[str, Any]) -> list[str]:
    status = info.get("io-status", OK)
    return [f"    I/O status:       {status}"] if status != OK else []


def _limits(drive: ServedDrive) -> dict[str, int]:
    alignment = drive.backend.request_alignment
    return {
        "request-alignment": alignment,
        "min-mem-alignment": alignment,
        "opt-mem-alignment": 4096,
        "max-iov": 1024,
    }


def _actual_size(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:  # the path is gone while the image is open: it has no size to show
        return 0


def entry(drive: ServedDrive) -> dict[str, Any]:
    """Return the BlockInfo (QEMU's QAPI) of a drive that nvmove opened itself."""
    options = drive.config.options
    path = drive.config.file
    driver = drive.config.format or "raw"
    return {
        **_io_status(drive),
        "device": drive.name,
        "locked": False,
        "removable": False,
        "inserted": {
            "iops_rd": 0,
            "detect_zeroes": options.detect_zeroes,
            "active": True,
            "image": {
                "limits": _limits(drive),
                "virtual-size": drive.backend.size,
                "filename": path,
                "format": driver,
                "actual-size": _actual_size(path),
                "dirty-flag": False,
            },
            "iops_wr": 0,
            "ro": drive.backend.read_only,
            "children": [],
            "node-name": drive.node,
            "backing_file_depth": 0,
            "drv": driver,
            "iops": 0,
            "bps_wr": 0,
            "write_threshold": 0,
            "encrypted": False,
            "bps": 0,
            "bps_rd": 0,
            "cache": {"no-flush": options.no_flush, "direct": options.direct, "writeback": options.writeback},
            "file": path,
        },
        "qdev": drive.qdev,
        "type": "unknown",
    }


def unnamed(drives: Sequence[ServedDrive]) -> list[ServedDrive]:
    """Return the drives that QEMU shows to nobody: nodes of -blockdev, which no device of its own uses."""
    return [drive for drive in drives if drive.in_qemu and not drive.name]


def complete(
    answer: list[dict[str, Any]], drives: Sequence[ServedDrive], nodes: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return QEMU's answer to `query-block` with our devices' drives in it.

    `nodes` are the BlockDeviceInfos (QEMU's QAPI) of those that are `unnamed`, by their exports.
    """
    exported = {name: drive for drive in drives if drive.in_qemu for name in (drive.name, drive.node) if name}
    result = []
    for info in answer:
        node = info.get("inserted", {}).get("node-name", "")
        drive = exported.get(info["device"]) or exported.get(node)
        if drive is None:
            result.append(info)
        else:
            kept = {key: value for key, value in info.items() if key != "tray_open"}
            result.append({**_io_status(drive), **kept, "removable": False, "qdev": drive.qdev})
    for drive in drives:
        if not drive.in_qemu:
            result.append(entry(drive))
        elif nodes and drive.export in nodes:
            found = {"device": "", "locked": False, "removable": False, "inserted": nodes[drive.export]}
            result.append({**_io_status(drive), **found, "qdev": drive.qdev, "type": "unknown"})
    return result


def _cache_mode(cache: dict[str, bool]) -> str:
    mode = "writeback" if cache["writeback"] else "writethrough"
    return mode + (", direct" if cache["direct"] else "") + (", ignore flushes" if cache["no-flush"] else "")


def _size(count: int) -> str:
    """Return a size as QEMU's tools print it."""
    value, unit = float(count), 0
    while value >= 1000 and unit < 6:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[unit]}"


def paragraph(info: dict[str, Any], verbose: bool) -> list[str]:
    """Return the lines of HMP `info block` for one BlockInfo that has an image."""
    inserted = info["inserted"]
    name, node = info["device"], inserted["node-name"]
    title = f"{name} ({node})" if name and node else name or node
    kind = (
        inserted["drv"] + (", read-only" if inserted["ro"] else "") + (", encrypted" if inserted["encrypted"] else "")
    )
    lines = [f"{title}: {inserted['file']} ({kind})", f"    Attached to:      {info['qdev']}"]
    lines += _io_status_lines(info)
    lines.append(f"    Cache mode:       {_cache_mode(inserted['cache'])}")
    if inserted["detect_zeroes"] != "off":
        lines.append(f"    Detect zeroes:    {inserted['detect_zeroes']}")
    if verbose:
        image = inserted["image"]
        lines += [
            "",
            "Images:",
            f"image: {image['filename']}",
            f"file format: {image['format']}",
            f"virtual size: {_size(image['virtual-size'])} ({image['virtual-size']} bytes)",
            f"disk size: {_size(image['actual-size'])}",
            "Block limits:",
            *(f"    {key.replace('-', ' ')}: {value}" for key, value in image["limits"].items()),
        ]
    return lines


def attach(text: str, drive: ServedDrive) -> str:
    """Return QEMU's output of HMP `info block NODE` with the device that uses the node."""
    title, *lines = text.strip("\r\n").splitlines()
    return "\r\n".join([title, f"    Attached to:      {drive.qdev}", *_io_status_lines(_io_status(drive)), *lines, ""])


def complete_text(text: str, drives: Sequence[ServedDrive], only: str | None, verbose: bool) -> str:
    """Return QEMU's output of HMP `info block` with our devices' drives in it.

    `only` is the drive that was asked for, if one was.
    """
    attached = {}
    for drive in drives:
        if drive.in_qemu:
            attached[drive.label] = drive
    lines = []
    shown: ServedDrive | None = None
    for line in text.splitlines():
        if line and not line.startswith(" "):
            shown = attached.get(line.partition(":")[0].partition(" (")[0])
        if shown is not None and line.startswith("    Removable device:"):
            lines += [f"    Attached to:      {shown.qdev}", *_io_status_lines(_io_status(shown))]
        else:
            lines.append(line)
    for drive in drives:
        if not drive.in_qemu and only in {None, drive.name, drive.node}:
            lines += ([""] if lines else []) + paragraph(entry(drive), verbose)
    return "\r\n".join(lines) + "\r\n"
