"""A device served by a process of its own, for the host-side initiator."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from nvmove.bench.driver import DoorbellKind, HostDriver, InitiatorError, Job
from nvmove.bench.measure import Settings, marked_cpu_seconds
from nvmove.lab.machine import nvmove_command
from nvmove.lab.processes import Marked

_START_SECONDS = 30.0


class Served:
    """`nvmove serve` with one drive, from its start to its end; `driver` is connected to it."""

    def __init__(self, directory: Path, name: str, drive: str, device: str = "", memory: int = 256 << 20) -> None:
        """`drive` and `device` are what is to be added to the options of both; raises InitiatorError."""
        socket = directory / name
        self._log = directory / f"{name}.log"
        self._process = Marked.start(
            [
                *nvmove_command(),
                *("serve", "--socket", str(socket)),
                *("--drive", f"id=d0,{drive}"),
                *("--device", f"nvme,serial=bench,drive=d0,mdts=8{device}"),
            ],
            self._log,
        )
        try:
            self.driver = self._connect(socket, memory)
        except BaseException:
            self._process.kill_all()
            raise

    def _connect(self, socket: Path, memory: int) -> HostDriver:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return HostDriver.connect(socket, memory)
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.process.poll() is not None or time.monotonic() > deadline:
                    raise InitiatorError(f"nvmove serve did not start: {self._process.output.strip()}") from None
                time.sleep(0.02)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the serving process has had."""
        return marked_cpu_seconds(self._process.mark)

    def close(self) -> None:
        """Hang up and end the process."""
        self.driver.close()
        self._process.kill_all()


def doorbells_by_speed(settings: Settings, drive: str) -> list[DoorbellKind]:
    """Return the kinds of doorbells that devices offer, the quickest at depth 32 last; raises InitiatorError."""
    found = {}
    for kind in DoorbellKind:
        settings.tell(f"which doorbells are quickest: {kind.value}")
        with Served(settings.directory, "s-kind", drive, kind.device) as served:
            if kind in served.driver.offered:
                served.driver.make_queues(1, doorbells=kind)
                found[kind] = served.driver.run(Job(depth=32, seconds=min(0.5, settings.seconds))).iops
    return sorted(found, key=lambda kind: found[kind])
