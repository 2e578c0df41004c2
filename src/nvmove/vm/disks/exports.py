"""QEMU's block layer as our back end: its NBD server on a private socket, one export a drive.

QEMU owns every image that is not a raw file; `allow-inactive` lets the export outlive a migration's hand-over.
The user's own exports lie in the same server (vm/disks/nbdserver.py), so ours have names that nobody guesses.

Each export, and its node with it, has an iothread of its own: QEMU's main loop waits for the device (in a reset, in an
unmap), and the device for the disk, which must not need that loop then. It does not poll, as QEMU's own do for 32 µs by
default: the device's loop and the guest need the processors more (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from nvmove.block.backend import Backend
from nvmove.block.config import OpenOptions
from nvmove.block.nbd.backend import open_nbd
from nvmove.vm.monitor.facade import Monitor, QmpError

log = logging.getLogger(__name__)

REMOVE_SECONDS = 10.0
"""How long QEMU may take to end an export's connections."""


def _name() -> str:
    return f"nvmove-{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class Export:
    """One drive of QEMU's that nvmove serves."""

    drive: str
    """NamespaceConfig.drive."""
    node: str
    """The block node when the export is made: a snapshot or a job may put another one in its place."""
    writable: bool
    name: str = field(default_factory=_name)
    """The name at QEMU's NBD server; QEMU's id of the export, too."""
    iothread: str = ""
    """QEMU's id of the thread that serves it; none: QEMU's main loop."""


async def add_export(monitor: Monitor, export: Export, node: str | None = None) -> None:
    """Make QEMU's NBD server, which runs, offer `export`, on another node when one is given.

    The node is to stay in the export's thread: a block job that may move it back to the main loop for its own sake
    does, and fails an assertion of QEMU's (11.1.3). Where something else keeps it in another thread, it stays there.
    """
    arguments = {
        "type": "nbd",
        "id": export.name,
        "node-name": node or export.node,
        "name": export.name,
        "writable": export.writable,
        "allow-inactive": True,
    }
    if export.iothread:
        try:
            await monitor.execute(
                "block-export-add", {**arguments, "iothread": export.iothread, "fixed-iothread": True}
            )
            return
        except QmpError as error:
            log.debug("%s is not exported from %s: %s", export.node, export.iothread, error)
    await monitor.execute("block-export-add", arguments)


async def current_nodes(monitor: Monitor) -> dict[str, str]:
    """Return the names of the nodes that QEMU's exports are on now, by the exports' ids."""
    return {found["id"]: found["node-name"] for found in await monitor.execute("query-block-exports")}


async def cluster_sizes(monitor: Monitor) -> dict[str, int]:
    """Return how many bytes nodes allocate at once, by their names, where their formats have such a size."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node["image"]["cluster-size"] for node in nodes if "cluster-size" in node["image"]}


async def current_node(monitor: Monitor, export: Export) -> str:
    """Return the node that `export` is on now."""
    return (await current_nodes(monitor)).get(export.name, export.node)


async def remove_export(monitor: Monitor, ident: str) -> None:
    """Take an export away, and its client's connection; on return QEMU's node is free of it.

    Raises QmpError, also when requests of its client do not end.
    """
    await monitor.execute("block-export-del", {"id": ident, "mode": "hard"})
    deadline = time.monotonic() + REMOVE_SECONDS
    while any(found["id"] == ident for found in await monitor.execute("query-block-exports")):
        if time.monotonic() > deadline:
            raise QmpError(
                "GenericError",
                f"The block export does not end: a request of its client takes over {REMOVE_SECONDS:g} s",
            )
        await asyncio.sleep(0.01)  # it goes when its client is gone


async def open_exports(monitor: Monitor, socket: Path, exports: list[Export]) -> dict[str, Backend]:
    """Start QEMU's NBD server at `socket` and connect to an export for each drive; raise BackendError."""
    if not exports:
        return {}
    # limits are for the user's clients, and kept where those connect (vm/disks/nbdproxy.py)
    unlimited = {"max-connections": 0, "handshake-max-seconds": 0}
    await monitor.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}, **unlimited})
    opened: dict[str, Backend] = {}
    try:
        for export in exports:
            if export.iothread:
                await monitor.execute("object-add", {"qom-type": "iothread", "id": export.iothread, "poll-max-ns": 0})
            await add_export(monitor, export)
            uri = f"nbd+unix:///{export.name}?socket={socket}"
            # What the guest gives back is told to QEMU's node, whose own `discard` says what comes of it.
            options = OpenOptions(read_only=not export.writable, discard="unmap")
            opened[export.drive] = await asyncio.to_thread(open_nbd, uri, options=options)
    except BaseException:
        for backend in opened.values():
            backend.close()
        raise
    return opened
