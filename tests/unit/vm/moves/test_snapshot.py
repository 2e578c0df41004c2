"""Snapshots and PCI replay against a monitor, and a CPU's view of a configuration space and a BAR as QEMU has them."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from nvmove.vm.moves.pciaddress import ConfigSpace, ConfigSpaces, PciAddress, find
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.replay import MSIX_CONTROL, read_msix_table, replay
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import SnapshotError, Snapshots
from nvmove.vmstate.dbus_daemon import BusError

BAR = 0xFEBF_8000
WINDOW = 0xB000_0000
TABLE = bytes(range(32))


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(test)


class FakeQemu:
    """A monitor of one function at 1:2.0: 256 bytes of config space, an MSI-X table of two vectors behind its BAR."""

    def __init__(self) -> None:
        self.config = bytearray(256)
        self.latch = 0x8000_1234
        """The guest's own value of CONFIG_ADDRESS."""
        self.table = bytearray(TABLE)
        self.takes_table = True
        self.running = True
        self.status = ""
        """Its run state, where that is neither running nor paused."""
        self.log: list[str] = []
        self.answers: dict[str, str] = {}
        self.on_hmp: dict[str, Any] = {}
        self.runstate: RunState | None = None
        self.refusal = ""
        self.bus_error = ""
        self.is_numbered = True
        """The guest has given the bridge a bus number."""
        self.jobs: list[dict[str, Any]] = [{"id": "j0", "status": "concluded"}]

    def check(self) -> None:
        if self.bus_error:
            raise BusError(self.bus_error)

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        self.log.append(name)
        if name == "query-status":
            return {
                "running": self.running and not self.status,
                "status": self.status or ("running" if self.running else "paused"),
            }
        if name in {"stop", "cont"}:
            self.running = name == "cont"
            if self.runstate is not None and self.running:
                await self.runstate.follow("RESUME")
        if name == "human-monitor-command":
            assert str(arguments and arguments["command-line"]).startswith("loadvm nvmove-no-snapshot-")
            self.running = False
        if name == "query-pci" and not self.is_numbered:
            return [{"bus": 0, "devices": [{"bus": 0, "slot": 1, "function": 0, "qdev_id": "rp0", "pci_bridge": {}}]}]
        if name == "query-pci":
            function = {"bus": 1, "slot": 2, "function": 0, "qdev_id": "nv0"}
            bridge = {"bus": 0, "slot": 1, "function": 0, "qdev_id": "rp0", "pci_bridge": {"devices": [function]}}
            return [{"bus": 0, "devices": [bridge]}]
        if name == "query-jobs":
            return self.jobs
        return {}

    async def hmp(self, line: str) -> str:
        self.log.append(line)
        if line in self.on_hmp:
            self.on_hmp[line]()
        return self.answers.get(line, "")

    # What a CPU reaches.

    async def ask(self, *lines: str) -> list[str]:
        return [self._port(line) for line in lines]

    def _port(self, line: str) -> str:
        self.log.append(line)
        name, port, *value = line.split()
        size, at = {"b": 1, "w": 2, "l": 4}[name[-1]], int(port, 16)
        if at == 0xCF8:
            if name == "inl":
                return f"{self.latch:#x}"
            self.latch = int(value[0], 16)
            return ""
        register = (self.latch & 0xFF) + at - 0xCFC
        if self.latch & ~0xFF != PciAddress(1, 2, 0).config_address(0):
            return "0xffffffff"
        return self._config(register, size, int(value[0], 16) if value else None)

    def _config(self, register: int, size: int, value: int | None) -> str:
        if value is None:
            return f"{int.from_bytes(self.config[register : register + size], 'little'):#x}"
        if register >= 4:
            self.config[register : register + size] = value.to_bytes(size, "little")
        return ""

    async def read(self, address: int, size: int) -> int:
        self.log.append(f"read {address:#x}")
        if address >> 28 == 0xB:
            return int(self._config(self._windowed(address), size, None), 16)
        return 0

    async def write(self, address: int, size: int, value: int) -> None:
        self.log.append(f"write {address:#x} {value:#x}")
        self._config(self._windowed(address), size, value)

    def _windowed(self, address: int) -> int:
        assert address & ~0xFF == WINDOW + (1 << 20) + (2 << 15)
        return address & 0xFF

    async def read_bytes(self, address: int, length: int) -> bytes:
        assert (address, length) == (BAR + 0x2000, len(self.table))
        return bytes(self.table) if self.config[4] & 2 else b"\xff" * length

    async def write_bytes(self, address: int, data: bytes) -> None:
        self.log.append("table")
        if self.takes_table:
            assert await self.read_bytes(address, len(data)) == self.table, "the function does not decode memory"
            self.table[:] = data


class FakeDevice:
    id = "nv0"
    msix_table_offset = 0x2000

    def __init__(self, qemu: FakeQemu) -> None:
        self.qemu = qemu
        config = bytearray(256)
        config[:4] = b"\x36\x1b\x10\x00"
        config[0x10:0x18] = (BAR | 4).to_bytes(8, "little")
        config[4:6] = (0x0506).to_bytes(2, "little")
        config[MSIX_CONTROL : MSIX_CONTROL + 2] = (0x8001).to_bytes(2, "little")
        config[0x3C] = 11
        self.pci_config = bytes(config)
        self.msix_table = TABLE
        self.loads = self.resets = 0
        self.is_paused = False
        self.state_size = 100

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
    return qemu, device, runstate, Snapshots(qemu, ConfigSpaces(qemu, None), runstate, [device], unsaveable, qemu)


def test_a_function_behind_a_bridge_is_found_by_its_id() -> None:
    answer = run(FakeQemu().execute("query-pci"))
    assert PciAddress(1, 2, 0) == find(answer, "nv0")
    with pytest.raises(ReplayError, match="'nv1'"):
        find(answer, "nv1")


def space(qemu: FakeQemu, window: int | None = None) -> ConfigSpace:
    return ConfigSpace(ConfigSpaces(qemu, window), PciAddress(1, 2, 0))


WAYS = pytest.mark.parametrize("window", [None, WINDOW], ids=["ports", "window"])


@WAYS
def test_the_msix_table_is_read_out_of_the_bar(window: int | None) -> None:
    qemu, device, _, _ = setup()
    assert run(read_msix_table(space(qemu, window), device.pci_config, 0x2000)) == TABLE


@WAYS
def test_the_msix_table_is_read_while_the_guest_has_memory_decoding_off_and_command_is_left_as_it_was(
    window: int | None,
) -> None:
    qemu, device, _, _ = setup()
    qemu.config[4] = 0
    config = bytearray(device.pci_config)
    config[4] = 0
    assert run(read_msix_table(space(qemu, window), bytes(config), 0x2000)) == TABLE
    assert qemu.config[4] == 0


@pytest.mark.parametrize(
    ("control", "command", "lowered"), [(1, 0x106, True), (0x8001, 0x106, False), (1, 0x506, False), (1, 0x104, True)]
)
def test_intx_is_lowered_before_a_save_where_the_guest_uses_it(control: int, command: int, lowered: bool) -> None:
    qemu, device, _, _ = setup()
    config = bytearray(device.pci_config)
    config[4:6] = command.to_bytes(2, "little")
    config[MSIX_CONTROL : MSIX_CONTROL + 2] = control.to_bytes(2, "little")
    assert run(read_msix_table(space(qemu), bytes(config), 0x2000)) == TABLE
    assert qemu.log.count(f"read {BAR:#x}") == 2 * lowered


def test_a_bar_that_was_never_placed_has_a_masked_table() -> None:
    qemu, _, _, _ = setup()
    table = run(read_msix_table(space(qemu), bytes(256), 0x2000))
    assert table == bytes(12) + b"\1\0\0\0"
    assert qemu.log == []


def test_another_function_in_the_devices_place_is_an_error() -> None:
    qemu, device, _, _ = setup()
    qemu.config[:4] = b"\xff" * 4
    for work in (read_msix_table(space(qemu), device.pci_config, 0x2000), replay(space(qemu), device)):
        with pytest.raises(ReplayError, match=r"01:02\.0 is ffffffff to the guest, not 00101b36"):
            run(work)


@WAYS
def test_replay_gives_back_every_register_and_the_table(window: int | None) -> None:
    qemu, device, _, _ = setup()
    qemu.config[4:] = bytes(252)
    qemu.table[:] = bytes(32)
    run(replay(space(qemu, window), device))
    assert qemu.config == device.pci_config
    assert qemu.table == TABLE


def test_replay_of_a_function_that_no_guest_has_placed_touches_no_memory() -> None:
    qemu, device, _, _ = setup()
    device.pci_config = device.pci_config[:4] + bytes(252)
    run(replay(space(qemu), device))
    assert qemu.config == device.pci_config
    assert "table" not in qemu.log


def test_replay_sets_the_function_mask_while_the_table_is_written() -> None:
    qemu, device, _, _ = setup()
    run(replay(space(qemu), device))
    controls = [line for line in qemu.log if line.startswith("outw 0xcfe") or line == "table"]
    assert controls == ["outw 0xcfe 0xc001", "table", "outw 0xcfe 0x8001"]


def test_a_table_that_does_not_take_what_is_written_is_an_error() -> None:
    qemu, device, _, _ = setup()
    qemu.table[:] = bytes(32)
    qemu.takes_table = False
    with pytest.raises(ReplayError, match="does not hold"):
        run(replay(space(qemu), device))


def test_a_guest_stopped_between_its_two_port_accesses_finds_its_own_address() -> None:
    qemu, device, _, _ = setup()
    run(replay(space(qemu), device))
    assert qemu.latch == 0x8000_1234


PORTS = "  0000000000000cf8-0000000000000cf8 (prio 0, i/o): pci-conf-idx\r\n"
MMCFG = "  {:016x}-00000000bfffffff (prio 0, {}): pcie-mmcfg-mmio\r\n"


@pytest.mark.parametrize(
    ("target", "tree", "bus", "found"),
    [
        ("x86_64", PORTS + MMCFG.format(WINDOW, "i/o"), 1, "outl 0xcf8 0x80011000"),
        ("aarch64", MMCFG.format(WINDOW, "container"), 1, f"read {WINDOW + 0x110000:#x}"),
        ("x86_64", MMCFG.format(WINDOW, "container"), 1, "on this x86_64 machine"),  # microvm
        ("riscv64", MMCFG.format(WINDOW, "i/o"), 1, f"read {WINDOW + 0x110000:#x}"),
        ("loongarch64", MMCFG.format(WINDOW, "i/o"), 1, "on this loongarch64 machine"),
        ("aarch64", "", 1, "on this aarch64 machine"),
        ("x86_64", PORTS, 3, "does not show the function 03:02.0"),
    ],
)
def test_the_way_to_configuration_space_is_the_machines(target: str, tree: str, bus: int, found: str) -> None:
    qemu, _, _, _ = setup()
    qemu.answers["info mtree -f"] = tree
    ident = {"vendor": 0x1B36, "device": 0x10}
    query = [{"bus": bus, "devices": [{"bus": bus, "slot": 2, "function": 0, "id": ident, "qdev_id": "nv0"}]}]
    if " machine" in found or " function" in found:
        with pytest.raises(ReplayError, match=found):
            run(ConfigSpaces.of_machine(qemu, qemu.hmp, query, target))
    else:
        run(ConfigSpaces.of_machine(qemu, qemu.hmp, query, target))
        assert found in qemu.log


def test_savevm_stops_pauses_reads_the_table_saves_and_runs_on() -> None:
    qemu, device, _, snapshots = setup()
    device.msix_table = b""
    qemu.on_hmp["savevm t1"] = lambda: qemu.log.append(f"paused {device.is_paused} running {qemu.running}")
    assert run(snapshots.save("savevm t1")) == ""
    assert "paused True running False" in qemu.log
    assert device.msix_table == TABLE
    assert qemu.running
    assert not device.is_paused


STOPPED = (
    *("prelaunch", "paused", "io-error", "guest-panicked", "watchdog", "debug", "internal-error", "shutdown"),
    *("postmigrate", "restore-vm", "finish-migrate", "save-vm", "inmigrate", "colo"),
)


@pytest.mark.parametrize("verb", ["savevm t1", "loadvm t1", "snapshot-save", "snapshot-load"])
@pytest.mark.parametrize("status", ["running", "suspended", *STOPPED])
def test_each_verb_in_each_run_state_stops_what_runs_and_nothing_else(status: str, verb: str) -> None:
    """QAPI's RunState, all of it; what QEMU refuses in one of them, it says. A suspended VM runs, without its CPUs."""
    qemu, device, _, snapshots = setup()
    qemu.status = "" if status == "running" else status
    device.is_paused = status in STOPPED
    seen: list[bool] = []

    def work() -> None:
        seen.append(device.is_paused)
        if verb in {"loadvm t1", "snapshot-load"}:
            loaded(device)

    qemu.on_hmp[verb] = work

    async def job() -> None:
        await snapshots.job(verb, {"job-id": "j0", "vmstate": "n0", "devices": ["n0"]}, nodes=())
        work()
        await snapshots.concluded("j0")

    if verb.startswith("snapshot"):
        run(job())
    else:
        run(snapshots.save(verb) if verb == "savevm t1" else snapshots.load(verb))
    assert seen == [True], "at rest meanwhile"
    stops = sum(line in {"stop", "human-monitor-command"} for line in qemu.log)
    assert (stops, qemu.log.count("cont")) == ((0, 0) if status in STOPPED else (1, 1))
    assert device.is_paused == (status in STOPPED)


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
        qemu.config[4:] = bytes(252)

    qemu.on_hmp["loadvm t1"] = load
    run(snapshots.load("loadvm t1"))
    assert qemu.config == device.pci_config
    assert qemu.log.index("outl 0xcf8 0x80011010") < qemu.log.index("cont")


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

    qemu.table[:] = bytes(32)
    qemu.takes_table = False

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


def test_a_device_that_the_guest_has_not_placed_yet_needs_nothing() -> None:
    """Behind a bridge without a bus number, before the firmware has run, QEMU's query-pci shows nothing."""
    qemu, device, _, snapshots = setup()
    qemu.is_numbered = False
    with pytest.raises(ReplayError, match="does not show the device 'nv0'"):
        run(snapshots.before_save())
    device.pci_config = bytes(256)
    run(snapshots.before_save())
    run(snapshots.after_load())
    assert device.msix_table == TABLE
