"""The facade and its QMP server, on a fake QEMU."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nvmove.vm.monitor.facade import Event, Facade, QemuGone, QmpError
from nvmove.vm.monitor.qmpserver import QmpSession, serve_stream
from nvmove.vm.monitor.stream import Stream
from tests.fake_qemu import FakeQemu, Terminal, facade_on_fake, qmp_terminal


def with_fake(test: Callable[[Facade, FakeQemu], Awaitable[None]]) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            await test(facade, qemu)

    asyncio.run(main())


def test_the_greeting_is_qemus() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = Terminal()
        terminal.start(QmpSession(facade, terminal.stream).run)
        greeting = json.loads(await terminal.until(b"\r\n"))
        assert {"QMP": {"version": dict(facade.qmp.version), "capabilities": ["oob"]}} == greeting
        await terminal.end()

    with_fake(test)


def test_a_command_of_qemus_is_forwarded_untouched() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        value = {"z": 2**64 - 1, "a": [1, {"c": None, "b": True}], "é": "\x7f"}
        qemu.answers["some-command"] = value
        terminal = await qmp_terminal(facade)
        line = b'{"execute":"some-command","arguments":{"y":18446744073709551615,"x":[]},"id":{"k":1}}\n'
        reply = await terminal.talk(line)
        assert (
            reply
            == b'{"return": {"z": 18446744073709551615, "a": [1, {"c": null, "b": true}], "\\u00E9": "\\u007F"}, '
            + (b'"id": {"k": 1}}\r\n')
        )
        assert qemu.requests[-1]["arguments"] == {"y": 2**64 - 1, "x": []}
        assert list(qemu.requests[-1]["arguments"]) == ["y", "x"]
        await terminal.talk(b'{"execute":"some-command"}')
        assert "arguments" not in qemu.requests[-1]
        await terminal.end()

    with_fake(test)


@pytest.mark.parametrize(
    ("request_", "class_", "desc"),
    [
        ("[1]", "GenericError", "QMP input must be a JSON object"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        ('{"execute":1}', "GenericError", "QMP input member 'execute' must be a string"),
        ('{"execute":"a","exec-oob":"b"}', "GenericError", "QMP input member 'exec-oob' is unexpected"),
        ('{"execute":"a","arguments":[]}', "GenericError", "QMP input member 'arguments' must be an object"),
        ('{"execute":"a","b":1}', "GenericError", "QMP input member 'b' is unexpected"),
        ('{"execute":"nope"}', "CommandNotFound", "The command nope has not been found"),
        (
            '{"execute":"qmp_capabilities"}',
            "CommandNotFound",
            "Capabilities negotiation is already complete, command ignored",
        ),
        ("}", "GenericError", "2:1: JSON parse error, expecting value"),
    ],
)
def test_errors_are_qemus(request_: str, class_: str, desc: str) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await qmp_terminal(facade)
        assert {"error": {"class": class_, "desc": desc}} == json.loads(await terminal.talk(request_.encode()))
        await terminal.end()

    with_fake(test)


@pytest.mark.parametrize(
    ("arguments", "class_", "desc"),
    [
        ({"enable": ["foo"]}, "GenericError", "Parameter 'null' does not accept value 'foo'"),
        ({"enable": "oob"}, "GenericError", "Invalid parameter type for 'enable', expected: array"),
        ({"enable": [1]}, "GenericError", "Invalid parameter type for 'enable[0]', expected: string"),
        ({"x": 1}, "GenericError", "Parameter 'x' is unexpected"),
    ],
)
def test_negotiation_errors_are_qemus(arguments: dict[str, Any], class_: str, desc: str) -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await qmp_terminal(facade, negotiate=b"")
        request = json.dumps({"execute": "qmp_capabilities", "arguments": arguments}).encode()
        assert {"error": {"class": class_, "desc": desc}} == json.loads(await terminal.talk(request))
        await terminal.end()

    with_fake(test)


def test_before_negotiation_there_are_no_commands_and_no_events() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        terminal = await qmp_terminal(facade, negotiate=b"")
        facade.emit({"event": "EARLY"})
        reply = json.loads(await terminal.talk(b'{"execute":"stop","id":1}'))
        assert (reply["error"]["class"], reply["id"]) == ("CommandNotFound", 1)
        assert [request["execute"] for request in qemu.requests] == ["qmp_capabilities"]
        await terminal.talk(b'{"execute":"qmp_capabilities"}')
        facade.emit({"event": "LATE"})
        assert b"LATE" in await terminal.until(b"\r\n")
        await terminal.end()

    with_fake(test)


def test_events_reach_every_client_with_qemus_timestamp_and_before_later_replies() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        async def stop(_arguments: Any) -> dict[str, Any]:
            qemu.event("STOP", why=1)
            return {}

        qemu.answers["stop"] = stop
        first, second = await qmp_terminal(facade), await qmp_terminal(facade)
        event = b'{"timestamp": {"seconds": 12, "microseconds": 34}, "event": "STOP", "data": {"why": 1}}\r\n'
        assert event + b'{"return": {}}\r\n' == await first.talk(b'{"execute":"stop"}', b'{"return": {}}\r\n')
        assert event == await second.until(b"\r\n")
        await first.end()
        await second.end()

    with_fake(test)


def test_filters_change_hold_and_add_events_and_listeners_see_them_raw() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        heard: list[str] = []
        held: list[Event] = []

        def rewrite(event: Event) -> list[Event]:
            if event["event"] == "HOLD":
                held.append(event)
                return []
            return [event, {"event": "ADDED"}] if event["event"] == "TWICE" else [event]

        def broken(event: Event) -> list[Event]:
            raise ValueError(event)

        def fails(event: Event) -> None:
            raise ValueError(event)

        facade.filters += [rewrite, broken]
        facade.on_event("HOLD", lambda event: heard.append(event["event"]))
        facade.on_event(None, fails)
        end = facade.on_event(None, lambda event: heard.append(event["event"]))
        terminal = await qmp_terminal(facade)
        qemu.event("HOLD")
        qemu.event("TWICE")
        assert [b"TWICE" in await terminal.until(b"\r\n"), b"ADDED" in await terminal.until(b"\r\n")] == [True, True]
        assert (heard, len(held)) == (["HOLD", "HOLD", "TWICE"], 1)
        end()
        facade.emit(held[0])
        assert b'"seconds": 12' in await terminal.until(b"\r\n")
        await terminal.end()

    with_fake(test)


def test_our_handlers_run_one_at_a_time_and_may_call_each_other() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        running: list[str] = []
        release = asyncio.Event()

        async def slow(_facade: Facade, _arguments: Any) -> int:
            running.append("slow")
            await release.wait()
            return int(await _facade.dispatch("inner"))

        async def inner(_facade: Facade, _arguments: Any) -> int:
            running.append("inner")
            return len(running)

        facade.handlers.update({"slow": slow, "inner": inner})
        qemu.answers["query-status"] = {"running": True}
        first, second = await qmp_terminal(facade), await qmp_terminal(facade)
        first.stream.feed(b'{"execute":"slow"}')
        assert await second.talk(b'{"execute":"query-status"}') == b'{"return": {"running": true}}\r\n'
        second.stream.feed(b'{"execute":"inner"}')
        await asyncio.sleep(0)
        release.set()
        assert (await first.until(b"\r\n"), await second.until(b"\r\n")) == (b'{"return": 2}\r\n', b'{"return": 3}\r\n')
        assert running == ["slow", "inner", "inner"]
        await first.end()
        await second.end()

    with_fake(test)


def test_commands_of_one_client_keep_their_order_except_out_of_band_ones() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        release = asyncio.Event()

        async def slow(_facade: Facade, _arguments: Any) -> str:
            await release.wait()
            return "slow"

        facade.handlers["slow"] = slow
        qemu.answers.update({"fast": "fast", "now": "now"})
        terminal = await qmp_terminal(
            facade, negotiate=b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}\n'
        )
        terminal.stream.feed(b'{"execute":"slow"}\n{"execute":"fast"}\n')
        assert await terminal.talk(b'{"exec-oob":"now","id":1}\n') == b'{"return": "now", "id": 1}\r\n'
        clash = await terminal.talk(b'{"execute":"a","exec-oob":"b"}')
        assert b"QMP input member 'execute' clashes with 'exec-oob'" in clash
        release.set()
        assert await terminal.until(b'"fast"}\r\n') == b'{"return": "slow"}\r\n{"return": "fast"}\r\n'
        assert "exec-oob" in next(request for request in qemu.requests if "exec-oob" in request)
        await terminal.end()

    with_fake(test)


def test_a_handlers_own_bug_is_an_error_and_not_the_end() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        async def broken(_facade: Facade, _arguments: Any) -> None:
            raise ZeroDivisionError("oops")

        facade.handlers["broken"] = broken
        terminal = await qmp_terminal(facade)
        assert b"nvmove: internal error in 'broken': oops" in await terminal.talk(b'{"execute":"broken"}')
        await terminal.end()

    with_fake(test)


def test_human_monitor_command_of_ours_stays_ours() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        async def savevm(_facade: Facade, args: str, out: Callable[[str], None]) -> str:
            out(f"saving {args}\n")
            if args == "bad":
                raise QmpError("GenericError", "no such device")
            return "done\n"

        facade.hmp_handlers["savevm"] = savevm
        facade.hmp_handlers["info snapshots"] = savevm
        qemu.hmp_answers["info name"] = "n\r\n"
        for line, expected in (
            (" savevm  t1 ", "saving t1\ndone\n"),
            ("savevm bad", "saving bad\nError: no such device\n"),
            ("info snapshots", "saving \ndone\n"),
            ("info name", "n\r\n"),
        ):
            arguments = {"command-line": line}
            assert expected == await facade.dispatch("human-monitor-command", arguments)

    with_fake(test)


def test_descriptors_travel_with_their_command() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        qemu.answers["getfd"] = {}
        ours, theirs = socket.socketpair()
        stream = Stream.of_socket(theirs)
        task = asyncio.create_task(serve_stream(stream, QmpSession(facade, stream).run))
        readable, writable = os.pipe()
        loop = asyncio.get_running_loop()
        ours.setblocking(False)
        await loop.sock_recv(ours, 4096)
        await loop.sock_sendall(ours, b'{"execute":"qmp_capabilities"}')
        await loop.sock_recv(ours, 4096)
        socket.send_fds(ours, [b'{"execute":"getfd","arguments":{"fdname":"a"}}'], [readable, writable])
        assert await loop.sock_recv(ours, 4096) == b'{"return": {}}\r\n'
        assert len(qemu.fds) == 1
        os.write(writable, b"through")
        assert os.read(qemu.fds[0], 100) == b"through"
        for fd in (readable, writable, *qemu.fds):
            os.close(fd)
        ours.close()
        await task

    before = len(os.listdir("/proc/self/fd"))
    with_fake(test)
    assert before == len(os.listdir("/proc/self/fd"))


def test_each_of_several_commands_gets_its_own_descriptor() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        qemu.answers["getfd"] = {}
        ours, theirs = socket.socketpair()
        stream = Stream.of_socket(theirs)
        task = asyncio.create_task(serve_stream(stream, QmpSession(facade, stream).run))
        pipes = [os.pipe() for _ in range(3)]
        ours.sendall(b'{"execute":"qmp_capabilities"}')
        for readable, _writable in pipes:
            socket.send_fds(ours, [b'{"execute":"getfd","arguments":{"fdname":"a"}}'], [readable])
        answers = Stream.of_socket(ours)
        seen = b""
        while seen.count(b'{"return": {}}') < 4:
            seen += await answers.read()
        assert [os.fstat(fd).st_ino for fd in qemu.fds] == [os.fstat(readable).st_ino for readable, _ in pipes]
        answers.close()
        await task
        for fd in (*qemu.fds, *(end for both in pipes for end in both)):
            os.close(fd)

    before = len(os.listdir("/proc/self/fd"))
    with_fake(test)
    assert before == len(os.listdir("/proc/self/fd"))


def test_a_client_that_leaves_in_the_middle_does_not_stop_its_command() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        started, finished, release = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def savevm(_facade: Facade, _arguments: Any) -> None:
            started.set()
            await release.wait()
            finished.set()

        facade.handlers["savevm"] = savevm
        terminal = await qmp_terminal(facade)
        terminal.stream.feed(b'{"execute":"savevm"}{"execute":"half')
        await started.wait()
        terminal.stream.feed(b"")
        await asyncio.sleep(0)
        release.set()
        await terminal.end()
        assert finished.is_set()

    with_fake(test)


def test_the_end_of_qemu_ends_the_sessions() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        async def quit_(_arguments: Any) -> Any:
            qemu.stream.close()
            return {}

        qemu.answers["quit"] = quit_
        terminal = await qmp_terminal(facade)
        terminal.stream.feed(b'{"execute":"quit"}')
        assert terminal.task is not None
        await asyncio.wait_for(terminal.task, 20)
        with pytest.raises(QemuGone):
            await facade.execute("query-status")

    with_fake(test)


def test_a_hundred_clients_come_and_go_without_a_trace() -> None:
    async def test(facade: Facade, qemu: FakeQemu) -> None:
        qemu.answers["query-name"] = {}
        terminals = [await qmp_terminal(facade) for _ in range(100)]
        for terminal in terminals:
            terminal.stream.feed(b'{"execute":"query-name"}\n')
        for terminal in terminals:
            assert await terminal.until(b"\r\n") == b'{"return": {}}\r\n'
            await terminal.end()
        assert facade._clients == {}
        assert not [task for task in asyncio.all_tasks() if "QmpSession" in repr(task)]

    with_fake(test)
