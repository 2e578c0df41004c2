"""One VM from start to end, with a QEMU that is a fake: in which order, and what is left when things go wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvmove.block.backend import BackendError
from nvmove.block.fault import FaultRule, FaultRules
from nvmove.errors import UserError
from nvmove.vm.disks import exports
from nvmove.vm.line.endpoints import MonitorEndpoint, MonitorMode, UnixAddress
from nvmove.vm.machine import Machine
from nvmove.vmstate.bus import VMStateBus
from tests.disk import Disk
from tests.fake_vm import FakeVm, fake_vm

LIMIT = 20


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVm]:
    with fake_vm(monkeypatch) as fake:
        yield fake


def run(vm: FakeVm, meanwhile: Callable[[], Awaitable[Any]] | None = None, faults: FaultRules | None = None) -> int:
    """Run the VM to its end, `meanwhile` beside it; nothing may be left, however it ends. Returns its status."""
    before = set(threading.enumerate())
    descriptors = set(os.listdir("/proc/self/fd"))

    async def main() -> int:
        async with asyncio.timeout(LIMIT):
            tasks = [asyncio.create_task(Machine(vm.plan, vm.directory, faults).run())]
            if meanwhile is not None:
                tasks.append(asyncio.ensure_future(meanwhile()))
            try:
                return (await asyncio.gather(*tasks))[0]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    try:
        return asyncio.run(main())
    finally:
        left = [thread for thread in threading.enumerate() if thread not in before and "asyncio" not in thread.name]
        assert left == []
        assert set(os.listdir("/proc/self/fd")) <= descriptors
        sockets = {path.name for path in vm.directory.iterdir() if path.is_socket()}
        assert sockets <= {"qmp", "qtest"}, "only what goes with the run directory"
        assert vm.process is None or not vm.process.running


def refused(vm: FakeVm) -> str:
    """The one line with which the VM is refused."""
    with pytest.raises(UserError) as raised:
        run(vm)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def monitor(vm: FakeVm, **more: Any) -> MonitorEndpoint:
    address = UnixAddress(str(vm.directory / "monitor"))
    options = {"wait": False, "server": True, **more}
    return MonitorEndpoint(mode=MonitorMode.CONTROL, address=address, id="mon0", **options)


def test_qemu_gets_its_arguments_and_the_way_to_the_devices_state(vm: FakeVm) -> None:
    async def meanwhile() -> None:
        await vm.running.wait()
        vm.qemu.die(7)

    assert run(vm, meanwhile) == 7
    state = ["-object", "dbus-vmstate,id=nvmove,addr=unix:path=/a,,b"]
    assert vm.qemu.arguments == ["-M", "q35", "-S", *state]
    slot = ["qom-get"] * 4  # it is closed
    asked = ["query-target", "query-pci", "human-monitor-command"]
    assert vm.qemu.executed == ["qmp_capabilities", *asked, *slot, "cont"]
    assert vm.bus.idents == ["nvmove/nv0", "nvmove-vm"]
    assert vm.bus.closed


def test_a_machine_whose_pci_state_could_not_be_given_back_is_refused_before_it_runs(vm: FakeVm) -> None:
    vm.answers["query-target"] = {"arch": "riscv64"}
    why = "nvmove does not know how to reach PCI configuration space on this riscv64 machine"
    assert refused(vm) == f"{why}: its disks could not be saved or moved"
    assert "cont" not in vm.qemu.executed


def test_with_the_users_own_s_nothing_runs_until_they_say_so(vm: FakeVm) -> None:
    vm.change(paused=True, endpoints=(monitor(vm),))

    async def meanwhile() -> None:
        reader, writer = await connected(vm)
        await reader.readline()
        writer.write(b'{"execute":"qmp_capabilities"}{"execute":"query-status"}{"execute":"quit"}')
        await reader.readline()
        assert b'"running": false' in await reader.readline()
        writer.close()

    assert run(vm, meanwhile) == 0
    assert "cont" not in vm.qemu.executed


async def connected(vm: FakeVm) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the user's monitor as soon as it listens."""
    while not (vm.directory / "monitor").exists():
        await asyncio.sleep(0.001)
    return await asyncio.open_unix_connection(vm.directory / "monitor")


# --- what is refused before QEMU ------------------------------------------------------------------------------------


def test_a_missing_image_is_refused_before_qemu(vm: FakeVm) -> None:
    vm.change_drive(config=replace_file(vm, "/absent/image"))
    assert "/absent/image" in refused(vm) and vm.process is None
    assert vm.bus.closed


def replace_file(vm: FakeVm, file: str) -> Any:
    return type(vm.plan.drives[0].config)(id="d0", file=file, format="raw")


@pytest.mark.parametrize("what", ["monitor", "device"])
def test_a_socket_that_cannot_be_is_refused_before_qemu(vm: FakeVm, what: str) -> None:
    nowhere = Path("/absent/directory/socket")
    if what == "monitor":
        vm.change(endpoints=(replace(monitor(vm), address=UnixAddress(str(nowhere))),))
    else:
        vm.change(devices=(replace(vm.plan.devices[0], socket=nowhere),))
    said = refused(vm)
    assert "/absent/directory/socket" in said and "No such file or directory" in said
    assert vm.process is None
    assert vm.bus.closed


# --- QEMU dies ------------------------------------------------------------------------------------------------------


def test_qemu_that_ends_before_it_connects_has_said_why(vm: FakeVm) -> None:
    vm.dies_first = 1
    assert run(vm) == 1


@pytest.mark.parametrize("command", ["qmp_capabilities", "cont"])
def test_qemu_that_dies_while_the_vm_is_set_up_ends_us_with_its_status(vm: FakeVm, command: str) -> None:
    vm.dies_at = [command]
    assert run(vm) == 134


@pytest.mark.parametrize("command", ["nbd-server-start", "block-export-add", "query-block"])
def test_qemu_that_dies_while_a_disk_is_exported_ends_us_with_its_status(vm: FakeVm, command: str) -> None:
    vm.change_drive(in_qemu=True, node="" if command == "query-block" else "n0")
    vm.dies_at = [command]
    assert run(vm) == 134


def test_qemu_that_dies_before_the_export_is_connected_ends_us_with_its_status(
    vm: FakeVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure to connect is only a consequence."""
    vm.change_drive(in_qemu=True, node="n0")

    def dead(uri: str, **_options: Any) -> Disk:
        vm.qemu.loop.call_soon_threadsafe(vm.qemu.die, 134)
        raise BackendError(f"cannot connect to {uri}")

    monkeypatch.setattr(exports, "open_nbd", dead)
    assert run(vm) == 134


def test_qemu_that_dies_while_a_monitor_waits_for_its_client_ends_us(vm: FakeVm) -> None:
    vm.change(endpoints=(monitor(vm, wait=True),))

    async def meanwhile() -> None:
        await until_set_up(vm)
        vm.qemu.die(134)

    assert run(vm, meanwhile) == 134


async def until_set_up(vm: FakeVm) -> None:
    """Wait until the monitor waits for its client: then the socket is there and QEMU has been connected to."""
    while vm.process is None or "qmp_capabilities" not in vm.process.executed:
        await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0.001)


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_vm_cleanly(vm: FakeVm, number: int) -> None:
    async def meanwhile() -> None:
        await vm.running.wait()
        os.kill(os.getpid(), number)

    assert run(vm, meanwhile) == 143
    assert vm.qemu.asked_to_end == 1


def test_a_signal_while_a_monitor_waits_for_its_client_ends_the_vm(vm: FakeVm) -> None:
    vm.change(endpoints=(monitor(vm, wait=True),))

    async def meanwhile() -> None:
        await until_set_up(vm)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(vm, meanwhile) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_qemu_leaves_nothing(vm: FakeVm, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    started = VMStateBus.start

    async def slow(run_directory: Path) -> Any:
        os.kill(os.getpid(), number)
        await asyncio.sleep(LIMIT)
        return await started(run_directory)

    monkeypatch.setattr(VMStateBus, "start", slow)
    assert run(vm) == 128 + number
    assert vm.process is None


# --- disks in QEMU --------------------------------------------------------------------------------------------------


def test_a_disk_in_qemu_is_exported_and_the_guest_gets_its_size(vm: FakeVm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.change_drive(in_qemu=True)
    disk = Disk(2 << 20)
    uris: list[str] = []

    def open_nbd(uri: str, **_options: Any) -> Disk:
        uris.append(uri)
        return disk

    monkeypatch.setattr(exports, "open_nbd", open_nbd)
    vm.answers["query-block"] = [{"device": "d0", "inserted": {"node-name": "#block7"}}]

    async def meanwhile() -> None:
        await vm.running.wait()
        vm.qemu.die(0)

    assert run(vm, meanwhile) == 0
    (export,) = [request["arguments"] for request in vm.qemu.qemu.requests if request["execute"] == "block-export-add"]
    assert uris == [f"nbd+unix:///{export['name']}?socket={vm.directory}/nbd"]
    assert (export["node-name"], export["writable"], export["allow-inactive"]) == ("#block7", True, True)


def test_a_node_that_qemu_does_not_have_is_one_line(vm: FakeVm) -> None:
    vm.change_drive(in_qemu=True)
    assert refused(vm) == "QEMU does not know the drive 'd0'"
    assert (vm.qemu.executed[-1], vm.qemu.asked_to_end) == ("quit", 0), "which QEMU has nothing to say about"


def test_an_export_that_qemu_refuses_is_qemus_line(vm: FakeVm) -> None:
    vm.change_drive(in_qemu=True, node="n0")
    vm.answers["block-export-add"] = RuntimeError("Cannot find device='' nor node-name='n0'")
    assert refused(vm) == "Cannot find device='' nor node-name='n0'"


# --- -loadvm --------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_missing_ends_the_vm_in_qemus_words(vm: FakeVm) -> None:
    vm.change_drive(config=read_only(vm))
    vm.change(loadvm="absent")
    vm.hmp_answers["loadvm absent"] = "Error: Device 'd0' does not have the requested snapshot 'absent'\r\n"
    assert refused(vm) == "Device 'd0' does not have the requested snapshot 'absent'"
    assert "cont" not in vm.qemu.executed
    assert vm.qemu.executed[-1] == "quit"


def read_only(vm: FakeVm) -> Any:
    config = vm.plan.drives[0].config
    return type(config)(id="d0", file=config.file, format="raw", options=type(config.options)(read_only=True))


def test_a_disk_that_cannot_hold_snapshots_refuses_loadvm(vm: FakeVm) -> None:
    vm.change(loadvm="t1")
    assert refused(vm) == "Device 'd0' is writable but does not support snapshots"


def test_a_snapshot_without_our_devices_state_is_refused(vm: FakeVm) -> None:
    vm.change_drive(config=read_only(vm))
    vm.change(loadvm="t1")
    vm.hmp_answers["loadvm t1"] = ""
    assert refused(vm) == "The snapshot holds no state of the nvmove device 'nv0'"


def test_qemu_that_dies_in_loadvm_ends_us_with_its_status(vm: FakeVm) -> None:
    vm.change_drive(config=read_only(vm))
    vm.change(loadvm="t1")
    vm.dies_at = ["human-monitor-command"]
    assert run(vm) == 134


# --- faults ---------------------------------------------------------------------------------------------------------


def test_faults_of_the_command_line_are_in_force_and_can_be_changed_by_qmp(vm: FakeVm) -> None:
    faults = FaultRules()
    faults.add(FaultRule(errno=errno.EIO, drive="d0"))
    vm.change(endpoints=(monitor(vm),))
    answers = []

    async def meanwhile() -> None:
        await vm.running.wait()
        reader, writer = await connected(vm)
        await reader.readline()
        for command in ("qmp_capabilities", "nvmove-fault-list"):
            writer.write(json.dumps({"execute": command}).encode())
            answers.append(json.loads(await reader.readline()))
        writer.close()
        vm.qemu.die(0)

    assert run(vm, meanwhile, faults) == 0
    assert answers[1] == {"return": [{"id": 1, "op": "any", "errno": "EIO", "drive": "d0", "hits": 0}]}
