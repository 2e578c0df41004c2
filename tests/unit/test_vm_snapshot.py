"""Snapshots and PCI replay against a monitor that keeps a configuration space as QEMU does."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from nvmove.nvme.seams import DmaError
from nvmove.vm.pciaddress import ConfigSpace, PciAddress, ReplayError, find
from nvmove.vm.replay import MSIX_CONTROL, read_msix_table, replay
from nvmove.vm.runstate import RunState
from nvmove.vm.snapshot import SnapshotError, Snapshots
from nvmove.vmstate.dbus_daemon import BusError

BAR = 0xFEBF_8000
TABLE = bytes(range(32))


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(test)


class FakeQemu:
    """A monitor of one function at 1:2.0: 256 bytes of config space, an MSI-X table of two vectors behind its BAR."""

    def __init__(self) -> None:
        self.config = bytearray(256)
        self.selected = 0
        self.running = True
        self.log: list[str] = []
        self.answers: dict[str, str] = {}
        self.on_hmp: dict[str, Any] = {}
        self.runstate: RunState | None = None
        self.refusal = ""
        self.bus_error = ""
        self.jobs: list[dict[str, Any]] = [{"id": "j0", "status": "concluded"}]

    def check(self) -> None:
        if self.bus_error:
            raise BusError(self.bus_error)

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        self.log.append(name)
        if name == "query-status":
            return {"running": self.running, "status": "running" if self.running else "paused"}
        if name in {"stop", "cont"}:
            self.running = name == "cont"
            if self.runstate is not None and self.running:
                await self.runstate.follow("RESUME")
        if name == "human-monitor-command":
            assert str(arguments and arguments["command-line"]).startswith("loadvm nvmove-no-snapshot-")
            self.running = False
        if name == "query-pci":
            function = {"bus": 1, "slot": 2, "function": 0, "qdev_id": "nv0"}
            bridge = {"bus": 0, "slot": 1, "function": 0, "qdev_id": "rp0", "pci_bridge": {"devices": [function]}}
            return [{"bus": 0, "devices": [bridge]}]
        if name == "query-jobs":
            return self.jobs
        return {}

    async def hmp(self, line: str) -> str:
        self.log.append(line)
        if port := re.fullmatch(r"o /([bhw]) (0x[0-9a-f]+) (0x[0-9a-f]+)", line):
            size, address, value = {"b": 1, "h": 2, "w": 4}[port[1]], int(port[2], 16), int(port[3], 16)
            if address == 0xCF8:
                self.selected = value & 0xFF
                assert value == PciAddress(1, 2, 0).config_address(self.selected)
            else:
                register = self.selected + address - 0xCFC
                self.config[register : register + size] = value.to_bytes(size, "little")
            return ""
        if line.startswith("xp /8xw "):
            if not self.config[4] & 2:
                return "Cannot access memory"
            assert int(line.rsplit(maxsplit=1)[-1], 16) == BAR + 0x2000
            words = [int.from_bytes(TABLE[at : at + 4], "little") for at in range(0, 32, 4)]
            return "\r\n".join(
                f"{BAR:016x}: " + " ".join(f"0x{word:08x}" for word in words[at : at + 4]) for at in (0, 4)
            )
        if line in self.on_hmp:
            self.on_hmp[line]()
        return self.answers.get(line, "")


class FakeDevice:
    id = "nv0"
    msix_table_offset = 0x2000

    def __init__(self, qemu: FakeQemu) -> None:
        self.qemu = qemu
        config = bytearray(256)
        config[0x10:0x18] = (BAR | 4).to_bytes(8, "little")
        config[4:6] = (0x0506).to_bytes(2, "little")
        config[MSIX_CONTROL : MSIX_CONTROL + 2] = (0x8001).to_bytes(2, "little")
        config[0x3C] = 11
        self.pci_config = bytes(config)
        self.msix_table = TABLE
        self.written: list[tuple[int, bytes]] = []
        self.loads = self.resets = 0
        self.is_paused = False
        self.state_size = 100

    def write_guest(self, address: int, data: bytes) -> None:
        assert self.qemu.config[4] & 6 == 6, "DMA needs memory decoding and bus mastering"
        self.written.append((address, data))

    def save(self) -> bytes:
        return bytes(self.state_size)

    def keep_msix_table(self, table: bytes) -> None:
        self.msix_table = table

    def pause(self, timeout: float | None = None) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False


def setup(unsaveable: tuple[str, ...] = ()) -> tuple[FakeQemu, FakeDevice, RunState, Snapshots]:
    qemu = FakeQemu()
    device = FakeDevice(qemu)
    qemu.config[:] = device.pci_config
    runstate = RunState(qemu, [device])
    qemu.runstate = runstate
    return qemu, device, runstate, Snapshots(qemu, runstate, [device], unsaveable, qemu)


def test_a_function_behind_a_bridge_is_found_by_its_id() -> None:
    answer = run(FakeQemu().execute("query-pci"))
    assert PciAddress(1, 2, 0) == find(answer, "nv0")
    with pytest.raises(ReplayError, match="'nv1'"):
        find(answer, "nv1")


def test_the_msix_table_is_read_word_by_word() -> None:
    qemu, device, _, _ = setup()
    assert run(read_msix_table(qemu.hmp, PciAddress(1, 2, 0), device.pci_config, 0x2000)) == TABLE


def test_the_msix_table_is_read_while_the_guest_has_memory_decoding_off_and_command_is_left_as_it_was() -> None:
    qemu, device, _, _ = setup()
    qemu.config[4] = 0
    config = bytearray(device.pci_config)
    config[4] = 0
    assert run(read_msix_table(qemu.hmp, PciAddress(1, 2, 0), bytes(config), 0x2000)) == TABLE
    assert qemu.config[4] == 0


@pytest.mark.parametrize(
    ("control", "command", "lowered"), [(1, 0x106, True), (0x8001, 0x106, False), (1, 0x506, False), (1, 0x104, True)]
)
def test_intx_is_lowered_before_a_save_where_the_guest_uses_it(control: int, command: int, lowered: bool) -> None:
    qemu, device, _, _ = setup()
    config = bytearray(device.pci_config)
    config[4:6] = command.to_bytes(2, "little")
    config[MSIX_CONTROL : MSIX_CONTROL + 2] = control.to_bytes(2, "little")
    assert run(read_msix_table(qemu.hmp, PciAddress(1, 2, 0), bytes(config), 0x2000)) == TABLE
    assert qemu.log.count(f"xp /1xw {BAR:#x}") == 2 * lowered


def test_a_bar_that_was_never_placed_has_a_masked_table() -> None:
    qemu, _, _, _ = setup()
    table = run(read_msix_table(qemu.hmp, PciAddress(1, 2, 0), bytes(256), 0x2000))
    assert table == bytes(12) + b"\1\0\0\0"
    assert qemu.log == []


def test_a_short_answer_is_an_error() -> None:
    qemu, device, _, _ = setup()
    qemu.config[4] = 0
    with pytest.raises(ReplayError, match="0 of the 8"):
        run(read_msix_table(qemu.hmp, PciAddress(1, 2, 0), device.pci_config, 0x2000))


def test_replay_gives_back_every_register_and_the_table() -> None:
    qemu, device, _, _ = setup()
    qemu.config[:] = bytes(256)
    run(replay(qemu.hmp, PciAddress(1, 2, 0), device))
    assert qemu.config == device.pci_config
    assert device.written == [(BAR + 0x2000, TABLE)]


def test_replay_sets_the_function_mask_while_the_table_is_written() -> None:
    qemu, device, _, _ = setup()
    run(replay(qemu.hmp, PciAddress(1, 2, 0), device))
    controls = [line for line in qemu.log if line.startswith("o /h 0xcfe")]
    assert controls == ["o /h 0xcfe 0xc001", "o /h 0xcfe 0x8001"]


def test_a_refused_port_write_is_an_error() -> None:
    qemu, _, _, _ = setup()
    qemu.answers["o /w 0xcfc 0x1"] = "nope"

    async def hmp(line: str) -> str:
        return "nope" if "0xcfc" in line else await qemu.hmp(line)

    with pytest.raises(ReplayError, match="nope"):
        run(ConfigSpace(hmp, PciAddress(1, 2, 0)).write32(0x10, 1))


def test_savevm_stops_pauses_reads_the_table_saves_and_runs_on() -> None:
    qemu, device, _, snapshots = setup()
    device.msix_table = b""
    qemu.on_hmp["savevm t1"] = lambda: qemu.log.append(f"paused {device.is_paused} running {qemu.running}")
    assert run(snapshots.save("savevm t1")) == ""
    assert "paused True running False" in qemu.log
    assert device.msix_table == TABLE
    assert qemu.running
    assert not device.is_paused


def test_savevm_of_a_paused_vm_leaves_it_paused() -> None:
    qemu, device, _, snapshots = setup()
    qemu.running = False
    run(snapshots.save("savevm t1"))
    assert "cont" not in qemu.log
    assert device.is_paused


def test_without_a_bus_nothing_is_saved_or_loaded_and_nothing_is_stopped() -> None:
    qemu, _, _, snapshots = setup()
    qemu.bus_error = "dbus-daemon ended"
    for work in (snapshots.save("savevm t"), snapshots.load("loadvm t"), snapshots.job("snapshot-save", {}, ())):
        with pytest.raises(SnapshotError, match="dbus-daemon ended"):
            run(work)
    assert qemu.log == []


def test_a_raw_disk_refuses_snapshots_in_qemus_words_and_nothing_is_stopped() -> None:
    qemu, _, _, snapshots = setup(unsaveable=("d1",))
    with pytest.raises(SnapshotError, match="Device 'd1' is writable but does not support snapshots"):
        run(snapshots.save("savevm t1"))
    assert qemu.log == []


def test_a_state_too_large_for_qemu_is_refused_before_anything_is_saved() -> None:
    qemu, device, _, snapshots = setup()
    device.state_size = (1 << 20) + 1
    with pytest.raises(SnapshotError, match="nv0 has 1048577 bytes"):
        run(snapshots.save("savevm t1"))
    assert "savevm t1" not in qemu.log
    assert qemu.running


def loaded(device: FakeDevice) -> None:
    device.resets += 1
    device.loads += 1


def test_a_running_vm_is_stopped_for_a_load_by_a_loadvm_of_nothing() -> None:
    qemu, device, _, snapshots = setup()
    qemu.on_hmp["loadvm t1"] = lambda: loaded(device)
    run(snapshots.load("loadvm t1"))
    assert "stop" not in qemu.log
    assert qemu.log.index("human-monitor-command") < qemu.log.index("loadvm t1") < qemu.log.index("cont")


def test_loadvm_replays_pci_before_it_runs_on() -> None:
    qemu, device, _, snapshots = setup()

    def load() -> None:
        loaded(device)
        qemu.config[:] = bytes(256)

    qemu.on_hmp["loadvm t1"] = load
    run(snapshots.load("loadvm t1"))
    assert qemu.config == device.pci_config
    assert qemu.log.index("o /w 0xcf8 0x80011010") < qemu.log.index("cont")


def test_a_loadvm_that_touched_nothing_lets_the_vm_run_on() -> None:
    qemu, _, _, snapshots = setup()
    qemu.answers["loadvm no"] = "Error: Snapshot 'no' does not exist in one or more devices\r\n"
    assert run(snapshots.load("loadvm no")).startswith("Error")
    assert qemu.running


def test_a_loadvm_that_failed_half_way_leaves_the_vm_stopped() -> None:
    qemu, device, _, snapshots = setup()
    qemu.answers["loadvm t1"] = "Error: Error -22 while loading VM state\r\n"
    qemu.on_hmp["loadvm t1"] = lambda: setattr(device, "resets", 1)
    run(snapshots.load("loadvm t1"))
    assert not qemu.running


REFUSED = "nvmove/nv0: serial is 'A' here, and was 'B' when saved"
FAILED = "error while loading state for instance 0x0 of device 'dbus-vmstate/dbus-vmstate': post load hook failed"


@pytest.mark.parametrize(
    ("refusal", "said", "why"),
    [
        (REFUSED, "", "nvmove device 'nv0': serial is 'A' here, and was 'B' when saved"),
        (
            "",
            "dbus_vmstate_post_load: Failed to find proxy Id 'nvmove/nv1'\r\n",
            "The snapshot holds the state of the nvmove device 'nv1', which this VM does not have",
        ),
        ("", "", "The snapshot holds the state of an nvmove device that this VM does not have"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_explained_in_one_line(refusal: str, said: str, why: str) -> None:
    qemu, device, _, snapshots = setup()

    def fail() -> None:
        device.resets = 1
        qemu.refusal = refusal

    qemu.answers["loadvm t1"] = f"{said}Error: {FAILED}\r\n"
    qemu.on_hmp["loadvm t1"] = fail
    with pytest.raises(SnapshotError, match=f"^{re.escape(why)}$"):
        run(snapshots.load("loadvm t1"))
    assert not qemu.running


def test_the_reason_of_an_earlier_refusal_explains_nothing_later() -> None:
    qemu, _, _, snapshots = setup()
    qemu.refusal = REFUSED
    qemu.answers["loadvm t1"] = f"Error: {FAILED}\r\n"
    with pytest.raises(SnapshotError, match="an nvmove device that this VM does not have"):
        run(snapshots.load("loadvm t1"))


def test_a_snapshot_job_that_a_device_refused_says_why_in_query_jobs() -> None:
    qemu, device, _, snapshots = setup()
    jobs: list[dict[str, Any]] = [
        {"id": "j0", "type": "snapshot-load", "error": FAILED},
        {"id": "j1", "type": "backup"},
    ]
    qemu.jobs = jobs

    async def story() -> None:
        await snapshots.job("snapshot-load", {"job-id": "j0", "vmstate": "n0", "devices": ["n0"]}, nodes=())
        device.resets, qemu.refusal = 1, REFUSED
        await snapshots.concluded("j0")

    run(story())
    assert not qemu.running
    error = "nvmove device 'nv0': serial is 'A' here, and was 'B' when saved"
    assert snapshots.explain(jobs) == [{**jobs[0], "error": error}, jobs[1]]
    assert snapshots.explain(jobs[1:]) == jobs[1:]
    assert snapshots.explain(jobs) == jobs, "the job was dismissed, this one is another"


def test_a_snapshot_job_of_a_snapshot_without_our_state_has_failed() -> None:
    qemu, _, _, snapshots = setup()

    async def story() -> None:
        await snapshots.job("snapshot-load", {"job-id": "j0", "vmstate": "n0", "devices": ["n0"]}, nodes=())
        await snapshots.concluded("j0")

    run(story())
    assert not qemu.running
    (job,) = snapshots.explain([{"id": "j0", "type": "snapshot-load"}])
    assert job["error"] == "The snapshot holds no state of the nvmove device 'nv0'"


def test_a_snapshot_without_our_state_is_refused_and_leaves_the_vm_stopped() -> None:
    qemu, _, _, snapshots = setup()
    with pytest.raises(SnapshotError, match="no state of the nvmove device 'nv0'"):
        run(snapshots.load("loadvm t1"))
    assert not qemu.running


def test_a_snapshot_job_runs_on_before_its_conclusion_is_told() -> None:
    qemu, device, runstate, snapshots = setup()

    async def story() -> None:
        await snapshots.job("snapshot-load", {"job-id": "j0", "vmstate": "n0", "devices": ["n0"]}, nodes=())
        assert (qemu.running, runstate.lock.locked()) == (False, True)
        loaded(device)
        await snapshots.concluded("j0")

    run(story())
    assert (qemu.running, runstate.lock.locked()) == (True, False)
    assert qemu.config == device.pci_config


def test_a_snapshot_job_whose_replay_fails_leaves_the_vm_stopped_and_the_monitor_free() -> None:
    qemu, device, runstate, snapshots = setup()

    def refuse(_address: int, _data: bytes) -> None:
        raise DmaError("the client is gone")

    device.write_guest = refuse  # type: ignore[assignment, method-assign]

    async def story() -> None:
        await snapshots.job("snapshot-load", {"job-id": "j0", "vmstate": "n0", "devices": ["n0"]}, nodes=())
        loaded(device)
        await snapshots.concluded("j0")

    run(story())
    assert (qemu.running, runstate.lock.locked()) == (False, False)


def test_a_snapshot_job_that_names_a_raw_disk_is_refused() -> None:
    _, _, _, snapshots = setup()
    with pytest.raises(SnapshotError, match="'n1' is writable"):
        run(snapshots.job("snapshot-save", {"job-id": "j0", "vmstate": "n0", "devices": ["n1"]}, nodes=("n1",)))


def test_devices_follow_stop_and_resume_events() -> None:
    _, device, runstate, _ = setup()
    seen = []
    for event in ("STOP", "RESUME"):
        run(runstate.follow(event))
        seen.append(device.is_paused)
    assert seen == [True, False]


def test_a_slow_pause_never_comes_after_the_resume_that_followed_it() -> None:
    _, device, runstate, _ = setup()
    may_pause = threading.Event()
    pause = device.pause

    def slow_pause(timeout: float | None = None) -> None:
        assert may_pause.wait(30)
        pause()

    device.pause = slow_pause  # type: ignore[method-assign]

    async def story() -> None:
        events = [asyncio.ensure_future(runstate.follow(event)) for event in ("STOP", "RESUME")]
        await asyncio.sleep(0)
        may_pause.set()
        await asyncio.gather(*events)

    run(story())
    assert not device.is_paused


def test_stop_returns_when_the_devices_are_at_rest() -> None:
    qemu, device, runstate, _ = setup()
    run(runstate.stop())
    stopped = (qemu.running, device.is_paused)
    run(runstate.cont())
    assert (stopped, (qemu.running, device.is_paused)) == ((False, True), (True, False))
