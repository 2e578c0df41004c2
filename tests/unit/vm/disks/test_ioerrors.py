"""Failed requests: events, io-status, one stop of the VM, and the races of that stop with all else that stops it."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from nvmove.block.config import DriveConfig
from nvmove.block.policy import Action, ErrorPolicy, ErrorReport
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.ioerrors import IoErrors
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.moves.runstate import RunState
from tests.fake_qemu import FakeQemu, facade_on_fake

FULL = ErrorReport("d0", is_read=False, action=Action.STOP, errno=errno.ENOSPC)
BROKEN = ErrorReport("d0", is_read=True, action=Action.STOP, errno=errno.EIO)
REPORTED = ErrorReport("d0", is_read=True, action=Action.REPORT, errno=errno.EIO)
IGNORED = ErrorReport("d0", is_read=False, action=Action.IGNORE, errno=errno.EIO)
STOPPED_BY_ERROR = {"status": "io-error", "running": False}
PAUSED = {"status": "paused", "running": False}
RUNNING = {"status": "running", "running": True}


class HoldingDevice:
    """A device that retries what it holds when it resumes; `retries` is what then fails again, once each."""

    def __init__(self) -> None:
        self.held = 0
        self.is_paused = False
        self.retries: list[ErrorReport] = []
        self.on_error: Callable[[ErrorReport], None] = lambda report: None
        self.drained: list[ErrorReport] = []
        """What fails while the device is being paused."""

    def fail(self, report: ErrorReport) -> None:
        self.held += report.action is Action.STOP
        self.on_error(report)

    def pause(self, timeout: float | None = None) -> None:
        drained, self.drained = self.drained, []
        for report in drained:
            self.fail(report)
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self.held = 0
        retries, self.retries = self.retries, []
        for report in retries:
            self.fail(report)


@pytest.fixture(autouse=True, params=["nvmove's", "QEMU's"])
def owner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the image: it makes no difference."""
    monkeypatch.setattr(Scene, "export", "e0" if request.param == "QEMU's" else "")


class Scene:
    """A VM with one drive on a fake QEMU that stops and runs."""

    export = ""
    """Its export, when it is QEMU's."""
    node = "#block1"
    """The node that it is on now."""

    def __init__(self, facade: Facade, qemu: FakeQemu) -> None:
        self.facade, self.qemu = facade, qemu
        self.running = True
        self.device = HoldingDevice()
        self.runstate = RunState(facade, [self.device])
        config = DriveConfig(id="d0", file="x")
        self.drive = ServedDrive("d0", "#block1", "nv0", config, None, True, export=Scene.export)  # type: ignore[arg-type]
        qemu.answers["query-block-exports"] = [{"id": Scene.export, "node-name": Scene.node}]
        self.errors = IoErrors()
        self.errors.connect(facade, self.runstate, {"d0": self.drive})
        self.device.on_error = self.errors.report
        self.events: list[dict[str, Any]] = []
        self.tasks: list[asyncio.Task[object]] = []
        self.gate: asyncio.Event | None = None
        facade.subscribe(self, self.events.append)
        for name in ("STOP", "RESUME"):
            facade.on_event(name, self._follow)
        for name in ("stop", "cont"):
            qemu.answers[name] = self._answer(name)
        qemu.answers["query-status"] = self._status
        qemu.hmp_answers["info status"] = "VM status: running\r\n"

    def _follow(self, event: dict[str, Any]) -> None:
        self.tasks.append(asyncio.ensure_future(self.runstate.follow(event["event"])))

    async def _status(self, _arguments: Any) -> Any:
        return dict(RUNNING if self.running else PAUSED)

    def _answer(self, name: str) -> Callable[[Any], Awaitable[Any]]:
        async def answer(_arguments: Any) -> Any:
            if self.gate is not None and name == "stop":
                await self.gate.wait()
            self.set_running(name == "cont")
            return {}

        return answer

    def set_running(self, running: bool) -> None:
        """The VM's state changes, with its event; nothing when it is that already."""
        if running != self.running:
            self.running = running
            self.qemu.hmp_answers["info status"] = f"VM status: {'running' if running else 'paused'}\r\n"
            self.qemu.event("RESUME" if running else "STOP")

    def fail(self, *reports: ErrorReport) -> None:
        """Requests fail, on a thread of the device's."""
        thread = threading.Thread(target=self._fail, args=[reports])
        thread.start()
        thread.join()

    def _fail(self, reports: Iterable[ErrorReport]) -> None:
        for report in reports:
            self.device.fail(report)

    async def status(self) -> Any:
        return await self.facade.dispatch("query-status")

    async def settle(self) -> None:
        """Let everything happen that is under way, QEMU's answers included."""
        for _ in range(4):
            for _ in range(50):
                await asyncio.sleep(0)
            await self.facade.execute("query-status")
            async with self.runstate.lock:
                pass
        await asyncio.gather(*self.tasks)

    def sent(self, name: str) -> int:
        return sum(request["execute"] == name for request in self.qemu.requests)

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


def on_vm(test: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            async with asyncio.timeout(30):
                await test(Scene(facade, qemu))

    asyncio.run(main())


def test_an_error_that_stops_has_qemus_events_in_qemus_order() -> None:
    async def test(vm: Scene) -> None:
        vm.fail(FULL)
        await vm.settle()
        assert vm.names == ["BLOCK_IO_ERROR", "STOP"]
        assert list(vm.events[0]) == ["timestamp", "event", "data"]
        assert list(vm.events[0]["data"].items()) == [
            ("device", "d0"),
            ("nospace", True),
            ("node-name", "#block1"),
            ("qom-path", "/machine/peripheral/nv0"),
            ("reason", "No space left on device"),
            ("operation", "write"),
            ("action", "stop"),
        ]
        assert vm.device.is_paused

    on_vm(test)


@pytest.mark.parametrize("report", [FULL, REPORTED])
def test_the_event_names_the_node_that_a_disk_in_qemu_is_on_now(
    monkeypatch: pytest.MonkeyPatch, report: ErrorReport
) -> None:
    monkeypatch.setattr(Scene, "export", "e0")
    monkeypatch.setattr(Scene, "node", "overlay")

    async def test(vm: Scene) -> None:
        vm.fail(report)
        await vm.settle()
        assert (vm.names[0], vm.events[0]["data"]["node-name"]) == ("BLOCK_IO_ERROR", "overlay")

    on_vm(test)


def test_a_qemu_that_does_not_tell_the_node_holds_no_event_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scene, "export", "e0")

    async def test(vm: Scene) -> None:
        vm.qemu.answers["query-block-exports"] = RuntimeError("no")
        vm.fail(FULL)
        await vm.settle()
        assert vm.names == ["BLOCK_IO_ERROR", "STOP"]
        assert vm.events[0]["data"]["node-name"] == "#block1"

    on_vm(test)


def test_the_run_state_is_io_error_until_the_vm_runs() -> None:
    async def test(vm: Scene) -> None:
        assert await vm.status() == RUNNING
        vm.fail(FULL)
        await vm.settle()
        assert await vm.status() == STOPPED_BY_ERROR
        assert await vm.facade.dispatch_hmp("info status") == "VM status: paused (io-error)\r\n"
        assert vm.drive.io.value == "nospace"
        await vm.runstate.stop()
        assert await vm.status() == STOPPED_BY_ERROR, "as in QEMU, a stop of what is stopped changes nothing"
        await vm.runstate.cont()
        assert (await vm.status(), vm.drive.io.value, vm.device.held) == (RUNNING, "ok", 0)
        assert await vm.facade.dispatch_hmp("info status") == "VM status: running\r\n"
        await vm.runstate.stop()
        assert await vm.status() == PAUSED
        assert await vm.facade.dispatch_hmp("info status") == "VM status: paused\r\n"

    on_vm(test)


def test_a_client_that_asks_at_the_stop_event_is_told_io_error() -> None:
    async def test(vm: Scene) -> None:
        answers: list[asyncio.Task[Any]] = []
        vm.facade.on_event("STOP", lambda _event: answers.append(asyncio.ensure_future(vm.status())))
        vm.fail(FULL)
        await vm.settle()
        assert [await answer for answer in answers] == [STOPPED_BY_ERROR]

    on_vm(test)


def test_many_failures_stop_the_vm_once_and_the_first_makes_the_io_status() -> None:
    async def test(vm: Scene) -> None:
        vm.fail(*[FULL] * 31, BROKEN)
        await vm.settle()
        assert vm.names == ["BLOCK_IO_ERROR"] * 32 + ["STOP"], "those that stop are not throttled"
        assert vm.sent("stop") == 1
        assert vm.drive.io.value == "nospace"

    on_vm(test)


def test_failures_while_the_vm_is_stopping_cause_no_second_stop() -> None:
    async def test(vm: Scene) -> None:
        vm.gate = asyncio.Event()
        vm.fail(FULL)
        while not vm.sent("stop"):
            await asyncio.sleep(0)
        vm.fail(BROKEN, FULL)
        vm.gate.set()
        await vm.settle()
        assert (vm.names.count("STOP"), vm.sent("stop"), vm.device.held) == (1, 1, 3)
        assert await vm.status() == STOPPED_BY_ERROR
        await vm.runstate.cont()
        await vm.settle()
        assert (await vm.status(), vm.names[-1]) == (RUNNING, "RESUME")

    on_vm(test)


def test_a_retry_that_fails_stops_the_vm_again() -> None:
    async def test(vm: Scene) -> None:
        vm.fail(FULL)
        await vm.settle()
        for _ in range(3):
            vm.device.retries = [FULL]
            await vm.runstate.cont()
            await vm.settle()
            assert vm.names[-3:] == ["RESUME", "BLOCK_IO_ERROR", "STOP"]
            assert (await vm.status(), vm.drive.io.value, vm.device.held) == (STOPPED_BY_ERROR, "nospace", 1)
        await vm.runstate.cont()
        await vm.settle()
        assert (await vm.status(), vm.drive.io.value, vm.device.held) == (RUNNING, "ok", 0)

    on_vm(test)


def test_a_cont_behind_our_back_clears_the_state_and_retries() -> None:
    async def test(vm: Scene) -> None:
        vm.fail(FULL)
        await vm.settle()
        vm.set_running(True)
        await vm.settle()
        assert (await vm.status(), vm.drive.io.value, vm.device.held) == (RUNNING, "ok", 0)

    on_vm(test)


def test_a_cont_while_the_stop_is_under_way_comes_after_it_and_retries() -> None:
    async def test(vm: Scene) -> None:
        vm.gate = asyncio.Event()
        vm.fail(FULL)
        while not vm.sent("stop"):
            await asyncio.sleep(0)
        cont = asyncio.create_task(vm.runstate.cont())
        await asyncio.sleep(0)
        vm.gate.set()
        await cont
        await vm.settle()
        assert vm.names == ["BLOCK_IO_ERROR", "STOP", "RESUME"]
        assert (await vm.status(), vm.device.held, vm.device.is_paused) == (RUNNING, 0, False)

    on_vm(test)


def test_a_cont_before_the_stop_has_begun_leaves_no_vm_running_with_held_requests() -> None:
    async def test(vm: Scene) -> None:
        async with vm.runstate.lock:
            vm.fail(FULL)
            cont = asyncio.create_task(vm.runstate.cont())  # of a VM that runs still: nothing happens
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await cont
        await vm.settle()
        assert (await vm.status(), vm.device.held) == (STOPPED_BY_ERROR, 1)

    on_vm(test)


def test_an_error_while_the_user_stops_the_vm_leaves_it_paused_and_cont_retries() -> None:
    async def test(vm: Scene) -> None:
        vm.device.drained = [FULL]
        await vm.runstate.stop()
        await vm.settle()
        assert vm.sent("stop") == 1
        assert (await vm.status(), vm.drive.io.value) == (PAUSED, "nospace")
        await vm.runstate.cont()
        await vm.settle()
        assert (await vm.status(), vm.drive.io.value, vm.sent("stop")) == (RUNNING, "ok", 1)

    on_vm(test)


def test_a_vm_that_resumed_before_the_stop_could_begin_is_not_stopped() -> None:
    async def test(vm: Scene) -> None:
        async with vm.runstate.lock:  # somebody's operation
            vm.fail(FULL)
            await asyncio.sleep(0)
            vm.set_running(False)
            vm.set_running(True)
            await asyncio.sleep(0.01)
        await vm.settle()
        assert (vm.sent("stop"), await vm.status(), vm.device.held, vm.drive.io.value) == (0, RUNNING, 0, "ok")

    on_vm(test)


def test_an_error_while_the_vm_is_stopped_for_an_operation_keeps_it_stopped_after_it() -> None:
    async def test(vm: Scene) -> None:
        vm.device.drained = [FULL]
        async with vm.runstate.held() as held:
            assert held.run_on
        await vm.settle()
        assert (await vm.status(), vm.sent("cont"), vm.device.held) == (STOPPED_BY_ERROR, 0, 1)

    on_vm(test)


def test_a_loaded_state_runs_on_whatever_failed_before_it() -> None:
    async def test(vm: Scene) -> None:
        vm.device.drained = [FULL]
        async with vm.runstate.held():
            vm.runstate.forget_errors()
        await vm.settle()
        assert (await vm.status(), vm.drive.io.value) == (RUNNING, "ok")

    on_vm(test)


def test_io_error_lasts_through_an_operation_on_the_stopped_vm() -> None:
    async def test(vm: Scene) -> None:
        vm.fail(FULL)
        await vm.settle()
        async with vm.runstate.held() as held:
            assert not held.run_on
        assert await vm.status() == STOPPED_BY_ERROR

    on_vm(test)


def test_reported_and_ignored_errors_are_throttled_and_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvmove.vm.monitor.throttle.PERIOD", 1000)

    async def test(vm: Scene) -> None:
        vm.fail(REPORTED, IGNORED, REPORTED)
        await vm.settle()
        (event,) = vm.events
        assert (event["data"]["operation"], event["data"]["action"]) == ("read", "report")
        assert (await vm.status(), vm.drive.io.value) == (RUNNING, "ok")

    on_vm(test)


def test_nospace_is_told_only_where_an_error_may_stop_the_vm() -> None:
    async def test(vm: Scene) -> None:
        vm.drive.io.errors.werror = ErrorPolicy.REPORT
        vm.fail(REPORTED)
        vm.drive.io.errors.rerror = ErrorPolicy.STOP
        await vm.settle()
        vm.fail(BROKEN)
        await vm.settle()
        assert [event["data"].get("nospace") for event in vm.events if event.get("data")] == [
            False,
            False,
        ]

    on_vm(test)


@pytest.mark.parametrize(
    ("arguments", "policies"),
    [
        ({"device": "d0", "werror": "stop"}, ("stop", "report")),
        ({"device": "#block1", "rerror": "ignore"}, ("enospc", "ignore")),
        ({"device": "d0", "werror": "report", "rerror": "stop"}, ("report", "stop")),
        ({"device": "d0", "werror": "auto", "rerror": "auto"}, ("enospc", "report")),
    ],
)
def test_policies_change_while_the_vm_runs(arguments: dict[str, Any], policies: tuple[str, str]) -> None:
    async def test(vm: Scene) -> None:
        assert await vm.facade.dispatch("nvmove-set-error-policy", arguments) == {}
        errors = vm.drive.io.errors
        assert (errors.werror.value, errors.rerror.value) == policies

    on_vm(test)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Parameter 'device' is missing"),
        ({"device": "d0"}, "nvmove-set-error-policy: give werror or rerror, or both"),
        ({"device": "d9", "werror": "stop"}, "nvmove serves no drive 'd9'"),
        ({"device": "", "werror": "stop"}, "nvmove serves no drive ''"),
        ({"device": "d0", "werror": "foo"}, "Parameter 'werror' does not accept value 'foo'"),
        ({"device": "d0", "werror": "stop", "rerror": "enospc"}, "'enospc' invalid read error action"),
        ({"device": "d0", "werror": 1}, "Invalid parameter type for 'werror', expected: string"),
        ({"device": "d0", "when": "now"}, "Parameter 'when' is unexpected"),
    ],
)
def test_a_wrong_policy_is_one_clear_line_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    async def test(vm: Scene) -> None:
        with pytest.raises(QmpError) as raised:
            await vm.facade.dispatch("nvmove-set-error-policy", arguments)
        assert str(raised.value) == message
        assert (vm.drive.io.errors.werror, vm.drive.io.errors.rerror) == (ErrorPolicy.ENOSPC, ErrorPolicy.REPORT)

    on_vm(test)


def test_a_stop_that_meets_the_end_of_qemu_is_over() -> None:
    async def test(vm: Scene) -> None:
        async def gone(_arguments: Any) -> Any:
            vm.qemu.stream.close()
            await asyncio.Event().wait()

        vm.qemu.answers["query-status"] = gone
        vm.fail(FULL)
        while not vm.sent("query-status"):
            await asyncio.sleep(0)
        async with vm.runstate.lock:
            pass
        assert (vm.runstate.io_error, vm.sent("stop")) == (False, 0)

    on_vm(test)


def test_a_report_after_the_end_of_the_vm_is_nobodys() -> None:
    async def make() -> IoErrors:
        return IoErrors()

    asyncio.run(make()).report(FULL)
