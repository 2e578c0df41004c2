"""Our monitors beside stock QEMU's own, on one QEMU without a guest: the same bytes in, the same bytes out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nvmove.vm.line.endpoints import MonitorEndpoint, MonitorMode, TcpAddress, UnixAddress
from nvmove.vm.monitor.facade import Facade, QemuClient
from nvmove.vm.monitor.serving import Monitors
from nvmove.vm.monitor.stream import Stream

QMP, HMP = MonitorMode.CONTROL, MonitorMode.READLINE


class Both:
    """A client of QEMU's own monitor and one of ours."""

    def __init__(self, theirs: Stream, ours: Stream) -> None:
        self.theirs, self.ours = theirs, ours

    async def until(self, end: bytes) -> tuple[bytes, bytes]:
        return await until(self.theirs, end), await until(self.ours, end)

    async def talk(self, data: bytes, end: bytes) -> tuple[bytes, bytes]:
        self.theirs.write(data)
        self.ours.write(data)
        return await self.until(end)


async def until(stream: Stream, end: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(60):
        while not re.search(end + rb"\Z", seen):
            data = await stream.read()
            assert data, f"the end came before {end!r}: {seen!r}"
            seen += data
    return seen


async def connect(path: str) -> Stream:
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, path)
    return Stream.of_socket(connection)


class Scene:
    """QEMU with monitors of its own, and ours in front of it."""

    def __init__(self, directory: Path, facade: Facade) -> None:
        self._directory = directory
        self.facade = facade

    async def both(self, name: str) -> Both:
        return Both(await connect(f"{self._directory}/their-{name}"), await connect(f"{self._directory}/our-{name}"))


def on_qemu(sysroot: Path, test: Callable[[Scene], Awaitable[None]]) -> None:
    """Run `test` with a stock QEMU and our monitors; all of it ends with the test."""

    async def main(directory: Path) -> None:
        def endpoint(mode: MonitorMode, name: str, *, pretty: bool = False) -> MonitorEndpoint:
            address = UnixAddress(str(directory / f"our-{name}"))
            return MonitorEndpoint(mode=mode, address=address, server=True, wait=False, pretty=pretty)

        monitors = Monitors([endpoint(QMP, "qmp"), endpoint(QMP, "pretty", pretty=True), endpoint(HMP, "hmp")])
        await monitors.open()
        client = QemuClient()
        await client.start_server(str(directory / "private"))
        qemu = await asyncio.create_subprocess_exec(
            str(sysroot / "bin/qemu-system-x86_64"),
            *("-M", "q35", "-S", "-nodefaults", "-display", "none", "-qmp", f"unix:{directory}/private"),
            *("-qmp", f"unix:{directory}/their-qmp,server=on,wait=off"),
            *("-qmp-pretty", f"unix:{directory}/their-pretty,server=on,wait=off"),
            *("-monitor", f"unix:{directory}/their-hmp,server=on,wait=off"),
            *("-monitor", "telnet:127.0.0.1:0,server=on,wait=off"),
            stdin=asyncio.subprocess.DEVNULL,
        )
        try:
            await asyncio.wait_for(client.accept(), 60)
            facade = Facade(client)
            await monitors.serve(facade)
            await facade.execute("query-status")  # QEMU's main loop runs, so its own monitors answer
            await asyncio.wait_for(test(Scene(directory, facade)), 100)
        finally:
            await monitors.close()
            with contextlib.suppress(ProcessLookupError):
                qemu.kill()
            await qemu.wait()
            with contextlib.suppress(Exception):
                await client.disconnect()

    with tempfile.TemporaryDirectory(prefix="nvmove-") as directory:
        asyncio.run(main(Path(directory)))


REQUESTS = [
    b'{"execute":"query-status"}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":[1]}}',
    b'{"execute":"qmp_capabilities","arguments":{"x":1}}',
    b'{"exec-oob":"qmp_capabilities"}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}',
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"query-status","id":{"a":[18446744073709551615,-1,null,true,1.5]}}',
    b'{"execute":"query-qmp-schema"}',
    b'{"execute":"query-memdev"}{"execute":"query-cpus-fast"}',
    b'{"exec-oob":"query-status","id":3}',
    b'{"exec-oob":"query-yank","id":3}',
    b'{"execute":"x","exec-oob":"y"}',
    b'{"exec-oob":4}',
    b"[1]",
    b"null",
    b"{}",
    b'{"execute":1}',
    b'{"execute":"stop","arguments":[]}',
    b'{"execute":"stop","arguments":{"y":2},"id":"z"}',
    b'{"execute":"stop","foo":1,"id":1}',
    b'{"execute":"nope"}',
    b"{'execute':'query-name','id':'\xc3\xa9\\u20ac\\ud83d\\ude00\\u007f'}",
    b"foo",
    b"}",
    b"]",
    b'{"a":}',
    b'{"a":1,}',
    b"{,}",
    b'{"a" 1}',
    b'{"a":1 "b":2}',
    b"{1:2}",
    b"[1 2]",
    b"[1,]",
    b'{"a":{"b":[1,2}}]',
    b'{"a":1,"a":2}',
    b'{"a":"\xff"}',
    b'{"a":"\x01"}',
    b'{"a":\x00}',
    b'{"a":"\\q"}',
    b'{"a":"\\u12"}',
    b'{"a":"\\ud800"}',
    b'{"a":"\\ud800\\u0041"}',
    b'{"a":"\\udc00"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":tru}',
    b'{"a":01}',
    b'{"a":1.}',
    b'{"a":-}',
    b'{"a":Foo}',
    b"%d",
    b"'a",
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info version"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":1}}',
    b'{"execute":"human-monitor-command"}',
    b"[" * 1100 + b"]" * 1100,
    b'{"execute":"getfd","arguments":{"fdname":"a"}}',
    b'{"execute":"qom-set","arguments":{"path":"/machine","property":"nope","value":18446744073709551615}}',
]


@pytest.mark.parametrize("name", ["qmp", "pretty"])
def test_qmp_answers_are_qemus(sysroot: Path, name: str) -> None:
    async def test(scene: Scene) -> None:
        both = await scene.both(name)
        theirs, ours = await both.until(rb"\r\n}?\r\n" if name == "pretty" else rb"\r\n")
        assert theirs == ours
        for number, request in enumerate(REQUESTS):
            # The fence is answered last whatever the request was, before negotiation by an error.
            fence = b'\n{"execute":"query-name","id":"fence %d"}\n' % number
            ends = rb'"fence %d".*\r\n' % number if name == "qmp" else rb'(?s)"fence %d".*\r\n}\r\n' % number
            theirs, ours = await both.talk(request + fence, ends)
            assert theirs == ours, request[:100]
        both.theirs.close()
        both.ours.close()

    on_qemu(sysroot, test)


LINES = [
    b"info status\n",
    b"in\tna\t\n",
    b"inxo\x7f\x7ffo status\n",
    b"\x1b[A\n",
    b"\x1b[A\x1b[A\x1b[B\x1b[D\x1b[DZ\x01A\x05E\n",
    b"one two three\x17\x17\x02\x02\x06\x04\x15\n",
    b"\x1bOA\x1bOH\x1bOF\x1b[1~\x1b[3~\x1b[4~\x10\x0e\n",
    b"abc\x0cdef\n",
    b"s\t\n",
    b"nbd_\td\n",
    b"info sta\ttus\n",
    b"help sto\t\n",
    b"nosuch foo\n",
    b"info nosuch\n",
    b"stop extra\n",
    b"x\n",
    b"#x\n",
    b"ab\x9bDc\n",
    "é\n".encode(),
    b"\x1b\x1b[Aq\x03\x00\n",
    b"info qtree\n",
    b"info mtree\n",
    b"help\n",
    b"cpu 3\n",
    b"cpu 0\n",
    b"info cpus\n",
    b"info history\n",
    b"   \n",
]


def test_hmp_echo_and_output_are_qemus(sysroot: Path) -> None:
    async def test(scene: Scene) -> None:
        both = await scene.both("hmp")
        theirs, ours = await both.until(rb"\(qemu\) ")
        assert theirs == ours
        for line in LINES:
            theirs, ours = await both.talk(line, rb"\r\n\(qemu\) ")
            # A Tab draws a prompt too, so there may be more.
            theirs, ours = theirs + await rest(both.theirs), ours + await rest(both.ours)
            assert theirs == ours, line
        both.theirs.write(b"\xff")
        theirs, ours = await both.talk(b"info name\ninfo version\ninfo name\n", rb"(?s)(\(qemu\) .*){3}")
        both.theirs.close()
        both.ours.close()

    async def rest(stream: Stream) -> bytes:
        seen = b""
        with contextlib.suppress(TimeoutError):
            while data := await asyncio.wait_for(stream.read(), 0.1):
                seen += data
        return seen

    on_qemu(sysroot, test)


def test_events_have_qemus_form_and_order(sysroot: Path) -> None:
    async def test(scene: Scene) -> None:
        both = await scene.both("qmp")
        await both.until(rb"\r\n")
        await both.talk(b'{"execute":"qmp_capabilities"}', rb"\r\n")
        both.theirs.write(b'{"execute":"cont"}')
        first, second = await both.until(rb"RESUME.*\r\n(\{.return.*\r\n)?")
        events = [next(line for line in part.split(b"\r\n") if b"RESUME" in line) for part in (first, second)]
        assert events[0] == events[1]
        both.ours.write(b'{"execute":"stop","id":1}')
        answer = await until(both.ours, rb'"id": 1}\r\n')
        assert answer.index(b'"STOP"') < answer.index(b'"return"')
        both.theirs.close()
        both.ours.close()

    on_qemu(sysroot, test)


def test_a_descriptor_reaches_qemu_through_us(sysroot: Path) -> None:
    async def test(scene: Scene) -> None:
        both = await scene.both("qmp")
        both.theirs.close()
        await until(both.ours, rb"\r\n")
        both.ours.write(b'{"execute":"qmp_capabilities"}')
        await until(both.ours, rb"\r\n")
        assert both.ours._socket is not None
        with open(os.devnull) as null:
            socket.send_fds(both.ours._socket, [b'{"execute":"add-fd","arguments":{"fdset-id":7}}'], [null.fileno()])
            assert json.loads(await until(both.ours, rb"\r\n"))["return"]["fdset-id"] == 7
            socket.send_fds(both.ours._socket, [b'{"execute":"getfd","arguments":{"fdname":"n"}}'], [null.fileno()])
            assert json.loads(await until(both.ours, rb"\r\n")) == {"return": {}}
        both.ours.write(b'{"execute":"closefd","arguments":{"fdname":"n"}}')
        assert json.loads(await until(both.ours, rb"\r\n")) == {"return": {}}
        both.ours.close()

    on_qemu(sysroot, test)


def test_telnet_begins_as_qemus(sysroot: Path) -> None:
    async def test(scene: Scene) -> None:
        description = await scene.facade.execute("query-chardev")
        where = next(entry["filename"] for entry in description if "telnet" in entry["filename"])
        port = int(where.split(",")[0].rsplit(":", 1)[1])
        address = TcpAddress("127.0.0.1", "0")
        monitors = Monitors([MonitorEndpoint(mode=HMP, address=address, server=True, wait=False, telnet=True)])
        await monitors.open()
        await monitors.serve(scene.facade)
        our_port = int(monitors._served[0]._source.label.split(",")[0].rsplit(":", 1)[1])
        greetings = []
        for target in (port, our_port):
            connection = socket.socket()
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", target))
            stream = Stream.of_socket(connection)
            greetings.append(await until(stream, rb"\(qemu\) "))
            stream.close()
        await monitors.close()
        assert greetings[0] == greetings[1]

    on_qemu(sysroot, test)
