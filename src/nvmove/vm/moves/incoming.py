"""The destination of a live migration: QEMU waits for it (-incoming), and the VM runs when its state has arrived.

QEMU is always started with -S, and does not start the VM by itself: first its PCI state is given back, and the raw
images are taken. A VM that was paused, or held failed requests, arrives as that (vm/moves/machinestate.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from nvmove.block.backend import BackendError
from nvmove.errors import UserError
from nvmove.vm.line.plan import DEFER
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.capabilities import EVENTS, refuse
from nvmove.vm.moves.machinestate import MachineState
from nvmove.vm.moves.movable import Movable
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.runstate import IO_ERROR, RUNNING

log = logging.getLogger(__name__)

Event = dict[str, Any]


class Incoming:
    """One VM's arrival."""

    def __init__(self, vm: Movable, state: MachineState) -> None:
        self._vm = vm
        self._state = state
        self._arrived = asyncio.get_running_loop().create_future()
        self._completion: Event | None = None
        """QEMU's event `completed`, until the VM is as it promises."""

    async def prepare(self, *, autostart: bool) -> None:
        """Put the commands into the facade. `autostart`: the VM is to run when it has arrived, if it ran."""
        self._vm.runstate.autostart = autostart
        facade = self._vm.facade
        facade.handlers["migrate-incoming"] = self._qmp_incoming
        facade.hmp_handlers["migrate_incoming"] = self._hmp_incoming
        await self._vm.capabilities.override(EVENTS)
        facade.on_event("MIGRATION", self._on_status)
        facade.filters.append(self._filter)

    async def begin(self, uri: str) -> None:
        """Wait for the VM at `uri`, as -incoming names it. Raises UserError in QEMU's words."""
        if uri == DEFER:
            return
        try:
            await self._begin(_arguments(uri))
        except QmpError as error:
            raise UserError(f"-incoming {uri}: {error.desc}") from None

    async def arrived(self) -> None:
        """Wait until the VM has arrived, and bring it into its state. Raises UserError: it cannot run here."""
        await self._arrived
        tells = self._vm.capabilities.user(EVENTS)
        async with self._vm.runstate.lock:
            try:
                await self._vm.capabilities.restore()  # before the VM runs: it may be sent on at once
                await self._finish()
            except (ReplayError, QmpError) as error:
                raise UserError(f"the VM has arrived and cannot run here: {error}") from None
        if self._completion is not None and tells:
            self._vm.facade.emit(self._completion)

    async def _finish(self) -> None:
        for device in self._vm.devices:
            if not device.loads:
                raise UserError(f"the VM that has arrived has no nvmove device '{device.id}'")
        await self._vm.snapshots.after_load()
        runs = self._state.loaded in {RUNNING, None}
        try:
            await self._vm.images.take()
        except BackendError as error:
            log.error("%s: the VM stays stopped, `cont` tries again", error)
            runs = False
        self._state.restore()
        self._vm.runstate.io_error = self._state.loaded == IO_ERROR
        self._vm.runstate.is_to_run = self._state.loaded in {RUNNING, IO_ERROR, None}
        status = (await self._vm.facade.execute("query-status"))["status"]
        autostart, self._vm.runstate.autostart = self._vm.runstate.autostart, None
        if runs and autostart and status == "paused":  # else the source was in a state that QEMU has carried over
            try:
                await self._vm.runstate.run()
            except QmpError as error:  # QEMU takes its images here, too
                log.error("%s: the VM stays stopped, `cont` tries again", error.desc)

    # --- events and commands -----------------------------------------------------------------------------------------

    def _on_status(self, event: Event) -> None:
        if event["data"]["status"] == "completed" and not self._arrived.done():
            self._arrived.set_result(None)

    def _filter(self, event: Event) -> list[Event]:
        if event["event"] != "MIGRATION" or self._vm.runstate.autostart is None:
            return [event]
        if event["data"]["status"] == "completed":
            self._completion = event
            return []
        return [event] if self._vm.capabilities.user(EVENTS) else []

    async def _begin(self, arguments: dict[str, Any]) -> None:
        users = await self._vm.capabilities.users()
        refuse({name for name, state in users.items() if state})
        if any(one.get("channel-type") == "cpr" for one in arguments.get("channels", ()) if isinstance(one, dict)):
            raise QmpError("GenericError", "a cpr channel is not supported with nvmove's disks")
        await self._vm.facade.execute("migrate-incoming", arguments)

    async def _qmp_incoming(self, _facade: Facade, arguments: dict[str, Any]) -> Any:
        await self._begin(arguments)
        return {}

    async def _hmp_incoming(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        if not arguments.strip():
            return await facade.hmp("migrate_incoming")  # QEMU says what is wrong
        await self._begin({"uri": arguments.strip()})
        return ""


def _arguments(uri: str) -> dict[str, Any]:
    """Return the arguments of `migrate-incoming` for what -incoming says: a URI, or a channel in JSON."""
    if not uri.startswith("{"):
        return {"uri": uri}
    try:
        return {"channels": [json.loads(uri)]}
    except ValueError:
        raise UserError(f"-incoming {uri}: this is not JSON") from None
