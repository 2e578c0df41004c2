"""The destination of a migration, with a fake QEMU behind: what comes before the VM runs, and when it does not run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from nvmove.block.backend import BackendError
from nvmove.errors import UserError
from nvmove.vm.disks.iostatus import IoStatus
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.capabilities import EVENTS, Capabilities
from nvmove.vm.moves.images import Images
from nvmove.vm.moves.incoming import Incoming
from nvmove.vm.moves.machinestate import MachineState
from nvmove.vm.moves.movable import Movable, MovedDevice
from nvmove.vm.moves.qtest import ReplayError
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import Snapshots
from tests.fake_qemu import FakeQemu, facade_on_fake


class Bench:
    """A VM that waits for its state, with one device and one raw image."""

    id = "nv0"

    def __init__(self, facade: Facade, qemu: FakeQemu) -> None:
        self.facade = facade
        self.qemu = qemu
        self.log: list[str] = []
        self.seen: list[str] = []
        self.loads = 0
        self.locked = False
        self.error: Exception | None = None
        self.status = "inmigrate"
        self.events = False
        qemu.answers |= {
            "migrate-incoming": {},
            "migrate-set-capabilities": self._set,
            "query-migrate-capabilities": self._query,
            "query-status": self._query_status,
            "cont": self._cont,
            "stop": {},
        }
        self.images = Images([self], taken=False)
        self.runstate = RunState(facade, [self], self.images)
        self.users = Capabilities(facade)
        self.users.register()
        self.state = MachineState(["nv0"])
        self.io = IoStatus()
        devices = [cast(MovedDevice, self)]
        vm = Movable(facade, self.runstate, cast(Snapshots, self), devices, self.images, self.users)
        self.incoming = Incoming(vm, self.state)
        facade.on_event("RESUME", lambda event: self._start(self.runstate.follow("RESUME")))
        facade.subscribe(self, lambda event: self.seen.append(event.get("data", {}).get("status", event["event"])))
        self.tasks: list[asyncio.Future[object]] = []

    def _start(self, work: Any) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    async def _set(self, arguments: Any) -> Any:
        values = {one["capability"]: one["state"] for one in arguments["capabilities"]}
        self.events = values.get(EVENTS, self.events)
        return {}

    async def _query(self, _arguments: Any) -> Any:
        return [{"capability": EVENTS, "state": self.events}, {"capability": "x-colo", "state": False}]

    async def _query_status(self, _arguments: Any) -> Any:
        return {"running": False, "status": self.status}

    async def _cont(self, _arguments: Any) -> Any:
        self.log.append("cont")
        self.qemu.event("RESUME")
        return {}

    # the device, the image and the snapshots

    def pause(self, timeout: float | None = None) -> None:
        """It is paused from the start."""

    def resume(self) -> None:
        self.log.append("resume")

    def activate(self) -> None:
        if self.locked:
            raise BackendError("Failed to get the lock of /d0.raw")
        self.log.append("activate")

    def inactivate(self) -> None:
        self.log.append("inactivate")

    async def after_load(self) -> None:
        if self.error is not None:
            raise self.error
        self.log.append("replay")

    async def arrive(self, run_state: str, *, autostart: bool = True, status: str = "paused") -> None:
        """Let a VM arrive that was in `run_state`."""
        await self.incoming.prepare(autostart=autostart)
        source = MachineState(["nv0"])
        source.connect(lambda: run_state, {("nv0", 1): IoStatus(value="nospace" if run_state == "io-error" else "ok")})
        self.state.connect(lambda: "", {("nv0", 1): self.io})
        self.state.load(source.save())
        self.loads += 1
        self.come(status)
        await self.incoming.arrived()

    def come(self, status: str = "paused") -> None:
        self.status = status
        for step in ("setup", "active", "completed"):
            self.qemu.event("MIGRATION", status=step)


def with_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(Bench(facade, qemu))

    asyncio.run(main())


def test_a_vm_that_ran_runs_when_its_pci_state_and_its_images_are_there() -> None:
    async def test(bench: Bench) -> None:
        await bench.arrive("running")
        assert bench.log == ["replay", "activate", "cont", "resume"]
        assert bench.runstate.to_save == "running"
        assert bench.runstate.autostart is None
        assert not bench.events
        assert bench.qemu.requests[-1]["execute"] == "cont"  # nothing of ours is left to do when it runs

    with_bench(test)


@pytest.mark.parametrize(
    ("run_state", "autostart", "status"),
    [
        ("paused", True, "paused"),
        ("io-error", True, "paused"),
        ("running", False, "paused"),
        ("running", True, "guest-panicked"),
    ],
)
def test_a_vm_that_did_not_run_or_is_not_to_does_not(run_state: str, autostart: bool, status: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.arrive(run_state, autostart=autostart, status=status)
        assert bench.log == ["replay", "activate"]
        assert bench.runstate.io_error == (run_state == "io-error")
        assert bench.runstate.to_save == run_state
        assert bench.io.value == ("nospace" if run_state == "io-error" else "ok")

    with_bench(test)


def test_cont_and_stop_say_what_is_to_be_when_it_has_arrived() -> None:
    async def test(bench: Bench) -> None:
        await bench.incoming.prepare(autostart=True)
        wanted = []
        for command in (bench.runstate.stop, bench.runstate.cont):
            await command()
            wanted.append(bench.runstate.autostart)
        assert wanted == [False, True]
        assert bench.log == []

    with_bench(test)


def test_an_image_that_is_still_locked_keeps_it_stopped_until_cont(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        bench.locked = True
        await bench.arrive("running")
        assert bench.log == ["replay"]
        assert "Failed to get the lock of /d0.raw: the VM stays stopped, `cont` tries again" in caplog.text
        with pytest.raises(QmpError, match=r"d0\.raw"):
            await bench.runstate.cont()
        bench.locked = False
        await bench.runstate.cont()
        assert bench.log == ["replay", "activate", "cont", "resume"]

    with_bench(test)


def test_an_image_of_qemus_that_is_still_locked_keeps_it_stopped_too(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["cont"] = RuntimeError('Failed to get "write" lock')
        await bench.arrive("running")
        assert bench.log == ["replay", "activate"]
        assert 'Failed to get "write" lock: the VM stays stopped, `cont` tries again' in caplog.text

    with_bench(test)


def test_a_vm_without_our_device_is_refused() -> None:
    async def test(bench: Bench) -> None:
        await bench.incoming.prepare(autostart=True)
        bench.come()
        with pytest.raises(UserError, match="the VM that has arrived has no nvmove device 'nv0'"):
            await bench.incoming.arrived()
        assert bench.log == []

    with_bench(test)


def test_what_cannot_be_given_back_ends_it_in_one_line() -> None:
    async def test(bench: Bench) -> None:
        bench.error = ReplayError("no client is connected")
        with pytest.raises(UserError, match=r"^the VM has arrived and cannot run here: no client is connected$"):
            await bench.arrive("running")

    with_bench(test)


@pytest.mark.parametrize("wanted", [True, False])
def test_clients_learn_of_the_completion_when_the_vm_runs(wanted: bool) -> None:
    async def test(bench: Bench) -> None:
        listed = [{"capability": EVENTS, "state": wanted}, {"capability": "x", "state": False}]
        await bench.facade.dispatch("migrate-set-capabilities", {"capabilities": listed})
        await bench.arrive("running")
        assert bench.seen == (["setup", "active", "RESUME", "completed"] if wanted else ["RESUME"])
        assert bench.events == wanted

    with_bench(test)


@pytest.mark.parametrize(
    ("uri", "arguments"),
    [
        ("tcp:0:1", {"uri": "tcp:0:1"}),
        ('{"channel-type": "main", "addr": {}}', {"channels": [{"channel-type": "main", "addr": {}}]}),
        ("defer", None),
    ],
)
def test_incoming_is_what_the_command_line_says(uri: str, arguments: Any) -> None:
    async def test(bench: Bench) -> None:
        await bench.incoming.begin(uri)
        sent = [request["arguments"] for request in bench.qemu.requests if request["execute"] == "migrate-incoming"]
        assert sent == ([] if arguments is None else [arguments])

    with_bench(test)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{x", "-incoming {x: this is not JSON"),
        ('{"channel-type": "cpr"}', '-incoming {"channel-type": "cpr"}: a cpr channel is not supported'),
        ("bogus:", "-incoming bogus:: unknown migration protocol: bogus:"),
    ],
)
def test_a_way_that_cannot_be_is_refused_in_one_line(uri: str, message: str) -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["migrate-incoming"] = RuntimeError("unknown migration protocol: bogus:")
        with pytest.raises(UserError) as raised:
            await bench.incoming.begin(uri)
        assert str(raised.value).startswith(message)

    with_bench(test)


def test_migrate_incoming_by_the_monitors() -> None:
    async def test(bench: Bench) -> None:
        await bench.incoming.prepare(autostart=True)
        assert await bench.facade.dispatch("migrate-incoming", {"uri": "tcp:0:1"}) == {}
        assert await bench.facade.dispatch_hmp("migrate_incoming tcp:0:1") == ""
        bench.qemu.hmp_answers["migrate_incoming"] = "migrate_incoming: string expected\r\n"
        assert await bench.facade.dispatch_hmp("migrate_incoming") == "migrate_incoming: string expected\r\n"

    with_bench(test)
