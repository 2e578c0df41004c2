"""The source of a migration, with a fake QEMU behind: in which order, what clients see, and what is set back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from nvmove.block.backend import BackendError
from nvmove.nvme.seams import DmaError
from nvmove.vfio.dirty import DirtyReport
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.monitor.hmp import HmpSession
from nvmove.vm.moves import migration
from nvmove.vm.moves.capabilities import EVENTS, PAUSE, RETURN_PATH, Capabilities
from nvmove.vm.moves.images import Images
from nvmove.vm.moves.migration import Migration, Stage, has_way_back
from nvmove.vm.moves.movable import Movable, MovedDevice
from nvmove.vm.moves.runstate import RunState
from nvmove.vm.moves.snapshot import SnapshotError, Snapshots
from nvmove.vmstate.dbus_daemon import BusError
from tests.fake_qemu import FakeQemu, Terminal, facade_on_fake, qmp_terminal

URI = {"uri": "unix:/there"}


class Bench:
    """A VM that runs, with one device and one raw image; `log` is what was done to them and QEMU, in order."""

    def __init__(self, facade: Facade, qemu: FakeQemu) -> None:
        self.facade = facade
        self.qemu = qemu
        self.log: list[str] = []
        self.seen: list[str] = []
        self.status = "none"
        self.capabilities = dict.fromkeys((EVENTS, PAUSE, RETURN_PATH, "postcopy-ram", "multifd"), False)
        self.mode = "normal"
        self.may_pause = threading.Event()
        self.may_pause.set()
        self.error: Exception | None = None
        """What reading the MSI-X tables raises."""
        self.bus_error = ""
        self.locked = ""
        self.broken = ""
        """Why the image cannot be flushed."""
        qemu.answers |= {
            "migrate": self._migrate,
            "migrate_cancel": self._cancel,
            "migrate-continue": self._continue,
            "migrate-set-capabilities": self._set,
            "query-migrate-capabilities": self._query,
            "query-migrate-parameters": self._parameters,
            "query-migrate": self._query_migrate,
            "query-status": self._query_status,
            "cont": self._cont,
            "stop": {},
        }
        self.images = Images([self])
        self.runstate = RunState(facade, [self], self.images)
        self.runstate.is_to_run = True
        self.users = Capabilities(facade)
        self.users.register()
        devices = [cast(MovedDevice, self)]
        vm = Movable(facade, self.runstate, cast(Snapshots, self), devices, self.images, self.users)
        self.migration = Migration(vm, self.check_bus)
        self.migration.register()
        for name in ("STOP", "RESUME"):
            facade.on_event(name, lambda event: self._follow(event["event"]))
        facade.subscribe(self, self._event)
        self.tasks: set[asyncio.Future[object]] = set()

    # what QEMU does

    async def _migrate(self, arguments: Any) -> Any:
        self.log.append(f"migrate {sorted(name for name, state in self.capabilities.items() if state)}")
        self.go("setup", "active")
        return {}

    async def _cancel(self, _arguments: Any) -> Any:
        self.go("cancelling")
        self.qemu.event("RESUME")
        self.go("cancelled")
        return {}

    async def _continue(self, _arguments: Any) -> Any:
        self.log.append("continue")
        self.go("device", "completed")
        return {}

    async def _set(self, arguments: Any) -> Any:
        self.capabilities |= {entry["capability"]: entry["state"] for entry in arguments["capabilities"]}
        return {}

    async def _query(self, _arguments: Any) -> Any:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    async def _parameters(self, _arguments: Any) -> Any:
        return {"mode": self.mode}

    async def _query_migrate(self, _arguments: Any) -> Any:
        return {"status": self.status, "ram": {"total": 100, "remaining": 40}} if self.status != "none" else {}

    async def _query_status(self, _arguments: Any) -> Any:
        return {"running": self.status != "pre-switchover", "status": "running"}

    async def _cont(self, _arguments: Any) -> Any:
        self.qemu.event("RESUME")
        return {}

    def go(self, *statuses: str) -> None:
        for status in statuses:
            self.status = status
            if self.capabilities[EVENTS]:
                self.qemu.event("MIGRATION", status=status)

    def switch_over(self) -> None:
        self.qemu.event("STOP")
        self.go("pre-switchover")

    # the device, the image, the snapshots and the bus

    def pause(self, timeout: float | None = None) -> None:
        if not self.may_pause.wait(timeout):
            raise TimeoutError
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")

    def track_dirty(self, on: bool) -> None:
        self.log.append(f"track {on}")

    def mark_dirty(self) -> DirtyReport:
        self.log.append("mark")
        return DirtyReport(3, 3, 0.0042)

    def activate(self) -> None:
        if self.locked:
            raise BackendError(self.locked)
        self.log.append("activate")

    def inactivate(self) -> None:
        if self.broken:
            raise BackendError(self.broken)
        self.log.append("inactivate")

    async def before_save(self) -> None:
        if self.error is not None:
            raise self.error
        self.log.append("tables")

    @contextlib.asynccontextmanager
    async def bus_masters(self) -> AsyncIterator[None]:
        yield

    def check_bus(self) -> None:
        if self.bus_error:
            raise BusError(self.bus_error)

    # the client

    def _follow(self, event: str) -> None:
        task = asyncio.ensure_future(self.runstate.follow(event))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "MIGRATION":
            self.seen.append(event["data"]["status"])

    async def users_set(self, **values: bool) -> None:
        listed = [{"capability": name.replace("_", "-"), "state": state} for name, state in values.items()]
        await self.facade.dispatch("migrate-set-capabilities", {"capabilities": listed})

    async def start(self) -> None:
        await self.facade.dispatch("migrate", URI)

    async def until(self, stage: Stage) -> None:
        async with asyncio.timeout(20):
            while self.migration.stage is not stage or self.tasks:
                await asyncio.sleep(0.001)

    async def begin(self, stage: Stage) -> None:
        async with asyncio.timeout(20):
            while self.migration.stage is not stage:
                await asyncio.sleep(0.001)

    async def refused(self, name: str, arguments: dict[str, Any]) -> str:
        with pytest.raises(QmpError) as raised:
            await self.facade.dispatch(name, arguments)
        return raised.value.desc

    async def shown(self) -> dict[str, Any]:
        answer: dict[str, Any] = await self.facade.dispatch("query-migrate")
        return answer


def with_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(Bench(facade, qemu))

    asyncio.run(main())


# --- the way it goes -------------------------------------------------------------------------------------------------


def test_the_steps_come_in_their_order() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        assert bench.log == ["track True", "migrate ['events', 'pause-before-switchover', 'return-path']"]
        bench.log.clear()
        bench.switch_over()
        await bench.until(Stage.IDLE)
        steps = [step for step in bench.log if step != "pause"]
        assert steps == ["tables", "mark", "inactivate", "continue", "track False"]
        assert bench.log[0] == "pause"
        assert not bench.images.taken

    with_bench(test)


def test_a_client_that_asked_for_nothing_sees_no_events_and_no_pause() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.may_pause.clear()
        bench.switch_over()
        await bench.begin(Stage.PREPARING)
        assert (await bench.shown())["status"] == "active"
        bench.may_pause.set()
        await bench.until(Stage.IDLE)
        assert bench.seen == []
        assert await bench.shown() == {
            "status": "completed",
            "ram": {"total": 100, "remaining": 40},
            "nvmove-marking": {"pages": 3, "bytes": 3, "milliseconds": 4},
        }

    with_bench(test)


def test_a_client_with_events_sees_those_of_a_migration_without_a_pause() -> None:
    async def test(bench: Bench) -> None:
        await bench.users_set(events=True)
        await bench.start()
        bench.switch_over()
        await bench.until(Stage.IDLE)
        assert bench.seen == ["setup", "active", "device", "completed"]

    with_bench(test)


def test_a_client_that_asked_for_the_pause_gets_it_when_the_devices_are_ready() -> None:
    async def test(bench: Bench) -> None:
        await bench.users_set(events=True, pause_before_switchover=True)
        await bench.start()
        bench.may_pause.clear()
        bench.switch_over()
        await bench.begin(Stage.PREPARING)
        assert (await bench.shown())["status"] == "active"
        too_early = await bench.refused("migrate-continue", {"state": "pre-switchover"})
        assert too_early == "Migration not in expected state: active"
        bench.may_pause.set()
        await bench.until(Stage.READY)
        assert bench.seen[-1] == (await bench.shown())["status"] == "pre-switchover"
        assert bench.log[-1] == "mark"
        assert await bench.facade.dispatch_hmp("migrate_continue pre-switchover") == ""
        await bench.until(Stage.IDLE)
        assert bench.seen == ["setup", "active", "pre-switchover", "device", "completed"]

    with_bench(test)


def test_afterwards_qemu_has_the_users_capabilities_again() -> None:
    async def test(bench: Bench) -> None:
        await bench.users_set(events=True, multifd=True)
        before = dict(bench.capabilities)
        await bench.start()
        assert bench.capabilities[PAUSE]
        shown = {
            entry["capability"]: entry["state"] for entry in await bench.facade.dispatch("query-migrate-capabilities")
        }
        assert shown == before
        bench.switch_over()
        await bench.until(Stage.IDLE)
        assert bench.capabilities == before

    with_bench(test)


def test_a_change_of_what_is_overridden_is_the_users_and_comes_true_afterwards() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.qemu.hmp_answers["info migrate_capabilities"] = "events: on\r\nmultifd: off\r\n"
        assert await bench.facade.dispatch_hmp("migrate_set_capability pause-before-switchover on") == ""
        assert await bench.facade.dispatch_hmp("info migrate_capabilities") == "events: off\r\nmultifd: off\r\n"
        bench.go("failing", "failed")
        await bench.until(Stage.IDLE)
        assert [name for name, state in bench.capabilities.items() if state] == [PAUSE]

    with_bench(test)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["postcopy-ram", "background-snapshot", "x-colo"])
def test_capabilities_that_our_disks_cannot_have_are_refused_when_set(name: str) -> None:
    async def test(bench: Bench) -> None:
        listed = [{"capability": name, "state": True}]
        said = await bench.refused("migrate-set-capabilities", {"capabilities": listed})
        assert said.startswith(f"Migration capability '{name}' is not supported: nvmove's disks ")
        assert await bench.facade.dispatch_hmp(f"migrate_set_capability {name} on") == f"Error: {said}\n"
        listed = [{"capability": name, "state": False}]
        assert await bench.facade.dispatch("migrate-set-capabilities", {"capabilities": listed}) == {}

    with_bench(test)


def test_what_cannot_be_is_refused_at_the_start_and_nothing_was_done() -> None:
    async def test(bench: Bench) -> None:
        bench.capabilities["postcopy-ram"] = True  # by -global
        assert "'postcopy-ram' is not supported" in await bench.refused("migrate", URI)
        bench.capabilities["postcopy-ram"] = False
        bench.runstate.autostart = False
        assert await bench.refused("migrate", URI) == "Guest is waiting for an incoming migration"
        bench.runstate.autostart = None
        bench.mode = "cpr-reboot"
        assert "mode 'cpr-reboot' is not supported" in await bench.refused("migrate", URI)
        bench.mode = "normal"
        assert "nothing to resume" in await bench.refused("migrate", URI | {"resume": True})
        cpr = {"channels": [{"channel-type": "cpr", "addr": {"transport": "socket"}}]}
        assert "cpr channel" in await bench.refused("migrate", cpr)
        bench.bus_error = "the bus is gone"
        assert await bench.refused("migrate", URI) == "the bus is gone"
        said = await bench.refused("migrate-recover", URI)
        assert said == "migrate-recover: postcopy is not possible with nvmove's disks"
        assert await bench.facade.dispatch_hmp("migrate_recover x") == f"Error: {said.replace('-', '_', 1)}\n"
        assert bench.log == []

    with_bench(test)


def test_one_migration_at_a_time_and_nothing_else_beside_it() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        assert await bench.refused("migrate", URI) == "There's a migration process in progress"
        with pytest.raises(QmpError, match="migration process in progress"):
            async with bench.runstate.held():
                pass
        bench.go("failing", "failed")
        await bench.until(Stage.IDLE)
        async with bench.runstate.held():
            pass
        await bench.start()

    with_bench(test)


def test_a_migration_waits_for_the_end_of_the_last_one_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "_ENDING_SECONDS", 0.01)

    async def test(bench: Bench) -> None:
        await bench.start()
        bench.go("cancelling")
        await bench.begin(Stage.ENDING)
        assert await bench.refused("migrate", URI) == "There's a migration process in progress"
        monkeypatch.setattr(migration, "_ENDING_SECONDS", 20)
        asyncio.get_running_loop().call_later(0.01, bench.go, "cancelled")
        await bench.start()
        assert bench.migration.stage is Stage.RUNNING

    with_bench(test)


def test_an_error_of_qemus_migrate_leaves_nothing_behind() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["migrate"] = RuntimeError("unknown migration protocol: x")
        assert await bench.refused("migrate", {"uri": "x"}) == "unknown migration protocol: x"
        assert bench.migration.stage is Stage.IDLE
        assert bench.log == ["track True", "track False"]
        assert not any(bench.capabilities.values())

    with_bench(test)


# --- other ends ------------------------------------------------------------------------------------------------------


def test_a_failure_at_the_destination_gives_the_images_back_before_the_devices_go_on() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.qemu.answers["migrate-continue"] = {}
        bench.switch_over()
        await bench.until(Stage.SWITCHED)
        assert bench.log[-1] == "inactivate"
        bench.go("failing")
        bench.qemu.event("RESUME")
        bench.go("failed")
        await bench.until(Stage.IDLE)
        assert bench.log.index("activate") < bench.log.index("resume")
        assert bench.images.taken

    with_bench(test)


def test_a_vm_that_was_paused_gets_its_images_back_too() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.qemu.answers["migrate-continue"] = {}
        bench.go("pre-switchover")
        await bench.until(Stage.SWITCHED)
        bench.go("failing", "failed")
        await bench.until(Stage.IDLE)
        assert bench.images.taken
        assert "resume" not in bench.log

    with_bench(test)


def test_an_image_that_the_destination_has_keeps_the_source_stopped(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.qemu.answers["migrate-continue"] = {}
        bench.switch_over()
        await bench.until(Stage.SWITCHED)
        bench.locked = "Failed to get the lock of /d0.raw"
        bench.go("failing")
        bench.qemu.event("RESUME")
        bench.go("failed")
        await bench.until(Stage.IDLE)
        assert "resume" not in bench.log
        assert [request["execute"] for request in bench.qemu.requests].count("stop") == 1
        assert "Failed to get the lock of /d0.raw: the VM stays stopped" in caplog.text
        with pytest.raises(QmpError, match=r"lock of /d0\.raw"):
            await bench.runstate.cont()
        bench.locked = ""
        await bench.runstate.cont()
        assert bench.log[-2:] == ["activate", "resume"]

    with_bench(test)


def test_a_cancel_while_io_does_not_end_lets_the_vm_run_on() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.may_pause.clear()
        bench.switch_over()
        await bench.begin(Stage.PREPARING)
        await bench.facade.dispatch("migrate_cancel")
        await bench.until(Stage.IDLE)
        assert bench.log[-2:] in (["resume", "track False"], ["track False", "resume"])
        assert not bench.runstate.lock.locked()
        assert bench.images.taken

    with_bench(test)


@pytest.mark.parametrize("error", [SnapshotError("too big"), DmaError("no client"), QmpError("GenericError", "no")])
def test_what_goes_wrong_on_our_side_fails_the_migration_with_its_reason(error: Exception) -> None:
    async def test(bench: Bench) -> None:
        await bench.users_set(events=True)
        bench.error = error
        await bench.start()
        bench.switch_over()
        await bench.until(Stage.IDLE)
        assert bench.seen == ["setup", "active", "failing", "failed"]
        answer = await bench.shown()
        assert (answer["status"], answer["error-desc"]) == ("failed", str(error))
        bench.qemu.hmp_answers["info migrate"] = "Status: \t\tcancelled\r\nx\r\n"
        assert await bench.facade.dispatch_hmp("info migrate") == f"Status: \t\tfailed ({error})\r\nx\r\n"
        assert bench.log[-1] in {"resume", "track False"}

    with_bench(test)


def test_an_image_that_cannot_be_flushed_fails_the_migration_and_the_vm_runs_on() -> None:
    """It would arrive without what the guest has written."""

    async def test(bench: Bench) -> None:
        bench.broken = "cannot be flushed"
        await bench.start()
        bench.switch_over()
        await bench.until(Stage.IDLE)
        assert "continue" not in bench.log
        answer = await bench.shown()
        assert (answer["status"], answer["error-desc"]) == ("failed", "cannot be flushed")
        assert bench.log[-1] in {"resume", "track False"}
        assert bench.images.taken

    with_bench(test)


def test_an_image_that_cannot_be_flushed_fails_the_users_own_switch_over_too() -> None:
    async def test(bench: Bench) -> None:
        await bench.users_set(events=True, pause_before_switchover=True)
        bench.broken = "cannot be flushed"
        await bench.start()
        bench.switch_over()
        await bench.begin(Stage.READY)
        assert await bench.refused("migrate-continue", {"state": "pre-switchover"}) == "cannot be flushed"
        await bench.until(Stage.IDLE)
        assert (await bench.shown())["status"] == "failed"
        assert bench.images.taken

    with_bench(test)


def test_a_bus_that_died_meanwhile_fails_the_migration_before_the_images_go() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.bus_error = "dbus-daemon ended"
        bench.switch_over()
        await bench.until(Stage.IDLE)
        assert (await bench.shown())["error-desc"] == "dbus-daemon ended"
        assert not {"inactivate", "continue"} & set(bench.log)

    with_bench(test)


def test_what_nobody_foresaw_fails_the_migration_and_does_not_leave_it_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(bench: Bench) -> None:
        bench.error = ValueError("an MSI-X table of 3 bytes")
        await bench.start()
        bench.switch_over()
        await bench.until(Stage.IDLE)
        assert (await bench.shown())["error-desc"] == "nvmove: internal error: an MSI-X table of 3 bytes"
        assert bench.log[-1] in {"resume", "track False"}

    with_bench(test)
    assert "Traceback" in caplog.text


def test_after_completion_cont_takes_the_vm_up_again() -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.switch_over()
        await bench.until(Stage.IDLE)
        await bench.runstate.cont()
        assert bench.log[-2:] == ["activate", "resume"]

    with_bench(test)


def test_stop_and_cont_in_the_switch_over_are_for_qemu_to_judge() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["cont"] = RuntimeError("Migration is not finalized yet")
        await bench.start()
        bench.may_pause.clear()
        bench.switch_over()
        await bench.begin(Stage.PREPARING)
        with pytest.raises(QmpError, match="not finalized"):
            await bench.runstate.cont()
        assert bench.runstate.to_save == "running"
        await bench.runstate.stop()
        assert bench.runstate.to_save == "paused"
        bench.may_pause.set()
        await bench.until(Stage.IDLE)

    with_bench(test)


def test_a_request_that_fails_in_the_switch_over_brings_the_vm_to_the_other_side_in_io_error() -> None:
    async def test(bench: Bench) -> None:
        await bench.users_set(pause_before_switchover=True)
        await bench.start()
        bench.may_pause.clear()
        bench.switch_over()
        await bench.begin(Stage.PREPARING)
        bench.runstate.stop_for_error()
        bench.may_pause.set()
        await bench.until(Stage.READY)
        assert bench.runstate.to_save == "io-error"
        await bench.facade.dispatch("migrate_cancel")
        await bench.until(Stage.IDLE)
        assert bench.runstate.to_save == "running"

    with_bench(test)


# --- HMP -------------------------------------------------------------------------------------------------------------


def test_hmp_migrate_shows_progress_and_another_terminal_can_cancel() -> None:
    async def test(bench: Bench) -> None:
        terminal = Terminal()
        terminal.start(HmpSession(bench.facade, terminal.stream).run)
        await terminal.until(b"(qemu) ")
        terminal.stream.feed(b"migrate unix:/there\r")
        await terminal.until(b"\ractive: 60 %, ")
        other = await qmp_terminal(bench.facade)
        bench.qemu.hmp_answers["migrate_cancel"] = ""
        await other.talk(b'{"execute":"migrate_cancel"}\n')
        assert b"migration cancelled\r\n" in await terminal.until(b"(qemu) ")
        await terminal.end()
        await other.end()

    with_bench(test)


def test_hmp_migrate_detached_returns_at_once_and_one_by_qmp_is_detached() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.facade.dispatch_hmp("migrate -d unix:/there") == ""
        bench.go("failing", "failed")
        await bench.until(Stage.IDLE)
        said = await bench.facade.dispatch("human-monitor-command", {"command-line": "migrate unix:/there"})
        assert said == "terminal does not allow synchronous migration, continuing detached\r\n"
        bench.go("failing", "failed")
        await bench.until(Stage.IDLE)
        bench.qemu.hmp_answers["migrate -x"] = "migrate: unsupported option -x\r\n"
        assert await bench.facade.dispatch_hmp("migrate -x") == "migrate: unsupported option -x\r\n"

    with_bench(test)


# --- the way back ----------------------------------------------------------------------------------------------------


def socket_channel(**address: Any) -> dict[str, Any]:
    return {"channels": [{"channel-type": "main", "addr": {"transport": "socket", **address}}]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"uri": "tcp:host:1"}, True),
        ({"uri": "unix:/x"}, True),
        ({"uri": "exec:cat"}, False),
        ({"uri": "file:/x"}, False),
        ({"uri": "fd:sock"}, True),
        ({"uri": "fd:pipe"}, False),
        ({"uri": "fd:98765"}, False),
        (socket_channel(type="inet"), True),
        (socket_channel(type="fd", str="sock"), True),
        (socket_channel(type="fd", str="pipe"), False),
        ({"channels": [{"channel-type": "main", "addr": {"transport": "exec"}}]}, False),
        ({"channels": "odd"}, False),
        ({}, False),
    ],
)
def test_the_destination_answers_where_the_transport_goes_both_ways(arguments: Any, expected: bool) -> None:
    assert has_way_back(arguments, {"sock"}) is expected


def test_a_descriptor_that_is_passed_by_number_or_name_may_be_a_socket() -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["getfd"] = {}
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        for name, fd in (("a", ours.fileno()), ("b", writing), ("c", ours.fileno()), ("c", writing)):
            await bench.facade.dispatch("getfd", {"fdname": name}, fd=fd)
        assert bench.migration._sockets == {"a"}
        assert has_way_back({"uri": f"fd:{ours.fileno()}"}, ())
        for fd in (reading, writing):
            os.close(fd)
        ours.close()
        theirs.close()

    with_bench(test)
