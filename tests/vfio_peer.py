"""A device with registers, memory and interrupts but no function, served over a socket pair: for tests of vfio-user."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.seams import DmaError
from nvmove.pci.config import CONFIG_SIZE, ConfigSpace
from nvmove.pci.interrupts import InterruptLines
from nvmove.vfio.client import VfioUserClient
from nvmove.vfio.device import BAR0_REGION, CONFIG_REGION, REGION_COUNT, Client, IrqAction, RegionInfo, Reset
from nvmove.vfio.dirty import DirtyLog, DirtyTracking
from nvmove.vfio.memory import GuestMemory
from nvmove.vfio.migration import Migration
from nvmove.vfio.transport import Connection
from nvmove.vmstate.schema import StateError
from tests.waiting import ended, in_thread


class PlainDevice:
    """Registers are bytes; resets and detaches finish at once unless `holds_resets`."""

    def __init__(self, vectors: int = 4) -> None:
        self.config = ConfigSpace(ControllerConfig(serial="S1", msix_qsize=vectors))
        self.memory = GuestMemory()
        self.interrupts = InterruptLines(vectors, lambda: self.config.msix_enabled)
        self.bar = bytearray(self.config.layout.size)
        self.regions = [RegionInfo() for _ in range(REGION_COUNT)]
        self.regions[BAR0_REGION] = RegionInfo(len(self.bar), readable=True, writable=True)
        self.regions[CONFIG_REGION] = RegionInfo(CONFIG_SIZE, readable=True, writable=True)
        self.irq_counts = [1, 0, vectors, 0, 0]
        self.client: Client | None = None
        self.resets: list[Callable[[], None]] = []
        self.holds_resets = False
        self.fails_with: Exception | None = None
        self.detached = threading.Event()
        self.migration: Migration | None = None

    def attach(self, client: Client) -> None:
        self.client = self.memory.client = client

    def detach(self, done: Callable[[], None]) -> None:
        self.client = self.memory.client = None
        self.interrupts.disconnect()

        def released(_errno: int) -> None:
            self.detached.set()
            done()

        self.memory.unmap_all(released)

    def read(self, region: int, offset: int, count: int) -> bytes:
        if self.fails_with is not None:
            raise self.fails_with
        if region == CONFIG_REGION:
            return self.config.read(offset, count, self.interrupts.level)
        return bytes(self.bar[offset : offset + count])

    def write(self, region: int, offset: int, data: bytes) -> Reset | None:
        if region == CONFIG_REGION:
            self.config.write(offset, data)
        else:
            self.bar[offset : offset + len(data)] = data
        return None

    def map_dma(self, address: int, size: int, fd: int | None, offset: int, readable: bool, writable: bool) -> None:
        self.memory.map(address, size, fd, offset, readable, writable)

    def unmap_dma(self, address: int, size: int, unmap_all: bool, done: Callable[[int], None]) -> None:
        if unmap_all:
            self.memory.unmap_all(done)
        else:
            self.memory.unmap(address, size, done)

    def set_irqs(self, index: int, start: int, count: int, action: IrqAction) -> None:
        self.interrupts.set_irqs(index, start, count, action)

    def reset(self, done: Callable[[], None]) -> None:
        self.resets.append(done)
        if not self.holds_resets:
            done()


class MovedState:
    """A device whose state is some bytes; it notes what is asked of it."""

    def __init__(self, state: bytes = b"the state") -> None:
        self.state = state
        self.dirty: DirtyTracking | None = None
        self.calls: list[str] = []
        self.may_pause = threading.Event()
        self.may_pause.set()
        self.fails: Exception | None = None

    def pause(self) -> None:
        self.calls.append("pause")
        assert self.may_pause.wait(5)

    def resume(self) -> None:
        self.calls.append("resume")

    def save(self) -> bytes:
        self.calls.append("save")
        if self.fails:
            raise self.fails
        return self.state

    def load(self, data: bytes) -> None:
        self.calls.append("load")
        if data != self.state:
            raise StateError("not ours")

    def log_dirty(self, log: DirtyLog | None) -> None:
        if self.dirty is not None and log is not None:
            self.dirty.start_log(log)
        elif self.dirty is not None:
            self.dirty.stop_log()


@contextmanager
def served(device: PlainDevice) -> Iterator[socket.socket]:
    """Serve `device` over a socket pair; yields the client's end. On leaving, the control thread has ended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(ours, device)
    thread = in_thread(connection.serve)
    try:
        yield theirs
    finally:
        connection.shutdown()
        theirs.close()
        ended(thread)


@contextmanager
def connected(device: PlainDevice) -> Iterator[VfioUserClient]:
    """Serve `device` to a client that has negotiated."""
    with served(device) as sock, VfioUserClient(sock, timeout=5) as client:
        yield client


def noting(errors: list[str], call: Callable[[], object]) -> Callable[[], None]:
    """`call`, whose DmaError is noted."""

    def noted() -> None:
        try:
            call()
        except DmaError as error:
            errors.append(str(error))

    return noted


def ask_until(client: VfioUserClient, is_so: Callable[[], object]) -> None:
    """Ask the device for its vendor until it is so: the control thread goes on answering meanwhile."""
    while not is_so():
        assert client.config(0, 2) == b"\x36\x1b"
