"""NBD connections passed on: what the handshake hides, how bytes flow after it, who waits and who is hung up on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nvmove.vm.disks.nbdproxy import (
    GREETING,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPTION_MAGIC,
    REP_ACK,
    REP_ERR_UNKNOWN,
    REP_FLAG_ERROR,
    REP_SERVER,
    HandshakeError,
    NbdProxy,
    negotiate,
    reply,
)
from nvmove.vm.line.endpoints import UnixAddress
from nvmove.vm.monitor.listener import Listener
from tests.nbd_server import exactly

ERR_UNSUP = REP_FLAG_ERROR | 1
EXPORTS = {b"theirs": 512, b"secret": 1024}


def named(name: bytes) -> bytes:
    return struct.pack(">I", len(name)) + name


def hidden(name: bytes) -> bool:
    return name == b"secret"


def serve(connection: socket.socket) -> None:
    """A server of EXPORTS that, after the handshake, says an export's size and echoes."""
    connection.sendall(GREETING + b"\0\3")
    exactly(connection, 4)
    while True:
        _, option, length = struct.unpack(">QII", exactly(connection, 16))
        data = exactly(connection, length)
        if option == OPT_EXPORT_NAME:
            connection.sendall(struct.pack(">QH", EXPORTS[data], 1))
            break
        if option == OPT_LIST:
            for name in EXPORTS:
                connection.sendall(reply(option, REP_SERVER, named(name) + b"a description"))
        name = data[4 : 4 + int.from_bytes(data[:4])]
        if option in (OPT_LIST, OPT_ABORT) or name in EXPORTS:
            connection.sendall(reply(option, REP_ACK))
            if option == OPT_GO:
                break
        else:
            connection.sendall(reply(option, ERR_UNSUP, b"no"))
    while piece := connection.recv(1 << 16):
        connection.sendall(piece)


class Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(20)

    def greet(self) -> None:
        assert exactly(self.connection, 18) == GREETING + b"\0\3"
        self.connection.sendall(struct.pack(">I", 3))

    def option(self, option: int, data: bytes = b"") -> None:
        self.connection.sendall(OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)

    def replies(self) -> list[tuple[int, bytes]]:
        """Replies up to the last one to an option: type and data."""
        found = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", exactly(self.connection, 20))
            found.append((kind, exactly(self.connection, length)))
            if kind == REP_ACK or kind & REP_FLAG_ERROR:
                return found

    def ask(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        self.option(option, data)
        return self.replies()


@contextlib.contextmanager
def handshake(seconds: float = 20, *, leaves: bool = True) -> Iterator[tuple[Client, list[object]]]:
    """A client and a server, and a handshake between them on a thread: its outcome goes into the list."""
    near, client_side = socket.socketpair()
    server_side, far = socket.socketpair()
    outcome: list[object] = []

    def serving() -> None:
        with contextlib.suppress(EOFError, OSError, KeyError):
            serve(far)

    def negotiating() -> None:
        try:
            outcome.append(negotiate(client_side, server_side, hidden, time.monotonic() + seconds))
        except (HandshakeError, TimeoutError) as error:
            outcome.append(str(error))

    threads = [threading.Thread(target=target) for target in (serving, negotiating)]
    for thread in threads:
        thread.start()
    try:
        yield Client(near), outcome
        if leaves:
            near.shutdown(socket.SHUT_WR)
        threads[1].join(20)
    finally:
        for end in (near, client_side, server_side, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)
        for end in (near, client_side, server_side, far):
            end.close()


def test_a_list_leaves_the_hidden_out() -> None:
    with handshake() as (client, outcome):
        client.greet()
        assert client.ask(OPT_LIST) == [(REP_SERVER, named(b"theirs") + b"a description"), (REP_ACK, b"")]
        assert client.ask(OPT_ABORT) == [(REP_ACK, b"")]
    assert outcome == [False]


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT])
def test_a_hidden_name_is_an_unknown_one(option: int) -> None:
    with handshake() as (client, _):
        client.greet()
        ((kind, _),) = client.ask(option, named(b"secret") + b"\0\0")
        assert kind == REP_ERR_UNKNOWN
        assert client.ask(OPT_INFO, named(b"theirs") + b"\0\0") == [(REP_ACK, b"")]


def test_who_asks_for_a_hidden_export_by_its_name_is_hung_up_on() -> None:
    with handshake() as (client, outcome):
        client.greet()
        client.option(OPT_EXPORT_NAME, b"secret")
    assert outcome == ["asked for an unknown export"]


@pytest.mark.parametrize("option", [OPT_GO, OPT_EXPORT_NAME])
def test_after_an_export_is_chosen_transmission_follows(option: int) -> None:
    with handshake() as (client, outcome):
        client.greet()
        if option == OPT_GO:
            ((kind, _),) = client.ask(OPT_GO, named(b"absent") + b"\0\0")
            assert kind == ERR_UNSUP, "it may ask again"
            assert client.ask(OPT_GO, named(b"theirs") + b"\0\0") == [(REP_ACK, b"")]
        else:
            client.option(OPT_EXPORT_NAME, b"theirs")
    assert outcome == [True]


def test_options_may_be_sent_ahead_and_in_pieces() -> None:
    with handshake() as (client, outcome):
        client.greet()
        both = b"".join(
            OPTION_MAGIC + struct.pack(">II", option, len(data)) + data
            for option, data in ((OPT_LIST, b""), (99, b"whatever"), (OPT_GO, named(b"theirs") + b"\0\0"))
        )
        for at in range(0, len(both), 7):
            client.connection.sendall(both[at : at + 7])
        assert [kind for _ in range(3) for kind, _ in client.replies()] == [REP_SERVER, REP_ACK, ERR_UNSUP, REP_ACK]
    assert outcome == [True]


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", OPTION_MAGIC + struct.pack(">II", OPT_LIST, 1 << 30)], ids=["http", "too long"]
)
def test_what_is_no_option_ends_the_connection(data: bytes) -> None:
    with handshake() as (client, outcome):
        client.greet()
        client.connection.sendall(data)
    assert outcome == ["sent what is no option"]


def test_a_client_that_says_nothing_is_not_waited_for() -> None:
    with handshake(seconds=0.05, leaves=False) as (client, outcome):
        exactly(client.connection, 18)
    assert outcome == ["timed out"]


def test_a_client_may_leave_in_the_middle() -> None:
    with handshake() as (client, outcome):
        client.greet()
        client.connection.sendall(OPTION_MAGIC)
        client.connection.shutdown(socket.SHUT_WR)
    assert outcome == ["hung up"]


# --- the listener ---------------------------------------------------------------------------------------------------


class Bench:
    """A proxy on `path` before a server on a thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "user"
        self.target = directory / "private"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.target))
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(EOFError, OSError, KeyError):
            serve(connection)

    def proxy(self, max_connections: int = 0, seconds: float = 0) -> NbdProxy:
        return NbdProxy(
            Listener(UnixAddress(str(self.path))),
            self.target,
            hidden,
            max_connections=max_connections,
            handshake_seconds=seconds,
        )

    def connect(self, export: bytes | None = b"theirs") -> Client:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        client = Client(connection)
        if export is not None:
            client.greet()
            assert client.ask(OPT_GO, named(export) + b"\0\0") == [(REP_ACK, b"")]
        return client

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def run(proxy_of: Callable[[], NbdProxy], test: Callable[[NbdProxy], Awaitable[None]]) -> None:
    async def main() -> None:
        proxy = proxy_of()
        await proxy.open()
        try:
            async with asyncio.timeout(30):
                await test(proxy)
        finally:
            await proxy.close()

    asyncio.run(main())


def gone(client: Client) -> bool:
    try:
        return client.connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_bytes_come_back_as_they_were_sent(bench: Bench) -> None:
    sent = os.urandom(3 << 20)

    def talk() -> None:
        client = bench.connect()
        with client.connection:
            sending = threading.Thread(target=client.connection.sendall, args=(sent,))
            sending.start()
            assert exactly(client.connection, len(sent)) == sent
            sending.join()
            client.connection.shutdown(socket.SHUT_WR)
            assert gone(client)

    async def test(_proxy: NbdProxy) -> None:
        await asyncio.to_thread(talk)

    run(bench.proxy, test)


def test_one_client_too_many_waits_for_anothers_end(bench: Bench) -> None:
    async def test(_proxy: NbdProxy) -> None:
        first = await asyncio.to_thread(bench.connect)
        second = await asyncio.to_thread(bench.connect, None)
        second.connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(second.connection.recv, 1)
        first.connection.close()
        second.connection.settimeout(20)
        await asyncio.to_thread(second.greet)
        second.connection.close()

    run(lambda: bench.proxy(max_connections=1), test)


def test_a_client_that_does_not_finish_its_handshake_is_hung_up_on(bench: Bench) -> None:
    async def test(_proxy: NbdProxy) -> None:
        client = await asyncio.to_thread(bench.connect, None)
        await asyncio.to_thread(client.greet)
        assert await asyncio.to_thread(gone, client)
        client.connection.close()

    run(lambda: bench.proxy(seconds=0.05), test)


def test_close_hangs_up_on_every_client_and_leaves_no_socket_and_no_thread(bench: Bench) -> None:
    async def test(proxy: NbdProxy) -> None:
        clients = [await asyncio.to_thread(bench.connect, name) for name in (b"theirs", None)]
        await asyncio.to_thread(clients[1].greet)
        await proxy.close()
        assert not bench.path.exists()
        for client in clients:
            assert await asyncio.to_thread(gone, client)
            client.connection.close()
        assert [thread for thread in threading.enumerate() if thread.name.startswith("nbd-proxy")] == []

    run(bench.proxy, test)


@pytest.mark.parametrize("missing", ["pipe", "thread"])
def test_what_the_system_has_no_more_of_costs_one_client_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    start = threading.Thread.start

    def no_pipe(_flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "nbd-proxy-answers":
            raise RuntimeError("can't start new thread")
        start(thread)

    async def test(_proxy: NbdProxy) -> None:
        with monkeypatch.context() as patch:
            if missing == "pipe":
                patch.setattr(os, "pipe2", no_pipe)
            else:
                patch.setattr(threading.Thread, "start", no_thread)
            first = await asyncio.to_thread(bench.connect)
            assert await asyncio.to_thread(gone, first)
            first.connection.close()
        second = await asyncio.to_thread(bench.connect)
        second.connection.sendall(b"still there")
        assert await asyncio.to_thread(exactly, second.connection, 11) == b"still there"
        second.connection.close()

    run(bench.proxy, test)


def test_where_no_thread_can_be_had_the_client_is_hung_up_on_and_the_next_one_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failures = threading.Thread.start, [RuntimeError("can't start new thread")]

    def fail_once(thread: threading.Thread) -> None:
        if thread.name == "nbd-proxy" and failures:
            raise failures.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)

    async def test(_proxy: NbdProxy) -> None:
        first = await asyncio.to_thread(bench.connect, None)
        assert await asyncio.to_thread(gone, first)
        first.connection.close()
        second = await asyncio.to_thread(bench.connect)
        second.connection.close()

    run(lambda: bench.proxy(max_connections=1), test)


def test_a_server_that_is_gone_ends_the_client(bench: Bench) -> None:
    async def test(_proxy: NbdProxy) -> None:
        bench.target.unlink()
        client = await asyncio.to_thread(bench.connect, None)
        assert await asyncio.to_thread(gone, client)
        client.connection.close()

    run(bench.proxy, test)
