"""What the tests of failing disks share: a disk that fills up, and the pause that an error causes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import Any

from nvmove.inspect import inspect
from nvmove.lab.fio import Fio, disk_complaints
from nvmove.lab.machine import Machine
from nvmove.nvme.state import vmsd
from nvmove.nvme.state.saved import HeldState
from nvmove.vmstate.source import FileSource

FIO = Fio("full", blocks=2048, iodepth=32)
"""8 MiB of writes."""


class SmallDisk:
    """A filesystem in memory that is too small for what is to come."""

    def __init__(self, path: Path, mebibytes: float) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", self._size(mebibytes), "nvmove-test", str(path)], check=True)

    def make_room(self, mebibytes: float) -> None:
        subprocess.run(["mount", "-o", f"remount,{self._size(mebibytes)}", str(self.path)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    @staticmethod
    def _size(mebibytes: float) -> str:
        return f"size={int(mebibytes * 1024)}k"


def io_status(machine: Machine, name: str = "d0") -> str:
    (found,) = (info for info in machine.qmp.execute("query-block") if info["device"] == name)
    return str(found["io-status"])


def wait_pause(machine: Machine, device: str = "nvmove0") -> dict[str, Any]:
    """Wait until an error has stopped the VM, with QEMU's events in QEMU's order; return the first error's data."""
    error = machine.qmp.wait_event("BLOCK_IO_ERROR")
    assert error["data"]["action"] == "stop"
    later = machine.qmp.wait_event("BLOCK_IO_ERROR", "STOP", "RESUME")
    while later["event"] == "BLOCK_IO_ERROR":
        later = machine.qmp.wait_event("BLOCK_IO_ERROR", "STOP", "RESUME")
    assert later["event"] == "STOP"
    assert machine.qmp.execute("query-status") == {"status": "io-error", "running": False}
    machine.qmp.execute("qom-get", {"path": error["data"]["qom-path"], "property": "type"})
    data: dict[str, Any] = error["data"]
    return data


def wait_full(machine: Machine) -> None:
    """Wait for the pause that a full disk causes."""
    error = wait_pause(machine)
    assert (error["operation"], error["nospace"], error["reason"]) == ("write", True, "No space left on device")
    assert error["device"] == "d0"
    assert io_status(machine) == "nospace"


def cont(machine: Machine) -> None:
    machine.qmp.execute("cont")
    machine.qmp.wait_event("RESUME")


def finish(machine: Machine, fio: Fio = FIO) -> None:
    """fio ends and verifies; the guest has noticed nothing."""
    fio.wait(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.qmp.status == "running"
    assert io_status(machine) == "ok"


def fault(machine: Machine, **rule: Any) -> int:
    return int(machine.qmp.execute("nvmove-fault-add", rule)["id"])


def hits(machine: Machine, rule: int) -> int:
    """How many requests a fault was used on."""
    (found,) = (found for found in machine.qmp.execute("nvmove-fault-list") if found["id"] == rule)
    return int(found["hits"])


def wait_hits(machine: Machine, rule: int, count: int, timeout: float = 120) -> None:
    """Wait until a fault was used on `count` requests."""
    deadline = time.monotonic() + timeout
    while hits(machine, rule) < count:
        assert time.monotonic() < deadline, f"{hits(machine, rule)} requests, expected {count}"
        time.sleep(0.05)


def held_commands(machine: Machine, image: Path, tag: str) -> list[HeldState]:
    """Save the stopped VM as `tag`, in `image`; return what its one device holds."""
    assert machine.qmp.hmp(f"savevm {tag}") == ""
    with contextlib.closing(FileSource(image)) as source:
        (device,) = inspect(source, tag).devices
    return vmsd.from_tree(device.tree).controller.held


def held_blocks(machine: Machine, image: Path, tag: str) -> dict[int, list[int]]:
    """As `held_commands`: the first blocks of what is held, by submission queue."""
    held: dict[int, list[int]] = {}
    for command in held_commands(machine, image, tag):
        held.setdefault(command.sqid, []).append(int.from_bytes(command.sqe[40:48], "little"))
    return held
