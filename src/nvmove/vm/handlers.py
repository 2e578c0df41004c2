"""The commands that nvmove's monitor answers itself, or does something around: they go into the facade's tables."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

from nvmove.vm import blockinfo
from nvmove.vm.blockinfo import ServedDrive
from nvmove.vm.exports import current_nodes
from nvmove.vm.monitor import Facade, QmpError
from nvmove.vm.qtest import ReplayError
from nvmove.vm.runstate import RunState
from nvmove.vm.snapshot import SnapshotError, Snapshots

Event = dict[str, Any]
Out = Callable[[str], None]


class Handlers:
    """One VM's own commands."""

    def __init__(self, facade: Facade, runstate: RunState, snapshots: Snapshots, drives: Sequence[ServedDrive]) -> None:
        self._facade = facade
        self._runstate = runstate
        self._snapshots = snapshots
        self._drives = drives
        self._own_nodes = tuple(
            name for drive in drives if not drive.in_qemu for name in (drive.node, drive.name) if name
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self) -> None:
        """Put everything into the facade."""
        facade = self._facade
        facade.handlers["stop"] = self._stop
        facade.handlers["cont"] = self._cont
        facade.hmp_handlers["stop"] = self._hmp_stop
        facade.hmp_handlers["cont"] = self._hmp_cont
        for name, run in (("savevm", self._snapshots.save), ("loadvm", self._snapshots.load)):
            facade.hmp_handlers[name] = functools.partial(self._hmp_snapshot, name, run)
        facade.hmp_handlers["delvm"] = self._hmp_delvm
        for name in ("snapshot-save", "snapshot-load"):
            facade.handlers[name] = functools.partial(self._snapshot_job, name)
        facade.handlers["query-jobs"] = self._query_jobs
        facade.handlers["query-block"] = self._query_block
        facade.hmp_handlers["info block"] = self._info_block
        facade.commands.concurrent |= {"query-jobs", "query-block", "info block"}
        facade.on_event("STOP", self._follow)
        facade.on_event("RESUME", self._follow)
        facade.filters.append(self._hold_conclusion)

    # --- run state ---------------------------------------------------------------------------------------------------

    def _follow(self, event: Event) -> None:
        self._start(self._runstate.follow(str(event["event"])))

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self, _facade: Facade, _arguments: dict[str, Any]) -> Any:
        await self._runstate.stop()
        return {}

    async def _cont(self, _facade: Facade, _arguments: dict[str, Any]) -> Any:
        await self._runstate.cont()
        return {}

    async def _hmp_stop(self, _facade: Facade, _arguments: str, _out: Out) -> str:
        await self._runstate.stop()
        return ""

    async def _hmp_cont(self, _facade: Facade, _arguments: str, _out: Out) -> str:
        await self._runstate.cont()
        return ""

    # --- snapshots ---------------------------------------------------------------------------------------------------

    async def _hmp_snapshot(self, name: str, run: Any, _facade: Facade, arguments: str, _out: Out) -> str:
        try:
            return str(await run(f"{name} {arguments}".strip()))
        except (SnapshotError, ReplayError) as error:
            raise QmpError("GenericError", str(error)) from None

    async def _hmp_delvm(self, facade: Facade, arguments: str, _out: Out) -> str:
        try:
            self._snapshots.check()
        except SnapshotError as error:
            raise QmpError("GenericError", str(error)) from None
        return await facade.hmp(f"delvm {arguments}".strip())

    async def _snapshot_job(self, name: str, _facade: Facade, arguments: dict[str, Any]) -> Any:
        try:
            return await self._snapshots.job(name, arguments, self._own_nodes)
        except (SnapshotError, ReplayError) as error:
            raise QmpError("GenericError", str(error)) from None

    async def _query_jobs(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        return self._snapshots.explain(await facade.execute("query-jobs", arguments or None))

    def _hold_conclusion(self, event: Event) -> list[Event]:
        """Clients learn that a snapshot job has concluded when the VM runs again as it promises, not before."""
        data = event.get("data", {})
        job_id = str(data.get("id"))
        if (
            event["event"] != "JOB_STATUS_CHANGE"
            or data.get("status") != "concluded"
            or not self._snapshots.owns(job_id)
        ):
            return [event]

        async def conclude() -> None:
            await self._snapshots.concluded(job_id)
            self._facade.emit(event)

        self._start(conclude())
        return []

    # --- block devices -----------------------------------------------------------------------------------------------

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
