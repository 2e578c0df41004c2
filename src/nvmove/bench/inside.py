"""A device in this process with the initiator on it: for what is measured at the device itself, pausing and saving."""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvmove.bench.driver import HostDriver, Job
from nvmove.block.backend import Backend, Operation
from nvmove.block.fault import FaultRule, FaultRules, FaultyBackend
from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.device import NvmeDevice
from nvmove.engine.choice import new_engine
from nvmove.nvme.config import ControllerConfig, NamespaceConfig


@dataclass(frozen=True, slots=True)
class Inside:
    """The device, its faults, and a driver that is connected to it."""

    device: NvmeDevice
    faults: FaultRules
    driver: HostDriver

    def hold(self, requests: int) -> None:
        """Let so many writes fail as on a full disk, and be held. Raises InitiatorError."""
        self.faults.add(FaultRule(operation=Operation.WRITE, errno=errno.ENOSPC))
        job = Job(depth=requests, read_percent=0, count=requests)
        self.driver.abandon(job, lambda: self.device.held == requests)


@contextlib.contextmanager
def inside(socket: Path, disk: Backend, queues: int, entries: int = 1024) -> Iterator[Inside]:
    """A device with `queues` I/O queues on `disk`, which is closed at the end. Raises InitiatorError."""
    namespace = NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1))
    config = ControllerConfig(serial="bench", mdts=8, max_ioqpairs=64, namespaces=(namespace,))
    faults = FaultRules()
    with contextlib.ExitStack() as cleanup:
        backend = FaultyBackend(disk, faults, ["d0"])
        cleanup.callback(backend.close)
        errors = {"d0": DriveErrors(ErrorPolicy.ENOSPC, ErrorPolicy.REPORT)}
        device = NvmeDevice(config, {"d0": backend}, id="bench", engine=new_engine("bench"), errors=errors)
        cleanup.callback(device.close)
        device.start(socket)
        driver = cleanup.enter_context(HostDriver.connect(socket))
        driver.make_queues(queues, entries)
        yield Inside(device, faults, driver)
