"""One NVMe function as a whole: PCI, controller, engine and guest memory, served over vfio-user.

Two sides meet here. The vfio-user session calls the methods of `nvmove.vfio.device.Device`, on its control thread,
which never waits. The owner of the device calls the six verbs `reset`, `pause`, `resume`, `save`, `load` and `inspect`,
on any other thread; they may wait.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvmove.block.backend import Backend, BackendError
from nvmove.block.policy import DriveErrors, ErrorReport
from nvmove.engine import choice
from nvmove.engine.poller import Poller
from nvmove.nvme.commands import management
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.controller import Controller
from nvmove.nvme.counters import Counters
from nvmove.nvme.seams import Engine
from nvmove.nvme.spec import DOORBELLS
from nvmove.nvme.state import vmsd
from nvmove.pci.config import CONFIG_SIZE
from nvmove.pci.function import PciFunction
from nvmove.vfio.device import (
    BAR0_REGION,
    CONFIG_REGION,
    ERROR,
    INTX,
    IRQ_INDEX_COUNT,
    MSIX,
    REGION_COUNT,
    Client,
    IrqAction,
    MappableArea,
    RegionInfo,
    Reset,
)
from nvmove.vfio.dirty import DirtyLog, DirtyReport
from nvmove.vfio.ends import Ends
from nvmove.vfio.memory import GuestMemory
from nvmove.vfio.migration import Migration
from nvmove.vfio.page import SharedPages
from nvmove.vfio.receive import PlainReceiver, Receiver
from nvmove.vfio.transport import Server

log = logging.getLogger(__name__)


class NvmeDevice:
    """The device with the id `id` in QEMU. It borrows the back ends: its owner closes them, after it.

    Raises ValueError for namespaces that cannot be together.
    """

    def __init__(
        self,
        config: ControllerConfig,
        backends: Mapping[str, Backend],
        *,
        id: str,
        engine: Engine | None = None,
        errors: Mapping[str, DriveErrors] | None = None,
        on_error: Callable[[ErrorReport], None] | None = None,
        on_wait: Callable[[], None] | None = None,
        client_migrates: bool = False,
        memory_moves: bool = False,
    ) -> None:
        """`errors` are the drives' policies; a drive without one reports. `on_error` hears of every error of a drive,
        `on_wait` when the guest begins to wait for a disk by a clock of its own (`waits`).

        It is called on any thread, and must not wait. `client_migrates`: the vfio-user client may drive the protocol's
        own migration, and with it pause, resume, save and load this device. `memory_moves`: the client maps and unmaps
        memory for each of the guest's requests.
        """
        self.id = id
        self.loads = 0
        """States loaded since the device exists."""
        self.resets = 0
        """Function-level resets seen, QEMU's and the guest's."""
        self._pci = PciFunction(config)
        self._memory = GuestMemory(lends=not memory_moves)
        self._engine = engine or choice.new_engine(id)
        self.controller = Controller(
            config,
            backends,
            self._memory,
            self._pci.lines,
            self._engine,
            errors=errors,
            on_error=on_error,
            on_wait=on_wait,
        )
        self._migration = Migration(self) if client_migrates else None
        self._client: Client | None = None
        self._server: Server | None = None
        self._regions = [RegionInfo()] * REGION_COUNT
        self._regions[BAR0_REGION] = RegionInfo(self._pci.layout.size, readable=True, writable=True)
        self._doorbells: SharedPages | None = None
        self._poller: Poller | None = None
        if config.mapped_doorbells:
            self._poller = Poller(self.controller.doorbells.scan, f"{id}-doorbells")
            self._share_doorbells()
        self._regions[CONFIG_REGION] = RegionInfo(CONFIG_SIZE, readable=True, writable=True)
        self._irq_counts = [0] * IRQ_INDEX_COUNT
        self._irq_counts[INTX] = 1
        self._irq_counts[MSIX] = config.msix_qsize
        self._irq_counts[ERROR] = 1  # never signalled; without it QEMU warns at each start

    # --- the owner's side --------------------------------------------------------------------------------------------

    def start(self, socket: Path) -> None:
        """Serve the device at `socket`. Raises `nvmove.vfio.transport.ListenError`."""
        vmsd.NVME.prepare()  # now, not while a VM stands still
        server = Server(socket, self, self.receiver)
        server.start()
        self._server = server
        if self._poller is not None:
            self._poller.start()

    @property
    def receiver(self) -> Receiver:
        """Who receives the client's messages."""
        if self._doorbells is not None:  # what comes by message goes into the page that the client has mapped
            return PlainReceiver()
        return choice.receiver_of(self._engine)

    def close(self) -> None:
        """Hang up, remove the socket, stop the engine. I/O that a back end holds is waited for a few seconds only."""
        if self._server is not None:
            self._server.close()
        if self._poller is not None:
            self._poller.close()
        if self._migration is not None:
            self._migration.close()
        self._engine.close()
        if self._doorbells is not None:
            self._doorbells.close()

    def pause(self, timeout: float | None = None) -> None:
        """Stop fetching and wait until nothing is in flight.

        Raises TimeoutError when that takes more than `timeout` seconds; the device stays paused then.
        """
        self._pci.lines.quieten()
        if not self.controller.pause(timeout):
            raise TimeoutError(f"{self.id}: I/O is still in flight after {timeout} s")

    def resume(self) -> None:
        """Go on after `pause`: first of all with the commands that are held, on disks whose connection was lost anew.

        What was loaded is the guest's from here on. May wait for those disks; does not fail for them: what is tried
        again fails again, and its error policy says what then.
        """
        self._recover()
        self._pci.run()
        self.controller.resume()

    def _recover(self) -> None:
        for backend in {id(namespace.backend): namespace.backend for namespace in self.controller.namespaces}.values():
            try:
                backend.recover()
            except BackendError as error:
                log.warning("%s: %s", self.id, error)

    @property
    def waits(self) -> bool:
        """Whether the guest waits for a disk and will not do so for long: see `Controller.waits`."""
        return self.controller.waits

    @property
    def held(self) -> int:
        """Commands that failed and wait to be tried again at `resume`."""
        return self.controller.held

    def save(self) -> bytes:
        """Return the state of the paused device, in QEMU's wire format."""
        controller = self.controller.save()
        return vmsd.dump(vmsd.DeviceState(self._pci.save(), controller))

    def load(self, data: bytes) -> None:
        """Take a saved state over; the device must be paused and stays so.

        Raises `nvmove.vmstate.schema.StateError` before anything is touched: the state is damaged, contradicts itself,
        or is another device's; or with the controller as after a reset: a queue has no thread.
        """
        state = vmsd.load(data)
        with self._pci.loading(state.pci):
            self.controller.load(state.controller)
        self.loads += 1

    # --- migration ---------------------------------------------------------------------------------------------------

    def track_dirty(self, on: bool) -> None:
        """From now on mark what the device writes to guest memory dirty in QEMU, or no more; the device may run.

        On again forgets what was recorded before.
        """
        with self.controller.leases.suspended():  # an engine that runs queues itself marks nothing
            if on:
                self._memory.dirty.start_marking()
            else:
                self._memory.dirty.stop_marking()

    def log_dirty(self, log: DirtyLog | None) -> None:
        """Log from now on what the device writes to guest memory, or no more; the device may run."""
        with self.controller.leases.suspended():
            if log is None:
                self._memory.dirty.stop_log()
            else:
                self._memory.dirty.start_log(log)

    def mark_dirty(self) -> DirtyReport:
        """Mark what could not be marked while the guest ran; the device is paused and the VM stopped. Waits.

        Raises DmaError when QEMU refuses or is gone; it can be called again then.
        """
        if not self.controller.paused:
            raise RuntimeError("mark_dirty of a device that is not paused")
        return self._memory.mark_dirty()

    # --- inspection --------------------------------------------------------------------------------------------------

    def inspect(self) -> dict[str, Any]:
        """Return what the device is and does now, as a tree of plain values; also while it runs."""
        lines = self._pci.lines
        return {
            "id": self.id,
            "connected": self._client is not None,
            "loads": self.loads,
            "resets": self.resets,
            "pci": {
                "config": self._pci.current_config[:256].hex(" ", -4),
                "msix_enabled": lines.msix_enabled,
                "pending": list(lines.pending),
                "intx": lines.level,
            },
            "memory": [
                {"address": address, "size": size, "access": access} for address, size, access in self._memory.ranges()
            ],
            "controller": self.controller.inspect(),
        }

    def counters(self, drive: str) -> Counters:
        """Return what was asked of a drive since the device exists."""
        with self.controller.lock:
            self.controller.leases.refresh()
            (found,) = (one.counters for one in self.controller.namespaces if one.config.drive == drive)
            return found.copy()

    @property
    def drives(self) -> Mapping[int, str]:
        """The namespaces' drives, by namespace id."""
        return {namespace.nsid: namespace.config.drive for namespace in self.controller.namespaces}

    def block_size(self, drive: str) -> int:
        """Return the logical block size in bytes of the namespace on a drive, as it is formatted now."""
        (found,) = (one for one in self.controller.namespaces if one.config.drive == drive)
        return found.block_size

    def set_cluster_size(self, drive: str, size: int) -> None:
        """Tell the namespaces of a drive how many bytes its image allocates at once; before the guest looks."""
        for namespace in self.controller.namespaces:
            if namespace.config.drive == drive:
                namespace.cluster_size = size

    def refresh(self, drive: str | None = None) -> None:
        """The back ends, or one, were opened or changed size: the namespaces look at it again, the guest is told."""
        for namespace in self.controller.namespaces:
            if drive in {None, namespace.config.drive}:
                management.resized(self.controller, namespace.nsid)

    # --- PCI replay (vm/moves/replay.py) -----------------------------------------------------------------------------

    @property
    def pci_config(self) -> bytes:
        """The first 256 bytes of configuration space as the guest left them; between a load and `resume`, as loaded."""
        return self._pci.config[:256]

    @property
    def msix_table_offset(self) -> int:
        """Offset of the MSI-X table in BAR0."""
        return self._pci.layout.table

    @property
    def msix_table(self) -> bytes:
        """The MSI-X table, as loaded or as `keep_msix_table` got it, 16 bytes a vector."""
        return self._pci.table

    def keep_msix_table(self, table: bytes) -> None:
        """Take QEMU's MSI-X table into the state that `save` writes; raise ValueError for one of another size."""
        self._pci.keep_table(table)

    # --- nvmove.vfio.device.Device, on the control thread ------------------------------------------------------------

    @property
    def regions(self) -> Sequence[RegionInfo]:
        """BAR0 and configuration space."""
        return self._regions

    @property
    def irq_counts(self) -> Sequence[int]:
        """INTx, MSI-X, and the error interrupt."""
        return self._irq_counts

    @property
    def migration(self) -> Migration | None:
        """The protocol's own migration, when the client may drive it."""
        return self._migration

    def attach(self, client: Client) -> None:
        """A client is connected."""
        self._client = self._memory.client = client

    def detach(self, done: Callable[[], None]) -> None:
        """The client is gone, and the guest's memory with it: nothing of this function's state has a meaning any more.

        A paused device stays paused: its owner decides when the next guest may run. Unless it was the client.
        """
        self._client = self._memory.client = None
        if self._doorbells is not None:  # the old client may have kept its mapping
            done = self._with_new_doorbells(done)
        self._pci.lines.disconnect()
        if self._migration is not None:
            done = functools.partial(self._migration.end, done)
        self._reset(lambda: self._memory.unmap_all(lambda _errno: done()))

    def _with_new_doorbells(self, done: Callable[[], None]) -> Callable[[], None]:
        def shared() -> None:
            self._share_doorbells()
            done()

        return shared

    def _share_doorbells(self) -> None:
        """Make new memory for the doorbells, while there is no client and no queue."""
        start, end = DOORBELLS, self._pci.layout.table
        if self._doorbells is not None:
            self._doorbells.close()
        self._doorbells = SharedPages(start, end - start)
        self.controller.doorbells.share(self._doorbells.view.cast("I"))
        area = MappableArea(start, end - start, self._doorbells.fd)
        self._regions[BAR0_REGION] = RegionInfo(self._pci.layout.size, readable=True, writable=True, mappable=area)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read configuration space, registers or the Pending Bit Array; the MSI-X table is QEMU's, here it is zero."""
        if region == CONFIG_REGION:
            return self._pci.read(offset, count)
        if offset < self._pci.layout.table:
            return self.controller.read(offset, count).to_bytes(count, "little")
        start = offset - self._pci.layout.pba
        return self._pci.lines.pending_bits()[start : start + count].ljust(count, b"\0") if start >= 0 else bytes(count)

    def write(self, region: int, offset: int, data: bytes) -> Reset | None:
        """Write configuration space, registers or doorbells; the rest of BAR0 takes no writes."""
        if region == CONFIG_REGION:
            if not self._pci.write(offset, data):
                return None
            self.resets += 1
            return self._reset
        if offset + len(data) <= self._pci.layout.table:
            self.controller.write(offset, len(data), int.from_bytes(data, "little"))
        return None

    def map_dma(self, address: int, size: int, fd: int | None, offset: int, readable: bool, writable: bool) -> None:
        """Guest memory appears."""
        self._memory.map(address, size, fd, offset, readable, writable)

    def unmap_dma(self, address: int, size: int, unmap_all: bool, done: Callable[[int], None]) -> None:
        """Guest memory goes away; `done` when no I/O uses it."""
        if unmap_all:
            self._memory.unmap_all(done)
        else:
            self._memory.unmap(address, size, done)

    def set_irqs(self, index: int, start: int, count: int, action: IrqAction) -> None:
        """Change interrupts."""
        self._pci.lines.set_irqs(index, start, count, action)

    def reset(self, done: Callable[[], None]) -> None:
        """Function-level reset; `done` when nothing from before touches guest memory. A paused device stays so.

        Unless the client has paused it: this is how it gets a migration out of its ERROR state.
        """
        self.resets += 1
        self._reset(done if self._migration is None else functools.partial(self._migration.reset, done))

    def _reset(self, done: Callable[[], None]) -> None:
        # The controller first: once its queues are dropped it raises no interrupt any more. It may be done at once, or
        # later on another thread; whoever waits is told when this side is done too.
        ends = Ends(done)
        self.controller.reset(ends.one_more())
        self._pci.reset()
        ends.no_more()
