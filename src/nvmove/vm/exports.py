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

    @property
    def id(self) -> str:
        """The export's id in QEMU."""
        return f"nvmove-{self.drive}"


async def add_export(monitor: Monitor, export: Export) -> None:
    """Make QEMU's NBD server, which runs, offer `export`."""
    await monitor.execute(
        "block-export-add",
        {
            "type": "nbd",
            "id": export.id,
            "node-name": export.node,
            "name": export.drive,
            "writable": export.writable,
            "allow-inactive": True,
        },
    )


async def remove_export(monitor: Monitor, export: Export) -> None:
    """Take `export` away, and its client's connection; on return QEMU's node is free of it."""
    await monitor.execute("block-export-del", {"id": export.id, "mode": "hard"})
    while any(found["id"] == export.id for found in await monitor.execute("query-block-exports")):
        await asyncio.sleep(0.01)  # it goes when its client is gone


async def open_exports(monitor: Monitor, socket: Path, exports: list[Export]) -> dict[str, Backend]:
    """Start QEMU's NBD server at `socket` and connect to an export for each drive; raise BackendError."""
    if not exports:
        return {}
    await monitor.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
    opened: dict[str, Backend] = {}
    try:
        for export in exports:
            await add_export(monitor, export)
            uri = f"nbd+unix:///{export.drive}?socket={socket}"
            opened[export.drive] = await asyncio.to_thread(open_nbd, uri)
    except BaseException:
        for backend in opened.values():
            backend.close()
        raise
    return opened
