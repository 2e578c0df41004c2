"""QEMU's block layer as our back end: an export for each drive, or nothing that stays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nvmove.block.backend import BackendError
from nvmove.block.config import OpenOptions
from nvmove.vm.disks import exports
from nvmove.vm.disks.exports import Export, open_exports
from nvmove.vm.monitor.facade import QmpError
from tests.disk import Disk

SOCKET = Path("/run/nbd")
TWO = [Export("d0", "n0", writable=True, name="secret0"), Export("d1", "#block3", writable=False, name="secret1")]


class Closed(Disk):
    closed = False

    def close(self) -> None:
        self.closed = True


class FakeMonitor:
    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.log: list[tuple[str, Any]] = []

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        self.log.append((name, arguments))
        if arguments is not None and self.refuses == arguments.get("name", name):
            raise QmpError("GenericError", f"no {self.refuses}")
        return {}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Closed]:
    """What was connected to, by its URI."""
    disks: dict[str, Closed] = {}

    def open_nbd(uri: str, options: OpenOptions) -> Disk:
        assert options.unmap  # what the guest gives back is for QEMU's node to keep or not
        assert options.read_only == ("secret1" in uri)
        return disks.setdefault(uri, Closed())

    monkeypatch.setattr(exports, "open_nbd", open_nbd)
    return disks


def test_without_drives_qemus_nbd_server_is_not_started() -> None:
    monitor = FakeMonitor()
    assert asyncio.run(open_exports(monitor, SOCKET, [])) == {}
    assert monitor.log == []


def test_each_drive_is_exported_by_its_node_and_connected_to(opened: dict[str, Closed]) -> None:
    monitor = FakeMonitor()
    found = asyncio.run(open_exports(monitor, SOCKET, TWO))
    assert list(opened) == [f"nbd+unix:///{name}?socket=/run/nbd" for name in ("secret0", "secret1")]
    assert list(found.values()) == list(opened.values())
    assert [name for name, _ in monitor.log] == ["nbd-server-start", "block-export-add", "block-export-add"]
    assert [arguments["node-name"] for _, arguments in monitor.log[1:]] == ["n0", "#block3"]
    assert [arguments["writable"] for _, arguments in monitor.log[1:]] == [True, False]
    assert all(arguments["allow-inactive"] for _, arguments in monitor.log[1:])


def test_an_export_and_its_node_get_the_iothread_that_is_made_for_them(opened: dict[str, Closed]) -> None:
    monitor = FakeMonitor()
    asyncio.run(open_exports(monitor, SOCKET, [Export("d0", "n0", True, "secret0", "nvmove-io0")]))
    (_, made), (_, added) = monitor.log[1:]
    assert made == {"qom-type": "iothread", "id": "nvmove-io0", "poll-max-ns": 0}
    assert (added["iothread"], added["fixed-iothread"]) == ("nvmove-io0", True)


def test_a_node_that_is_kept_in_another_thread_is_exported_from_there(opened: dict[str, Closed]) -> None:
    class Elsewhere(FakeMonitor):
        async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
            await super().execute(name, arguments)
            if arguments is not None and "iothread" in arguments:
                raise QmpError("GenericError", "Cannot change iothread of active block backend")

    monitor = Elsewhere()
    asyncio.run(open_exports(monitor, SOCKET, [Export("d0", "n0", True, "secret0", "nvmove-io0")]))
    assert list(opened) == ["nbd+unix:///secret0?socket=/run/nbd"]
    assert [name for name, _ in monitor.log][2:] == ["block-export-add"] * 2


def test_when_one_is_refused_the_others_are_closed(opened: dict[str, Closed]) -> None:
    with pytest.raises(QmpError, match="no secret1"):
        asyncio.run(open_exports(FakeMonitor("secret1"), SOCKET, TWO))
    assert [disk.closed for disk in opened.values()] == [True]


def test_when_one_cannot_be_connected_to_the_others_are_closed(
    opened: dict[str, Closed], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Closed()
    answers: list[Any] = [first]

    def open_nbd(uri: str, **_options: Any) -> Any:
        if not answers:
            raise BackendError(f"cannot connect to {uri}")
        return answers.pop()

    monkeypatch.setattr(exports, "open_nbd", open_nbd)
    with pytest.raises(BackendError, match=r"cannot connect to nbd\+unix:///secret1"):
        asyncio.run(open_exports(FakeMonitor(), SOCKET, TWO))
    assert first.closed
