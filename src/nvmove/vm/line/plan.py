"""What a QEMU command line becomes: nvmove's part, typed, and the arguments that QEMU gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nvmove.block.config import DriveConfig
from nvmove.nvme.config import ControllerConfig
from nvmove.vm.line.endpoints import MonitorEndpoint

DRIVER = "vfio-user-pci"
"""What QEMU has in the place of an nvme device."""
DEFER = "defer"
"""What -incoming says where `migrate-incoming` is to follow."""


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """A controller that nvmove serves."""

    id: str
    """The id of the vfio-user-pci device in QEMU: the user's, or nvmove0, nvmove1, … when there is none."""
    config: ControllerConfig
    socket: Path
    """nvmove listens there before QEMU starts."""


@dataclass(frozen=True, slots=True)
class PlannedDrive:
    """A drive of such a controller."""

    key: str
    """What NamespaceConfig.drive says."""
    name: str
    """The -drive's id; empty for a -blockdev."""
    node: str
    """The node's name. Empty when only QEMU knows it (-snapshot puts an overlay on top): `query-block` of `name`."""
    device: str
    """PlannedDevice.id."""
    config: DriveConfig
    in_qemu: bool
    """QEMU keeps the node, to be exported by its NBD server; else nvmove opens the raw image itself."""

    @property
    def names(self) -> frozenset[str]:
        """What a user may call it."""
        return frozenset({self.key, self.name, self.node} - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A command line, lifted."""

    program: str
    """QEMU's path, found and checked; with `passthrough` the word that the user typed."""
    arguments: tuple[str, ...]
    """For QEMU. Complete but for the dbus-vmstate object, with -S."""
    devices: tuple[PlannedDevice, ...] = ()
    drives: tuple[PlannedDrive, ...] = ()
    endpoints: tuple[MonitorEndpoint, ...] = ()
    qmp_socket: Path = Path()
    """nvmove listens there before QEMU starts, and QEMU connects."""
    qtest_socket: Path = Path()
    """The same, for accesses to memory and ports as the guest's CPU makes them."""
    is_translated: bool = False
    """An IOMMU of the guest's is between its disks and its memory."""
    paused: bool = False
    """The user's own -S."""
    loadvm: str | None = None
    incoming: str | None = None
    """The user's own -incoming; QEMU gets `-incoming defer`."""
    passthrough: bool = False
    """No nvme device, or only a question (-help): QEMU is to be run with the user's own arguments, untouched."""
    qemu_uses_stdio: bool = False
    """A device of QEMU's own reads and writes nvmove's standard input and output (`-serial stdio`)."""
    wording: Mapping[str, str] = field(default_factory=dict)
    """What the user typed, by the option that QEMU is given instead."""
    warnings: tuple[str, ...] = ()
    """Lines for the user that are no errors, such as QEMU's for deprecated spellings."""

    @property
    def drive_names(self) -> frozenset[str]:
        """What a user may call the drives."""
        return frozenset().union(*(drive.names for drive in self.drives))
