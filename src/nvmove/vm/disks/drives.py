"""All disks of one VM, set up as one: from the images that nvmove opens itself to what monitors say of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from nvmove.block.backend import Backend, BackendError
from nvmove.block.fault import FaultRules, FaultyBackend
from nvmove.block.late import LateBackend
from nvmove.block.null import NullBackend
from nvmove.block.open import open_local
from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.block.raw.backend import RawBackend
from nvmove.errors import UserError
from nvmove.nvme.counters import Counters
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.blockstats import BlockStats
from nvmove.vm.disks.exports import Export, cluster_sizes, open_exports
from nvmove.vm.disks.faults import FaultCommands
from nvmove.vm.disks.ioerrors import IoErrors
from nvmove.vm.disks.iostatus import IoStatus
from nvmove.vm.disks.nbdserver import NbdServer
from nvmove.vm.disks.ownimages import OwnImages
from nvmove.vm.disks.queryblock import QueryBlock
from nvmove.vm.disks.resize import Disk, Resizable, Resize
from nvmove.vm.disks.stalls import Stalling, Stalls
from nvmove.vm.line.plan import PlannedDrive
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.images import Image
from nvmove.vm.moves.machinestate import Namespace
from nvmove.vm.moves.runstate import RunState


class Device(Stalling, Protocol):
    """A device, as its disks are shown and changed."""

    @property
    def drives(self) -> Mapping[int, str]:
        """The namespaces' drives, by namespace id."""

    def block_size(self, drive: str) -> int:
        """Return the logical block size in bytes of the namespace on a drive."""

    def counters(self, drive: str) -> Counters:
        """Return what was asked of a drive since the device exists."""

    def set_cluster_size(self, drive: str, size: int) -> None:
        """Tell how many bytes a drive's image allocates at once; before the guest looks."""

    def refresh(self, drive: str | None = None) -> None:
        """The back ends, or one, were opened or changed size."""


@dataclass
class _Drive:
    """A planned drive with its back end."""

    plan: PlannedDrive
    backend: FaultyBackend
    late: LateBackend | None
    """Where the image is in QEMU."""
    io: IoStatus
    node: str
    """PlannedDrive.node, when it is known."""
    device: Device | None = None
    export: Export | None = None

    @property
    def owner(self) -> Device:
        """The device whose namespace is on it."""
        assert self.device is not None  # `use` comes before all that asks
        return self.device


class Drives:
    """To be made in the event loop. `open`, then `use`, then `connect` when QEMU is there, then `register`."""

    def __init__(self, plans: Sequence[PlannedDrive], faults: FaultRules, nbd_socket: Path) -> None:
        """QEMU is to have its NBD server at `nbd_socket`."""
        self.io_errors = IoErrors()
        self.stalls = Stalls()
        self._plans = plans
        self._faults = faults
        self._nbd_socket = nbd_socket
        self._nbd_server: NbdServer | None = None
        self._drives: dict[str, _Drive] = {}
        self._devices: Sequence[Device] = ()

    # --- before QEMU -------------------------------------------------------------------------------------------------

    def open(self, *, active: bool) -> None:
        """Open what is nvmove's, without locks unless `active`. Raises BackendError; `close` closes what was opened."""
        for plan in self._plans:
            late = LateBackend() if plan.in_qemu else None
            image: Backend = late or open_local(plan.config, active=active)
            backend = FaultyBackend(image, self._faults, plan.names)
            errors = DriveErrors(ErrorPolicy(plan.config.werror), ErrorPolicy(plan.config.rerror))
            self._drives[plan.key] = _Drive(plan, backend, late, IoStatus(errors), plan.node)

    def close(self) -> None:
        """Close all; the devices are closed."""
        with contextlib.ExitStack() as stack:
            for drive in self._drives.values():
                stack.callback(drive.backend.close)

    @property
    def backends(self) -> Mapping[str, Backend]:
        """For the devices, by key."""
        return {key: drive.backend for key, drive in self._drives.items()}

    @property
    def errors(self) -> Mapping[str, DriveErrors]:
        """The policies, by key."""
        return {key: drive.io.errors for key, drive in self._drives.items()}

    @property
    def images(self) -> list[Image]:
        """Those that nvmove has opened."""
        return [cast(Image, drive.backend.image) for drive in self._own]

    @property
    def _own(self) -> list[_Drive]:
        return [drive for drive in self._drives.values() if drive.late is None]

    def use(self, devices: Sequence[Device]) -> None:
        """These are all devices, on these drives."""
        self._devices = devices
        for device in devices:
            for key in device.drives.values():
                self._drives[key].device = device
                self._drives[key].backend.block_size = functools.partial(device.block_size, key)

    # --- with QEMU ---------------------------------------------------------------------------------------------------

    async def connect(self, facade: Facade) -> None:
        """Open what is in QEMU. Raises UserError, BackendError, QemuGone."""
        late = {key: drive for key, drive in self._drives.items() if drive.late is not None}
        for number, (key, drive) in enumerate(late.items()):
            drive.node = await _node(facade, drive.plan)
            writable = not drive.plan.config.options.read_only
            drive.export = Export(key, drive.node, writable, iothread=f"nvmove-io{number}")
        exports = [drive.export for drive in late.values() if drive.export is not None]
        try:
            opened = await open_exports(facade, self._nbd_socket, exports)
        except QmpError as error:
            raise UserError(error.desc) from None
        except BackendError:
            await facade.execute("query-status")  # raises QemuGone when that is the reason
            raise
        for key, backend in opened.items():
            waiting = late[key].late
            assert waiting is not None
            waiting.open(backend)
        clusters = await cluster_sizes(facade) if exports else {}
        for device in self._devices:
            device.refresh()
            for export in exports:
                device.set_cluster_size(export.drive, clusters.get(export.node, 0))

    def register(self, facade: Facade, runstate: RunState) -> None:
        """Put all commands into the facade."""
        served = {key: _served(drive) for key, drive in self._drives.items()}
        drives = list(served.values())
        QueryBlock(facade, drives).register()
        BlockStats(facade, drives).register()
        Resize(facade, runstate, [_disk(drive) for drive in self._drives.values()]).register()
        shared = [(served[key], drive.export) for key, drive in self._drives.items() if drive.export is not None]
        if shared:
            self._nbd_server = NbdServer(facade, shared, self._nbd_socket)
            self._nbd_server.register()
        OwnImages(facade, drives).register()
        self.io_errors.connect(facade, runstate, served)
        self.stalls.connect(facade, runstate, self._devices)
        names = frozenset().union(*(drive.plan.names for drive in self._drives.values()))
        FaultCommands(self._faults, names).register(facade)

    async def hang_up(self) -> None:
        """End the user's NBD server; QEMU still runs."""
        if self._nbd_server is not None:
            await self._nbd_server.close()

    @property
    def unsaveable(self) -> list[str]:
        """Labels of the disks that cannot hold snapshots: raw images of nvmove's that are written to."""
        return [_served(drive).label for drive in self._own if not drive.backend.read_only]

    @property
    def own_nodes(self) -> list[str]:
        """Names that a client may give to disks which are no nodes of QEMU's."""
        return [name for drive in self._own for name in (drive.node, drive.plan.name) if name]

    @property
    def io_statuses(self) -> dict[Namespace, IoStatus]:
        """The drives' io-status, by their namespaces."""
        return {(one.id, nsid): self._drives[key].io for one in self._devices for nsid, key in one.drives.items()}


def _disk(drive: _Drive) -> Disk:
    """Return what `block_resize` needs to know of a drive."""
    image: Resizable | Export
    if drive.export is not None:
        image = drive.export
    else:
        assert isinstance(drive.backend.image, RawBackend | NullBackend)
        image = drive.backend.image
    plan = drive.plan
    return Disk(plan.name, plan.node, image, functools.partial(drive.owner.refresh, plan.key))


def _served(drive: _Drive) -> ServedDrive:
    plan = drive.plan
    return ServedDrive(
        plan.name,
        drive.node,
        plan.device,
        plan.config,
        drive.backend,
        plan.in_qemu,
        drive.io,
        functools.partial(drive.owner.counters, plan.key),
        drive.export.name if drive.export is not None else "",
    )


async def _node(facade: Facade, plan: PlannedDrive) -> str:
    """Return the name of a drive's block node; only QEMU knows it where -snapshot put an overlay on top."""
    if plan.node:
        return plan.node
    for info in await facade.execute("query-block"):
        if info["device"] == plan.name:
            return str(info["inserted"]["node-name"])
    raise UserError(f"QEMU does not know the drive '{plan.name}'")
