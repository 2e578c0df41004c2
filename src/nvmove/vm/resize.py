"""`block_resize` of disks that nvmove serves: the image changes while the devices rest, then the guest is told.

QEMU refuses to resize a node that its NBD server exports, so the export is taken away for the moment and given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nvmove.block.backend import BackendError
from nvmove.options.syntax import parse_size
from nvmove.vm.exports import Export, add_export, current_node, remove_export
from nvmove.vm.monitor import Facade, QmpError
from nvmove.vm.runstate import MIGRATING, RunState

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

    def _find(self, device: object, node: object) -> Disk | None:
        for disk in self._disks:
            if (disk.name and disk.name == device) or (disk.node and disk.node == node):
                return disk
        return None

    async def _qmp(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        disk = self._find(arguments.get("device"), arguments.get("node-name"))
        size = arguments.get("size")
        is_whole = type(size) is int and arguments.keys() <= {"device", "node-name", "size"}

        async def in_qemu() -> Any:
            return await facade.execute("block_resize", arguments)

        if disk is None or not is_whole:  # the error is QEMU's
            return await in_qemu()
        if not isinstance(disk.image, Export):
            assert isinstance(size, int)
            await self._resize_raw(disk, disk.image, size)
            return {}
        return await self._at_rest(disk, self._without_export(disk.image, in_qemu))

    async def _hmp(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        words = arguments.split()
        disk = self._find(words[0], None) if len(words) == 2 else None
        line = f"block_resize {arguments}".strip()
        if disk is None:
            return await facade.hmp(line)
        if isinstance(disk.image, Export):
            return str(await self._at_rest(disk, self._without_export(disk.image, lambda: facade.hmp(line))))
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

    async def _without_export(self, export: Export, work: Callable[[], Awaitable[Any]]) -> Any:
        node = await current_node(self._facade, export)
        await remove_export(self._facade, export.name)
        try:
            return await work()
        finally:
            await add_export(self._facade, export, node)
