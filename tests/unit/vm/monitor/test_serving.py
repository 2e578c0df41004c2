"""Sockets, terminals and files that monitors are served on, with a fake QEMU behind them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import socket
import stat
import termios
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nvmove.errors import UserError
from nvmove.vm.line.endpoints import (
    Address,
    FdAddress,
    FileAddress,
    MonitorEndpoint,
    MonitorMode,
    MuxPort,
    PipeAddress,
    PtyAddress,
    StdioAddress,
    TcpAddress,
    UnixAddress,
)
from nvmove.vm.monitor.chardev import SocketServer
from nvmove.vm.monitor.listener import unix_name
from nvmove.vm.monitor.serving import Monitors
from nvmove.vm.monitor.stream import Stream
from nvmove.vm.monitor.telnet import GREETING, TelnetDecoder
from tests.fake_qemu import FakeQemu, facade_on_fake

BANNER = b"QEMU 11.1.3 monitor - type 'help' for more information\r\n(qemu) "


def hmp(address: Address, **more: Any) -> MonitorEndpoint:
    return MonitorEndpoint(mode=MonitorMode.READLINE, address=address, id="mon0", **{"wait": False, **more})


def qmp(address: Address, **more: Any) -> MonitorEndpoint:
    return MonitorEndpoint(mode=MonitorMode.CONTROL, address=address, id="qmp0", **{"wait": False, **more})


def serving(*endpoints: MonitorEndpoint, test: Callable[[Monitors, FakeQemu], Awaitable[None]] | None = None) -> None:
    """Serve `endpoints` during `test`; then no task and no descriptor is left."""

    async def main() -> None:
        before = set(os.listdir("/proc/self/fd"))
        async with facade_on_fake() as (facade, qemu):
            monitors = Monitors(endpoints)
            await monitors.open()
            try:
                await monitors.serve(facade)
                if test is not None:
                    await asyncio.wait_for(test(monitors, qemu), 60)
            finally:
                await monitors.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []
        assert set(os.listdir("/proc/self/fd")) <= before

    asyncio.run(main())


async def client(where: Any) -> Stream:
    connection = socket.socket(socket.AF_INET if isinstance(where, tuple) else socket.AF_UNIX)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, where)
    return Stream.of_socket(connection)


async def until(stream: Stream, text: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(20):
        while text not in seen:
            data = await stream.read()
            assert data, f"the end came before {text!r}: {seen!r}"
            seen += data
    return seen


async def ended(stream: Stream) -> bool:
    async with asyncio.timeout(20):
        while await stream.read():
            pass
    stream.close()
    return True


# Sockets


def test_a_unix_socket_replaces_a_stale_one_and_goes_away_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        stream = await client(str(path))
        await until(stream, BANNER)
        stream.close()

    serving(hmp(UnixAddress(str(path)), server=True), test=test)
    assert not path.exists()


def test_a_socket_that_somebody_else_has_put_there_since_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        path.unlink()
        path.write_text("theirs")

    serving(hmp(UnixAddress(str(path)), server=True), test=test)
    assert path.read_text() == "theirs"


def test_several_clients_at_once_and_each_sees_its_end(tmp_path: Path) -> None:
    path = str(tmp_path / "q.sock")
    streams: list[Stream] = []

    async def test(_monitors: Monitors, qemu: FakeQemu) -> None:
        qemu.answers["query-name"] = {"name": "vm"}
        streams.extend([await client(path) for _ in range(100)])
        for stream in streams:
            stream.write(b'{"execute":"qmp_capabilities"}\n{"execute":"query-name"}\n{"execute":"half')
        for stream in streams:
            await until(stream, b'{"return": {"name": "vm"}}\r\n')
        for stream in streams[1:]:
            stream.close()
        qemu.event("POWERDOWN")
        await until(streams[0], b"POWERDOWN")
        streams.append(await client(path))
        await until(streams[-1], b"QMP")
        streams.pop().close()
        streams[0].close()

    serving(qmp(UnixAddress(path), server=True), test=test)


def test_a_client_that_does_not_read_is_dropped_and_costs_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvmove.vm.monitor.stream.MAX_UNREAD", 1 << 20)
    path = str(tmp_path / "q.sock")

    async def test(_monitors: Monitors, qemu: FakeQemu) -> None:
        deaf, hearing = await client(path), await client(path)
        for stream in (deaf, hearing):
            stream.write(b'{"execute":"qmp_capabilities"}')
            await until(stream, b'{"return": {}}\r\n')
        for number in range(30):
            qemu.event("BIG", number=number, text="x" * 100_000)
            await until(hearing, b"}}\r\n")
        assert await ended(deaf)
        hearing.close()

    serving(qmp(UnixAddress(path), server=True), test=test)


def test_abstract_sockets(tmp_path: Path) -> None:
    name = f"nvmove-test-{os.getpid()}"

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        stream = await client(b"\0" + name.encode())
        await until(stream, BANNER)
        stream.close()

    serving(hmp(UnixAddress(name, abstract=True), server=True), test=test)
    assert unix_name(UnixAddress("a", abstract=True, tight=False)) == b"\0a".ljust(108, b"\0")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_tcp_takes_the_first_free_port_of_a_range() -> None:
    busy = socket.socket()
    busy.bind(("127.0.0.1", 0))
    busy.listen()
    port = busy.getsockname()[1]

    async def test(monitors: Monitors, _qemu: FakeQemu) -> None:
        source = monitors._served[0]._source
        assert isinstance(source, SocketServer)
        chosen = int(source.label.split(":")[-1].split(",")[0])
        assert port < chosen <= port + 20
        stream = await client(("127.0.0.1", chosen))
        await until(stream, BANNER)
        stream.close()

    address = TcpAddress("127.0.0.1", str(port), to=port + 20, nodelay=True)
    try:
        serving(hmp(address, server=True), test=test)
    finally:
        busy.close()


def test_wait_on_holds_until_a_client_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "w.sock")

    async def main() -> None:
        async with facade_on_fake() as (facade, _qemu):
            monitors = Monitors([hmp(UnixAddress(path), server=True, wait=True)])
            await monitors.open()
            waiting = asyncio.create_task(monitors.serve(facade))
            await asyncio.wait({waiting}, timeout=0.1)
            assert not waiting.done()
            stream = await client(path)
            await asyncio.wait_for(waiting, 20)
            await until(stream, BANNER)
            stream.close()
            await monitors.close()

    asyncio.run(main())
    expected = f"nvmove: info: QEMU waiting for connection on: disconnected:unix:{path},server=on\n"
    assert capfd.readouterr().err == expected


def test_telnet_is_announced_and_its_commands_are_skipped() -> None:
    port = free_port()

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        stream = await client(("127.0.0.1", port))
        assert (await until(stream, BANNER)).startswith(GREETING)
        stream.write(b"\xff\xfd\x01\xff\xfb\x03no\r\0")
        assert (await until(stream, b"(qemu) ")).endswith(b"unknown command: 'no'\r\n(qemu) ")
        stream.close()

    serving(hmp(TcpAddress("127.0.0.1", str(port)), server=True, telnet=True), test=test)


def test_telnet_commands_may_be_cut_anywhere() -> None:
    decoder = TelnetDecoder()
    data = b"a\xff\xfd\x01b\xff\xffc\xff\xf3d\xff\xf1e"
    assert b"".join(decoder.feed(bytes([byte])) for byte in data) == b"ab\xffcde"
    assert decoder.breaks == 1


def test_a_client_endpoint_connects_again_when_told_to(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")

    async def main() -> None:
        async with facade_on_fake() as (facade, _qemu):
            monitors = Monitors([hmp(UnixAddress(path), reconnect_ms=10)])
            await monitors.open()
            await monitors.serve(facade)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            for _ in range(2):
                connection, _address = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 20)
                stream = Stream.of_socket(connection)
                await until(stream, BANNER)
                stream.close()
            listener.close()
            await monitors.close()

    asyncio.run(main())


def test_a_client_endpoint_without_reconnect_ends_with_its_connection() -> None:
    ours, theirs = socket.socketpair()

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        stream = Stream.of_socket(ours)
        await until(stream, BANNER)
        stream.close()

    fd = os.dup(theirs.fileno())
    theirs.close()

    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            monitors = Monitors([hmp(FdAddress(fd))])
            await monitors.open()
            await monitors.serve(facade)
            await test(monitors, qemu)
            await monitors.close()

    asyncio.run(main())


def test_an_inherited_listening_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "i.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)

    async def main() -> None:
        async with facade_on_fake() as (facade, _qemu):
            monitors = Monitors([hmp(FdAddress(os.dup(listener.fileno())), server=True)])
            await monitors.open()
            await monitors.serve(facade)
            stream = await client(path)
            await until(stream, BANNER)
            stream.close()
            await monitors.close()

    asyncio.run(main())
    listener.close()


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        (
            hmp(UnixAddress("/nosuch/x"), server=True),
            "Failed to bind socket to /nosuch/x: No such file or directory",
        ),
        (hmp(UnixAddress("/nosuch")), "Failed to connect to '/nosuch': No such file or directory"),
        (
            hmp(UnixAddress("x" * 108), server=True),
            f"UNIX socket path '{'x' * 108}' is too long: it must be less than 108 bytes",
        ),
        (
            hmp(TcpAddress("nosuch.invalid", "1"), server=True),
            "address resolution failed for nosuch.invalid:1: Name or service not known",
        ),
        (hmp(FdAddress(987)), "File descriptor '987' is not a socket"),
        (hmp(FileAddress("/nosuch/f")), "Could not open '/nosuch/f': No such file or directory"),
        (hmp(FileAddress("/dev/null", "/nosuch/i")), "Could not open '/nosuch/i': No such file or directory"),
        (hmp(PipeAddress("/nosuch/p")), "Could not open '/nosuch/p': No such file or directory"),
        (
            hmp(PtyAddress("/nosuch/link")),
            "Failed to create PTY symlink /nosuch/link: No such file or directory",
        ),
        (
            hmp(StdioAddress(), mux=(MuxPort("s", Path("/nosuch/s")),)),
            "Failed to bind socket to /nosuch/s: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_opened_is_said_in_qemus_words(endpoint: MonitorEndpoint, message: str) -> None:
    with pytest.raises(UserError) as raised:
        serving(endpoint)
    assert message in (
        str(raised.value),
        str(raised.value).replace("Temporary failure in name resolution", "Name or service not known"),
    )


def test_a_port_in_use_is_said_in_qemus_words() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        with pytest.raises(UserError, match=r"^Failed to find an available port: Address already in use$"):
            serving(hmp(TcpAddress("127.0.0.1", port), server=True))
    with pytest.raises(UserError, match=rf"^Failed to connect to '127.0.0.1:{port}': Connection refused$"):
        serving(hmp(TcpAddress("127.0.0.1", port)))


def test_stdio_serves_one_monitor_only() -> None:
    endpoint = hmp(StdioAddress())
    assert Monitors([endpoint]).uses_stdin
    assert not Monitors([]).uses_stdin
    with pytest.raises(UserError, match="cannot use stdio by multiple character devices"):
        serving(endpoint, endpoint)


# Terminals and files


def test_each_opening_of_a_pseudo_terminal_is_a_client(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "link"

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        path = os.readlink(link)
        assert capfd.readouterr().out == f"char device redirected to {path} (label mon0)\n"
        for _ in range(2):
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            stream = Stream(fd, fd)
            await until(stream, BANNER)
            stream.write(b"no\r")
            await until(stream, b"unknown command: 'no'\r\n(qemu) ")
            stream.close()
            await asyncio.sleep(0.3)  # a hang-up that nobody sees has not happened

    serving(hmp(PtyAddress(str(link))), test=test)
    assert not link.is_symlink()


def test_output_to_a_file_and_input_from_another(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("no\n")

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        async with asyncio.timeout(20):
            while b"unknown command: 'no'\r\n(qemu) " not in output.read_bytes():
                await asyncio.sleep(0.01)

    output.write_text("old ")
    serving(hmp(FileAddress(str(output), str(source), append=True)), test=test)
    assert output.read_bytes().startswith(b"old " + BANNER)
    serving(hmp(FileAddress(str(output))), test=None)
    assert output.stat().st_size < 100


@pytest.mark.parametrize("split", [True, False])
def test_fifos(tmp_path: Path, split: bool) -> None:
    path = tmp_path / "p"
    names = [f"{path}.in", f"{path}.out"] if split else [str(path)]
    for name in names:
        os.mkfifo(name)

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        out = os.open(names[-1], os.O_RDWR | os.O_NONBLOCK)
        assert stat.S_ISFIFO(os.fstat(out).st_mode)
        if split:
            into = os.open(names[0], os.O_WRONLY)
            stream = Stream(out, into)
            await until(stream, BANNER)
            stream.write(b"no\n")
            await until(stream, b"unknown command: 'no'\r\n(qemu) ")
            stream.close()
        else:
            os.close(out)

    serving(hmp(PipeAddress(str(path))), test=test)


class Child:
    """A forked process with a terminal, or pipes, for its stdio, in which `serve` runs."""

    def __init__(self, serve: Callable[[], None], *, piped: bool = False) -> None:
        if piped:
            self.stdin_read, self.stdin = os.pipe()
            self.output, self.stdout_write = os.pipe()
        else:
            self.stdin, self.slave = pty.openpty()
            self.output = self.stdin
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                if piped:
                    os.dup2(self.stdin_read, 0)
                    os.dup2(self.stdout_write, 1)
                else:
                    os.login_tty(self.slave)
                os.close(self.stdin)
                serve()
                status = 0
            os._exit(status)
        if piped:
            os.close(self.stdin_read)
            os.close(self.stdout_write)
        else:
            os.close(self.slave)

    def until(self, text: bytes) -> bytes:
        seen, end = b"", time.monotonic() + 30
        while text not in seen and time.monotonic() < end:
            try:
                data = os.read(self.output, 4096)
            except OSError:
                data = b""
            if not data:
                break
            seen += data
        assert text in seen
        return seen

    def end(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        _pid, status = os.waitpid(self.pid, 0)
        self.mode = self.terminal_mode()
        for fd in {self.stdin, self.output}:
            os.close(fd)
        return status

    def terminal_mode(self) -> int:
        """Return the terminal's local modes; they are the same seen from its master."""
        return int(termios.tcgetattr(self.stdin)[3]) if os.isatty(self.stdin) else 0


def serve_stdio(*endpoints: MonitorEndpoint) -> Callable[[], None]:
    """Return what serves `endpoints` until SIGTERM."""

    async def main() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with facade_on_fake() as (facade, _qemu):
            monitors = Monitors(endpoints)
            await monitors.open()
            try:
                await monitors.serve(facade)
                await stop.wait()
            finally:
                await monitors.close()

    return lambda: asyncio.run(main())


@pytest.mark.parametrize("signals", [True, False])
def test_stdio_makes_a_terminal_raw_and_gives_it_back(signals: bool) -> None:
    child = Child(serve_stdio(hmp(StdioAddress(signals))))
    try:
        child.until(b"(qemu) ")
        raw = child.terminal_mode()
        assert (bool(raw & termios.ICANON), bool(raw & termios.ECHO)) == (False, False)
        assert bool(raw & termios.ISIG) is signals
        os.write(child.stdin, b"no\r")
        child.until(b"unknown command: 'no'")
    finally:
        assert child.end() == 0
    cooked = child.mode
    assert cooked & termios.ICANON and cooked & termios.ECHO and cooked & termios.ISIG


def test_stdio_takes_commands_from_a_pipe_and_its_end_is_not_the_vms() -> None:
    child = Child(serve_stdio(hmp(StdioAddress())), piped=True)
    os.write(child.stdin, b"one\ntwo\n")
    child.until(b"unknown command: 'two'")
    os.dup2(os.open("/dev/null", os.O_RDONLY), child.stdin)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
    assert child.end() == 0


def test_the_guests_console_goes_on_when_stdin_has_ended(tmp_path: Path) -> None:
    port = MuxPort("ser0", tmp_path / "ser.sock")
    child = Child(serve_stdio(hmp(StdioAddress(signal=False), mux=(port,))), piped=True)
    try:
        guest = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                guest.connect(str(port.socket))
                break
            assert time.monotonic() < end
            time.sleep(0.02)
        guest.sendall(b"Debian")
        child.until(b"Debian")  # the port is open: what is typed before that is lost
        os.write(child.stdin, b"root\n")
        assert guest.recv(100) == b"root\n"
        os.dup2(os.open("/dev/null", os.O_RDONLY), child.stdin)
        guest.sendall(b"login: ")
        child.until(b"login: ")
        guest.sendall(b"the last word")
        guest.close()
        child.until(b"the last word")
    finally:
        assert child.end() == 0
    assert not port.socket.exists()


def test_a_shared_socket_has_one_client_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "mux.sock")
    port = MuxPort("ser0", tmp_path / "ser.sock")

    async def test(_monitors: Monitors, _qemu: FakeQemu) -> None:
        guest = await client(str(port.socket))
        first = await client(path)
        first.write(b"a\x01c")
        assert (await until(guest, b"a")) == b"a"
        await until(first, BANNER)
        guest.write(b"hello")
        await until(first, b"hello")
        second = await client(path)
        first.close()
        second.write(b"no\n")
        await until(second, b"unknown command: 'no'\r\n(qemu) ")
        guest.close()
        again = await client(str(port.socket))
        second.write(b"\x01cb")
        await until(again, b"b")
        again.close()
        second.close()

    serving(hmp(UnixAddress(path), server=True, mux=(port,)), test=test)
    assert not port.socket.exists()


def test_before_the_facade_is_ready_a_client_waits(tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")

    async def main() -> None:
        monitors = Monitors([hmp(UnixAddress(path), server=True)])
        await monitors.open()
        stream = await client(path)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.read(), 0.05)
        await monitors.close()
        assert await ended(stream)

    asyncio.run(main())
