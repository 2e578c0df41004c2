"""`block_resize` of disks that nvmove serves: the image changes while the devices rest, then the guest is told.

QEMU refuses to resize a node that its NBD server exports, so the export is taken away for the moment and given back.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nvmove.block.backend import BackendError
from nvmove.options.syntax import parse_size
from nvmove.vm.disks.exports import Export, add_export, current_nodes, remove_export
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.runstate import MIGRATING, RunState

_INVALID_SIZE = 'invalid size\nTry "help block_resize" for more information\n'
"""HMP's words."""


class Resizable(Protocol):
    """A raw image that nvmove has opened."""

    def resize(self, size: int) -> None:
        """Change its length in bytes; raises BackendError."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that can be resized: a raw image of nvmove's, or an export of QEMU's."""

    name: str
    """The -drive's id; empty for a -blockdev."""
    node: str
    image: Resizable | Export
    refresh: Callable[[], None]
    """Makes the back end and the namespace look at the size again; may wait."""


class Resize:
    """The command, QMP's and HMP's."""

    def __init__(self, facade: Facade, runstate: RunState, disks: Sequence[Disk]) -> None:
        self._facade = facade
        self._runstate = runstate
        self._disks = disks

    def register(self) -> None:
        """Put it into the facade."""
        self._facade.handlers["block_resize"] = self._qmp
        self._facade.hmp_handlers["block_resize"] = self._hmp

    async def _find(self, device: object, node: object) -> tuple[Disk, str] | None:
        """Return a disk and the node that it is on now: a snapshot or a job may have put another one in its place."""
        current = await current_nodes(self._facade) if any(isinstance(d.image, Export) for d in self._disks) else {}
        for disk in self._disks:
            on = current.get(disk.image.name, disk.node) if isinstance(disk.image, Export) else disk.node
            if (disk.name and disk.name == device) or (on and on == node):
                return disk, on
        return None

    async def _qmp(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        found = await self._find(arguments.get("device"), arguments.get("node-name"))
        size = arguments.get("size")
        is_whole = type(size) is int and arguments.keys() <= {"device", "node-name", "size"}

        async def in_qemu() -> Any:
            return await facade.execute("block_resize", arguments)

        if found is None or not is_whole:  # the error is QEMU's
            return await in_qemu()
        disk, node = found
        if not isinstance(disk.image, Export):
            assert isinstance(size, int)
            await self._resize_raw(disk, disk.image, size)
            return {}
        return await self._at_rest(disk, self._resize_exported(disk, disk.image, node, in_qemu))

    async def _hmp(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        words = arguments.split()
        found = await self._find(words[0], None) if len(words) == 2 else None
        line = f"block_resize {arguments}".strip()
        if found is None:
            return await facade.hmp(line)
        disk, node = found
        if isinstance(disk.image, Export):
            work = self._resize_exported(disk, disk.image, node, lambda: facade.hmp(line))
            return str(await self._at_rest(disk, work))
        size = parse_size(words[1], "m")
        if size is None:
            return _INVALID_SIZE
        await self._resize_raw(disk, disk.image, size)
        return ""

    async def _resize_raw(self, disk: Disk, image: Resizable, size: int) -> None:
        if size < 0:
            raise QmpError("GenericError", "Parameter 'size' expects a >0 size")
        try:
            await self._at_rest(disk, asyncio.to_thread(image.resize, size))
        except BackendError as error:
            raise QmpError("GenericError", str(error)) from None

    async def _at_rest(self, disk: Disk, work: Awaitable[Any]) -> Any:
        """Do `work` while no I/O is in flight and none is begun; the VM need not stop for it."""
        async with self._runstate.lock:
            if self._runstate.migrating:
                raise QmpError("GenericError", MIGRATING)
            await self._runstate.pause_devices()
            try:
                answer = await work
            finally:
                await asyncio.to_thread(disk.refresh)
                if (await self._facade.execute("query-status"))["running"]:
                    await self._runstate.resume_devices()
            return answer

    async def _resize_exported(
        self, disk: Disk, export: Export, node: str, resize: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Resize `node`, and have the exports in the order they were in.

        QEMU keeps a VM's state on the first of the disks, in the order in which their users came, and looks for it
        there again: an export that came back as the last one would hide every snapshot there is.
        """

        async def nothing() -> None:
            pass

        try:
            return await self._without_export(disk, export, node, resize)
        finally:
            current = await current_nodes(self._facade)
            for later in self._disks[self._disks.index(disk) + 1 :]:
                if isinstance(later.image, Export):
                    on = current.get(later.image.name, later.node)
                    await self._without_export(later, later.image, on, nothing)
                    await asyncio.to_thread(later.refresh)

    async def _without_export(self, disk: Disk, export: Export, node: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do `work` while `node` is not exported.

        A node that nobody uses, and that the user did not add (as the overlay that blockdev-snapshot-sync makes of a
        -blockdev), would be gone with its export: another node holds it.
        """
        holder = ""
        if not disk.name:
            holder = f"nvmove-hold-{secrets.token_hex(4)}"  # at most 31 bytes
            hold = {"driver": "raw", "node-name": holder, "file": node, "read-only": True}
            await self._facade.execute("blockdev-add", hold)
        await remove_export(self._facade, export.name)
        try:
            return await work()
        finally:
            await add_export(self._facade, export, node)
            if holder:
                await self._facade.execute("blockdev-del", {"node-name": holder})
