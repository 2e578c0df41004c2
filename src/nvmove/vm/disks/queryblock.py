"""`query-block` and `info block`: the disks that nvmove serves stand in them as QEMU's own would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nvmove.vm.disks import blockinfo
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.exports import current_nodes
from nvmove.vm.monitor.facade import Facade

Out = Callable[[str], None]


class QueryBlock:
    """One VM's own block devices."""

    def __init__(self, facade: Facade, drives: Sequence[ServedDrive]) -> None:
        self._facade = facade
        self._drives = drives

    def register(self) -> None:
        """Put the commands into the facade. They wait for no other."""
        self._facade.handlers["query-block"] = self._query_block
        self._facade.hmp_handlers["info block"] = self._info_block
        self._facade.commands.concurrent |= {"query-block", "info block"}

    async def _query_block(self, facade: Facade, _arguments: dict[str, Any]) -> Any:
        answer = await facade.execute("query-block")
        nodes = await self._unnamed_nodes(facade)
        if nodes:
            known = {info["node-name"]: info for info in await facade.execute("query-named-block-nodes")}
            found = {export: known[node] for export, node in nodes.items() if node in known}
            return blockinfo.complete(answer, self._drives, found)
        return blockinfo.complete(answer, self._drives)

    async def _unnamed_nodes(self, facade: Facade) -> dict[str, str]:
        """Return the current nodes of the drives that QEMU shows to nobody, by their exports."""
        unnamed = {drive.export for drive in blockinfo.unnamed(self._drives)}
        if not unnamed:
            return {}
        return {export: node for export, node in (await current_nodes(facade)).items() if export in unnamed}

    async def _info_block(self, facade: Facade, arguments: str, _out: Out) -> str:
        words = arguments.split()
        names = [word for word in words if not word.startswith("-")]
        only = names[0] if names else None
        verbose = any(word.startswith("-") and "v" in word for word in words)
        if any(word.startswith("-") and "n" in word for word in words):
            return await facade.hmp(f"info block {arguments}")
        own = [drive for drive in self._drives if not drive.in_qemu]
        if only is not None and any(only in {drive.name, drive.node} for drive in own):
            text = ""
        else:
            text = await facade.hmp(f"info block {arguments}".strip())
        nodes = await self._unnamed_nodes(facade)
        for drive in blockinfo.unnamed(self._drives):
            node = nodes.get(drive.export, "")
            if only is None and node:
                shown = await facade.hmp(f"info block {'-v ' if verbose else ''}{node}")
                text += ("\r\n" if text else "") + blockinfo.attach(shown, drive)
            elif only == node:
                text = blockinfo.attach(text, drive)
        return blockinfo.complete_text(text, self._drives, only, verbose)
