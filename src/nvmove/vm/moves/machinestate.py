"""The state of the VM as a whole that no device has: whether it is to run, and why not. It travels beside theirs.

QEMU carries its own run state, but shows it to nobody while it was told not to start (-S), as nvmove always does; and
it knows nothing of `io-error`, into which nvmove's devices bring the VM. Format: docs/reference/state-format.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nvmove.vm.moves.runstate import IO_ERROR, PAUSED, RUNNING
from nvmove.vmstate import stream
from nvmove.vmstate.machine import IDENT, VM
from nvmove.vmstate.schema import StateError

OK, NO_SPACE, FAILED = "ok", "nospace", "failed"
"""QAPI's BlockDeviceIoStatus."""

Namespace = tuple[str, int]
"""Device id and namespace id."""


class Status(Protocol):
    """A drive's `io-status`."""

    value: str


class MachineState:
    """One VM's; a service on the bus like its devices (vmstate/bus.py)."""

    def __init__(self, devices: Sequence[str]) -> None:
        """`devices`: the ids of all that nvmove serves."""
        self._devices = sorted(devices)
        self._run_state: Callable[[], str] = lambda: PAUSED
        self._drives: Mapping[Namespace, Status] = {}
        self.loaded: str | None = None
        """The run state of the state that was loaded last; None before."""
        self._statuses: dict[Namespace, str] = {}

    def connect(self, run_state: Callable[[], str], drives: Mapping[Namespace, Status]) -> None:
        """The VM is there: what tells its run state, and its drives' io-status."""
        self._run_state = run_state
        self._drives = drives

    def save(self) -> bytes:
        """See Stateful."""
        tree = {
            "run_state": self._run_state(),
            "devices": [{"id": ident} for ident in self._devices],
            "drives": [
                {"device": device, "nsid": nsid, "io_status": status.value}
                for (device, nsid), status in self._drives.items()
                if status.value != OK
            ],
        }
        return stream.dump([(stream.Section(IDENT, tree), VM)])

    def load(self, data: bytes) -> None:
        """See Stateful. Changes nothing of the VM: that is for whoever waits for the load (`loaded`, `restore`)."""
        sections = stream.load(data, {IDENT: VM})
        if len(sections) != 1:
            raise StateError(f"{len(sections)} sections instead of one")
        tree = sections[0].tree
        devices = sorted(device["id"] for device in tree["devices"])
        if devices != self._devices:
            raise StateError(f"nvme devices are {', '.join(self._devices)} here, and were {', '.join(devices)}")
        if tree["run_state"] not in (RUNNING, PAUSED, IO_ERROR):
            raise StateError(f"run state {tree['run_state']!r} is not known here")
        statuses = {(drive["device"], drive["nsid"]): drive["io_status"] for drive in tree["drives"]}
        for (device, nsid), status in statuses.items():
            if status not in (NO_SPACE, FAILED):
                raise StateError(f"{device}, namespace {nsid}: io-status {status!r} is not known here")
        self.loaded, self._statuses = tree["run_state"], statuses

    def restore(self) -> None:
        """Give the drives the io-status that was loaded."""
        for namespace, status in self._drives.items():
            status.value = self._statuses.get(namespace, OK)
