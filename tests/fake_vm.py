"""A QEMU process that is none: a fake monitor that connects to nvmove's socket as QEMU does, for tests of Machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvmove.block.config import DriveConfig
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.vm import qemu
from nvmove.vm.line.plan import Plan, PlannedDevice, PlannedDrive
from nvmove.vmstate.bus import VMStateBus
from tests.directories import short_directory
from tests.fake_qemu import FakeQemu

HOST_BRIDGE = {"bus": 0, "slot": 0, "function": 0, "qdev_id": "", "id": {"vendor": 0x8086, "device": 0x29C0}}


class FakeBus:
    """The D-Bus service, as far as Machine uses it."""

    def __init__(self) -> None:
        self.idents: list[str] = []
        self.closed = False
        self.refusal = ""

    def check(self) -> None:
        """Every service answers."""

    async def add(self, ident: str, device: object) -> None:
        self.idents.append(ident)

    def qemu_object(self) -> dict[str, str]:
        return {"qom-type": "dbus-vmstate", "id": "nvmove", "addr": "unix:path=/a,b"}

    async def close(self) -> None:
        self.closed = True


class FakeProcess:
    """A started QEMU. It connects its monitor unless it `dies_first`; `cont` makes the VM run and emits RESUME."""

    pid = 1

    def __init__(self, vm: FakeVm, arguments: Sequence[str]) -> None:
        self.vm = vm
        self.arguments = list(arguments)
        self.status: int | None = None
        self.ended = asyncio.Event()
        self.asked_to_end = 0
        self.loop = asyncio.get_running_loop()
        self._serving: asyncio.Task[None] | None = None
        if vm.dies_first is not None:
            self.die(vm.dies_first)
            return
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(vm.plan.qmp_socket))
        self.qemu = FakeQemu(connection)
        self.qemu.answers |= {
            "cont": self._cont,
            "stop": self._stop,
            "quit": self._quit,
            "query-status": self._query_status,
            "query-block": [],
            "object-add": {},
            "query-named-block-nodes": [],
            "qom-get": self._qom_get,
            "query-target": {"arch": "x86_64"},
            "query-pci": [{"bus": 0, "devices": [HOST_BRIDGE]}],
            "nbd-server-start": {},
            "block-export-add": {},
            **vm.answers,
            **dict.fromkeys(vm.dies_at, self._deadly),
        }
        self.qemu.hmp_answers |= {"info mtree -f": "  cf8-cf8 (prio 0, i/o): pci-conf-idx\r\n", **vm.hmp_answers}
        self.runs = False
        self._qtest = socket.socket(socket.AF_UNIX)
        self._qtest.connect(str(vm.plan.qtest_socket))
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=self._qtest)
        answering = asyncio.create_task(self._answer_qtest(reader, writer))
        await self.qemu.run()
        writer.close()
        await answering

    async def _answer_qtest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Every register holds the host bridge's identity."""
        while line := await reader.readline():
            writer.write(b"OK 0x29c08086\n" if line.startswith(b"in") else b"OK\n")

    async def _cont(self, _arguments: Any) -> dict[str, Any]:
        self.runs = True
        self.qemu.event("RESUME")
        self.vm.running.set()
        return {}

    async def _stop(self, _arguments: Any) -> dict[str, Any]:
        self.runs = False
        self.qemu.event("STOP")
        return {}

    async def _quit(self, _arguments: Any) -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(self.die, 0)
        return {}

    async def _qom_get(self, arguments: Any) -> Any:
        if arguments["path"] == "/machine/q35":
            return RuntimeError("Property 'q35-pcihost.addr' not found")
        return {"addr": 8, "parent_bus": "/machine/q35/pcie.0"}.get(arguments["property"], "")

    async def _query_status(self, _arguments: Any) -> dict[str, Any]:
        return {"running": self.runs, "status": "running" if self.runs else "prelaunch"}

    async def _deadly(self, _arguments: Any) -> dict[str, Any]:
        self.die(134)
        await asyncio.Event().wait()  # a dead QEMU answers nothing
        return {}

    @property
    def executed(self) -> list[str]:
        """The names of the commands that came."""
        return [request.get("execute", "") for request in self.qemu.requests]

    def die(self, status: int) -> None:
        if self.status is None:
            self.status = status
            if self.vm.dies_first is None:
                self.qemu.stream.close()
            self.ended.set()

    # what Machine uses of qemu.QemuProcess

    @property
    def running(self) -> bool:
        return self.status is None

    async def wait(self) -> int:
        await self.ended.wait()
        if self._serving is not None:
            await self._serving
        assert self.status is not None
        return self.status

    def terminate(self) -> None:
        self.asked_to_end += 1
        self.die(143)

    async def end(self, seconds: float = 10) -> int:
        self.terminate()
        return await self.wait()


class FakeVm:
    """A plan with one raw drive `d0`, and what stands in for QEMU and the bus. Use as `run(asyncio test)`."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.bus = FakeBus()
        self.process: FakeProcess | None = None
        self.dies_first: int | None = None
        """The status with which QEMU ends before it connects."""
        self.dies_at: list[str] = []
        """Commands on which QEMU dies."""
        self.answers: dict[str, Any] = {}
        """As FakeQemu's, beside those of FakeProcess."""
        self.hmp_answers: dict[str, str] = {}
        self.running = asyncio.Event()
        image = directory / "d0.raw"
        image.write_bytes(bytes(1 << 20))
        namespace = NamespaceConfig(drive="d0", uuid=uuid.UUID(int=1))
        self.plan = Plan(
            program="qemu-fake",
            arguments=("-M", "q35", "-S"),
            devices=(PlannedDevice("nv0", ControllerConfig(serial="S1", namespaces=(namespace,)), directory / "nv0"),),
            drives=(
                PlannedDrive("d0", "d0", "", "nv0", DriveConfig(id="d0", file=str(image), format="raw"), in_qemu=False),
            ),
            qmp_socket=directory / "qmp",
            qtest_socket=directory / "qtest",
        )

        async def start_bus(run_directory: Path) -> FakeBus:
            return self.bus

        async def start(program: object, arguments: Sequence[str], **_: object) -> FakeProcess:
            self.process = FakeProcess(self, arguments)
            return self.process

        monkeypatch.setattr(VMStateBus, "start", start_bus)
        monkeypatch.setattr(qemu, "start", start)

    def change(self, **changes: Any) -> None:
        """Change the plan."""
        self.plan = replace(self.plan, **changes)

    def change_drive(self, **changes: Any) -> None:
        """Change the plan's drive."""
        self.change(drives=(replace(self.plan.drives[0], **changes),))

    @property
    def qemu(self) -> FakeProcess:
        assert self.process is not None, "QEMU was not started"
        return self.process


@contextlib.contextmanager
def fake_vm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVm]:
    """A fake VM in a directory of its own, of a short name: socket paths have 107 bytes."""
    with short_directory() as directory:
        yield FakeVm(directory, monkeypatch)
