"""Commands that stop, start, save and load the VM: nvmove does something around QEMU's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import SnapshotError, Snapshots

Event = dict[str, Any]
Out = Callable[[str], None]


class Handlers:
    """One VM's run state and snapshots, as its monitors have them."""

    def __init__(self, facade: Facade, runstate: RunState, snapshots: Snapshots, own_nodes: Sequence[str]) -> None:
        """`own_nodes`: names that a client may give to disks which are no nodes of QEMU's."""
        self._facade = facade
        self._runstate = runstate
        self._snapshots = snapshots
        self._own_nodes = own_nodes
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
        facade.commands.concurrent.add("query-jobs")
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
