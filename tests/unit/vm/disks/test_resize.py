"""`block_resize` against a monitor that answers as QEMU: what is forwarded, in which order, what stays as it was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nvmove.block.backend import BackendError
from nvmove.block.config import OpenOptions
from nvmove.block.raw.backend import open_raw
from nvmove.vm.disks.exports import Export
from nvmove.vm.disks.resize import Disk, Resize
from nvmove.vm.monitor.facade import QmpError
from nvmove.vm.moves.runstate import RunState


class Monitor:
    """A facade of which only the commands are there."""

    def __init__(self, running: bool = True, refuses: bool = False) -> None:
        self.log: list[str] = []
        self.exports = ["nvmove-q"]
        self.node = "qnode"
        """The node that it is on now."""
        self.running = running
        self.refuses = refuses
        self.handlers: dict[str, Any] = {}
        self.hmp_handlers: dict[str, Any] = {}

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        if name == "query-status":
            return {"running": self.running}
        if name == "query-block-exports":
            return [{"id": ident, "node-name": self.node} for ident in self.exports]
        self.log.append(name)
        if name == "block-export-del":
            self.exports.remove((arguments or {})["id"])
        if name == "block-export-add":
            self.exports.append((arguments or {})["id"])
        if name == "block_resize" and self.refuses:
            raise QmpError("GenericError", "no")
        return {}

    async def hmp(self, line: str) -> str:
        self.log.append(line)
        return ""


class Device:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def pause(self, timeout: float | None = None) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")


class Image:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def resize(self, size: int) -> None:
        if size > 1 << 40:
            raise BackendError("Could not resize file: File too large")
        self.log.append(f"truncate {size}")


AROUND_EXPORT = ["pause", "block-export-del", "block_resize", "block-export-add", "refresh", "resume"]


def setup(running: bool = True, refuses: bool = False) -> Monitor:
    monitor = Monitor(running, refuses)
    runstate = RunState(monitor, [Device(monitor.log)])
    disks = [
        Disk("q", "qnode", Export("q", "qnode", True, "nvmove-q"), lambda: monitor.log.append("refresh")),
        Disk("r", "rnode", Image(monitor.log), lambda: monitor.log.append("refresh")),
    ]
    Resize(monitor, runstate, disks).register()  # type: ignore[arg-type]
    return monitor


def qmp(monitor: Monitor, **arguments: Any) -> Any:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return asyncio.run(monitor.handlers["block_resize"](monitor, named))


def hmp(monitor: Monitor, arguments: str) -> Any:
    return asyncio.run(monitor.hmp_handlers["block_resize"](monitor, arguments, print))


@pytest.mark.parametrize("name", [{"device": "q"}, {"node_name": "qnode"}])
def test_a_node_is_resized_without_its_export_while_the_devices_rest(name: dict[str, str]) -> None:
    monitor = setup()
    assert qmp(monitor, **name, size=4096) == {}
    assert monitor.log == AROUND_EXPORT


def test_a_node_that_only_its_export_holds_is_held_meanwhile() -> None:
    monitor = Monitor()
    disks = [Disk("", "qnode", Export("q", "qnode", True, "nvmove-q"), lambda: monitor.log.append("refresh"))]
    Resize(monitor, RunState(monitor, [Device(monitor.log)]), disks).register()  # type: ignore[arg-type]
    monitor.node = "overlay"
    assert qmp(monitor, node_name="overlay", size=4096) == {}
    assert monitor.log == ["pause", "blockdev-add", *AROUND_EXPORT[1:-2], "blockdev-del", *AROUND_EXPORT[-2:]]
    monitor.log.clear()
    qmp(monitor, node_name="qnode", size=4096)
    assert monitor.log == ["block_resize"], "the disk is not on that node any more: QEMU's to answer"


@pytest.mark.parametrize(("resized", "renewed"), [("a", ["a", "b", "c"]), ("b", ["b", "c"]), ("c", ["c"])])
def test_exports_stay_in_their_order(resized: str, renewed: list[str]) -> None:
    """QEMU looks for a snapshot's VM state on the first disk only."""
    monitor = Monitor()
    monitor.exports = ["nvmove-a", "nvmove-b", "nvmove-c"]
    refreshed: list[str] = []

    def disk(name: str) -> Disk:
        export = Export(name, f"{name}node", True, f"nvmove-{name}")
        return Disk(name, export.node, export, lambda: refreshed.append(name))

    disks = [disk(name) for name in "abc"]
    Resize(monitor, RunState(monitor, [Device(monitor.log)]), disks).register()  # type: ignore[arg-type]
    qmp(monitor, device=resized, size=4096)
    assert monitor.exports == ["nvmove-a", "nvmove-b", "nvmove-c"]
    assert sorted(refreshed) == renewed


def test_a_refused_resize_gives_the_export_back() -> None:
    monitor = setup(refuses=True)
    with pytest.raises(QmpError, match="no"):
        qmp(monitor, device="q", size=4096)
    assert monitor.log == AROUND_EXPORT


def test_the_devices_of_a_stopped_vm_stay_paused() -> None:
    monitor = setup(running=False)
    qmp(monitor, device="r", size=4096)
    assert monitor.log == ["pause", "truncate 4096", "refresh"]


def test_a_raw_image_that_cannot_grow_says_why_and_goes_on() -> None:
    monitor = setup()
    with pytest.raises(QmpError, match="File too large"):
        qmp(monitor, device="r", size=1 << 62)
    assert monitor.log == ["pause", "refresh", "resume"]


def test_a_negative_size_is_refused_in_qemus_words() -> None:
    monitor = setup()
    with pytest.raises(QmpError, match="Parameter 'size' expects a >0 size"):
        qmp(monitor, device="r", size=-1)
    assert monitor.log == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "r"},
        {"device": "r", "size": "x"},
        {"device": "r", "size": True},
        {"size": 1},
        {"device": "v", "size": 1},
    ],
)
def test_what_is_not_ours_or_not_whole_is_qemus(arguments: dict[str, Any]) -> None:
    monitor = setup()
    qmp(monitor, **arguments)
    assert monitor.log == ["block_resize"]


def test_hmp_counts_in_mebibytes() -> None:
    monitor = setup()
    assert hmp(monitor, "r 2") == hmp(monitor, "r 1K") == ""
    assert [line for line in monitor.log if line.startswith("truncate")] == ["truncate 2097152", "truncate 1024"]
    assert "invalid size" in hmp(monitor, "r x")


def test_hmp_of_a_node_goes_to_qemu_as_it_was_typed() -> None:
    monitor = setup()
    assert hmp(monitor, "q 24M") == ""
    assert monitor.log == ["pause", "block-export-del", "block_resize q 24M", "block-export-add", "refresh", "resume"]
    monitor.log.clear()
    hmp(monitor, "other 24M")
    assert monitor.log == ["block_resize other 24M"]


def test_a_raw_file_changes_its_length(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(bytes(4096))
    backend = open_raw(str(path))
    backend.resize(8192)
    assert (path.stat().st_size, backend.refresh_size()) == (8192, 8192)
    with pytest.raises(BackendError, match="Could not resize file: File too large"):
        backend.resize(1 << 62)
    backend.close()


def test_a_read_only_raw_file_keeps_its_length(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(bytes(4096))
    backend = open_raw(str(path), options=OpenOptions(read_only=True))
    with pytest.raises(BackendError, match="Image is read-only"):
        backend.resize(8192)
    backend.close()
