"""QEMU's block layer as our back end: its NBD server on a private socket, one export a drive.

QEMU owns every image that is not a raw file; `allow-inactive` lets the export outlive a migration's hand-over.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from nvmove.block.backend import Backend
from nvmove.block.nbd import open_nbd
from nvmove.vm.runstate import Monitor


@dataclass(frozen=True, slots=True)
class Export:
    """One drive of QEMU's that nvmove serves."""

    drive: str
    """The drive's id: the export's name."""
    node: str
    """The block node, by its name or the drive's id."""
    writable: bool


async def open_exports(monitor: Monitor, socket: Path, exports: list[Export]) -> dict[str, Backend]:
    """Start QEMU's NBD server at `socket` and connect to an export for each drive; raise BackendError."""
    if not exports:
        return {}
    await monitor.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
    opened: dict[str, Backend] = {}
    try:
        for export in exports:
            await monitor.execute(
                "block-export-add",
                {
                    "type": "nbd",
                    "id": f"nvmove-{export.drive}",
                    "node-name": export.node,
                    "name": export.drive,
                    "writable": export.writable,
                    "allow-inactive": True,
                },
            )
            uri = f"nbd+unix:///{export.drive}?socket={socket}"
            opened[export.drive] = await asyncio.to_thread(open_nbd, uri)
    except BaseException:
        for backend in opened.values():
            backend.close()
        raise
    return opened
