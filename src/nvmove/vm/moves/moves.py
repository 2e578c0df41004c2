"""All that saves and moves one VM, set up as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nvmove.errors import UserError
from nvmove.vm.monitor.facade import Facade
from nvmove.vm.moves.capabilities import Capabilities
from nvmove.vm.moves.handlers import Handlers
from nvmove.vm.moves.images import Images
from nvmove.vm.moves.incoming import Incoming
from nvmove.vm.moves.machinestate import MachineState
from nvmove.vm.moves.migration import Migration
from nvmove.vm.moves.movable import Movable, MovedDevice
from nvmove.vm.moves.pciaddress import ConfigSpaces
from nvmove.vm.moves.qtest import QTest, ReplayError
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import Refuser, SnapshotError, Snapshots, failure

log = logging.getLogger(__name__)


class Moves:
    """Run state, snapshots and migrations of one VM."""

    def __init__(
        self,
        facade: Facade,
        spaces: ConfigSpaces,
        runstate: RunState,
        devices: Sequence[MovedDevice],
        images: Images,
        refuser: Refuser,
        *,
        unsaveable: Sequence[str],
        own_nodes: Sequence[str],
    ) -> None:
        """`unsaveable`: labels of disks that cannot hold snapshots; `own_nodes`: names of disks that QEMU lacks."""
        self._snapshots = Snapshots(facade, spaces, runstate, devices, unsaveable, refuser)
        self.on_load = self._snapshots.on_load
        self._own_nodes = own_nodes
        self._refuser = refuser
        self._vm = Movable(facade, runstate, self._snapshots, devices, images, Capabilities(facade))

    def register(self) -> None:
        """Put all commands into the facade."""
        vm = self._vm
        Handlers(vm.facade, vm.runstate, self._snapshots, self._own_nodes).register()
        vm.capabilities.register()
        Migration(vm, self._refuser.check).register()

    async def load(self, tag: str) -> None:
        """-loadvm: as QEMU does, a snapshot that cannot be loaded ends the program. Raises UserError."""
        try:
            output = (await self._snapshots.load(f"loadvm {tag}")).strip()
        except (SnapshotError, ReplayError) as error:
            raise UserError(str(error)) from None
        if why := failure(output):
            raise UserError(why)
        if output:
            log.warning("%s", output)

    def incoming(self, state: MachineState) -> Incoming:
        """-incoming: the VM comes from elsewhere, with its `state`."""
        return Incoming(self._vm, state)


async def config_spaces(facade: Facade, cpu: QTest) -> ConfigSpaces:
    """Return the way to this machine's PCI configuration spaces; raise UserError where nvmove can go none."""
    try:
        target = (await facade.execute("query-target"))["arch"]
        return await ConfigSpaces.of_machine(cpu, facade.hmp, await facade.execute("query-pci"), target)
    except ReplayError as error:
        raise UserError(f"{error}: its disks could not be saved or moved") from None
