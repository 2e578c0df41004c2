"""NBD exports: commands and flags as the server can take them, errors out, lost connections, one server's own rules."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvmove.block.backend import BackendError, Operation, Request
from nvmove.block.config import OpenOptions
from nvmove.block.nbd import backend as nbd
from nvmove.block.nbd import libnbd, revival
from nvmove.block.nbd.backend import NbdBackend, nbd_unix_uri, open_nbd
from nvmove.block.nbd.revival import Revival
from tests.block_helpers import KIB, MIB, aligned, do, read, start, write
from tests.nbd_server import ALL, FLUSH, FUA, HAS_FLAGS, READ_ONLY, TRIM, ZEROES, Command, Server, serving

Open = Callable[..., tuple[Server, NbdBackend]]


@pytest.fixture
def open_export(tmp_path: Path) -> Iterator[Open]:
    """Start a server and connect to it."""
    with contextlib.ExitStack() as stack:

        def open_it(
            flags: int = ALL, options: OpenOptions | None = None, **server: object
        ) -> tuple[Server, NbdBackend]:
            data = bytearray(os.urandom(MIB))
            export = Server(**{"data": data, "flags": flags, **server})  # type: ignore[arg-type]
            path = tmp_path / "nbd.sock"
            stack.enter_context(serving(export, path))
            disk = open_nbd(nbd_unix_uri(str(path)), options=options, timeout=20)
            stack.callback(disk.close)
            return export, disk

        yield open_it


def test_what_is_written_is_read(open_export: Open) -> None:
    server, disk = open_export()
    assert (disk.size, disk.read_only, disk.request_alignment) == (MIB, False, 1)
    assert write(disk, 512, b"x" * 1000) == 0
    assert server.data[512:1512] == b"x" * 1000
    assert read(disk, 0, 4096) == server.data[:4096]


def test_memory_in_one_run_is_not_copied(open_export: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    server, disk = open_export()
    monkeypatch.setattr(nbd, "bytearray", None, raising=False)  # no copy can be made
    memory = aligned(8192)
    assert start(disk, Operation.READ, 4096, 8192, [memory[:4096], memory[4096:4096], memory[4096:]]).wait() == 0
    assert memory == server.data[4096 : 3 * 4096]
    assert start(disk, Operation.WRITE, 0, 8192, [memory]).wait() == 0
    assert server.commands == [Command("read", 4096, 8192, 0), Command("write", 0, 8192, 0)]


def test_scattered_and_read_only_memory_is_copied(open_export: Open) -> None:
    server, disk = open_export()
    memory = aligned(3 * 4096)
    pieces = [memory[8192:], memory[:4096]]
    assert start(disk, Operation.READ, 0, 8192, pieces).wait() == 0
    assert b"".join(pieces) == server.data[:8192]
    assert start(disk, Operation.WRITE, 16384, 8192, pieces).wait() == 0
    assert server.data[16384 : 16384 + 8192] == server.data[:8192]
    assert start(disk, Operation.WRITE, 0, 3, [memoryview(b"abc")]).wait() == 0
    assert server.data[:3] == b"abc"


def test_memory_is_let_go_before_done(open_export: Open) -> None:
    _, disk = open_export()
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)
    closed = threading.Event()

    def done(error: int) -> None:
        assert error == 0
        view.release()
        memory.close()  # BufferError if anything still held it
        closed.set()

    disk.submit(Request(Operation.READ, done, 0, 4096, [view]))
    assert closed.wait(20)


def test_many_requests_are_under_way_at_once(open_export: Open) -> None:
    server, disk = open_export()
    server.muted.set()
    memory = aligned(64 * 4096)
    waiters = [start(disk, Operation.READ, i * 4096, 4096, [memory[i * 4096 : (i + 1) * 4096]]) for i in range(63)]
    server.wait_for(63)
    assert not any(waiter.calls for waiter in waiters)
    server.muted.clear()
    read(disk, 0, 512)
    assert [waiter.wait() for waiter in waiters] == [0] * 63
    assert memory[: 63 * 4096] == server.data[: 63 * 4096]


def test_more_than_the_socket_takes_at_once_arrives(open_export: Open) -> None:
    server, disk = open_export(data=bytearray(16 * MIB))
    data = os.urandom(MIB)
    waiters = [start(disk, Operation.WRITE, i * MIB, MIB, [memoryview(bytearray(data))]) for i in range(16)]
    assert [waiter.wait() for waiter in waiters] == [0] * 16
    assert server.data == data * 16


def test_requests_are_cut_to_what_the_server_takes(open_export: Open) -> None:
    server, disk = open_export(blocks=(1, 4096, 64 * KIB))
    data = os.urandom(160 * KIB)
    assert write(disk, 512, data, fua=True) == 0
    assert server.data[512 : 512 + 160 * KIB] == data
    assert [(c.length, c.flags) for c in server.commands] == [(64 * KIB, 1), (64 * KIB, 1), (32 * KIB, 1)]
    assert read(disk, 512, 160 * KIB) == data


def test_a_part_that_fails_fails_the_request(open_export: Open) -> None:
    server, disk = open_export(blocks=(1, 4096, 64 * KIB))
    server.errors["write"] = errno.ENOSPC
    waiter = start(disk, Operation.WRITE, 0, 128 * KIB, [aligned(128 * KIB)])
    assert waiter.wait() == errno.ENOSPC
    server.errors.clear()
    read(disk, 0, 512)
    assert waiter.calls == [errno.ENOSPC], "done is called once"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EPERM, errno.EINVAL])
def test_errno_comes_out(open_export: Open, error: int) -> None:
    server, disk = open_export(options=OpenOptions(discard="unmap"))
    server.errors = dict.fromkeys(("read", "write", "flush", "trim", "zero"), error)
    assert start(disk, Operation.READ, 0, 512, [memoryview(bytearray(512))]).wait() == error
    assert write(disk, 0, b"x" * 512) == error
    for operation in (Operation.FLUSH, Operation.DISCARD, Operation.WRITE_ZEROES):
        assert do(disk, operation, 0, 512) == error
    server.errors.clear()
    assert write(disk, 0, b"x" * 512) == 0


def test_a_failed_scattered_read_leaves_memory_alone(open_export: Open) -> None:
    server, disk = open_export()
    server.errors["read"] = errno.EIO
    memory = [memoryview(bytearray(b"a" * 10)), memoryview(bytearray(b"b" * 10))]
    assert start(disk, Operation.READ, 0, 20, memory).wait() == errno.EIO
    assert b"".join(memory) == b"a" * 10 + b"b" * 10


def test_fua_is_a_flag_where_the_server_has_it(open_export: Open) -> None:
    server, disk = open_export()
    assert write(disk, 0, b"x", fua=True) == 0
    assert write(disk, 0, b"x") == 0
    assert [(c.name, c.flags) for c in server.commands] == [("write", 1), ("write", 0)]


def test_fua_is_a_flush_where_the_server_has_it_not(open_export: Open) -> None:
    server, disk = open_export(flags=ALL & ~FUA)
    assert write(disk, 0, b"x", fua=True) == 0
    assert server.names() == ["write", "flush"]
    server.errors["write"] = errno.EIO
    assert write(disk, 0, b"x", fua=True) == errno.EIO
    assert server.names() == ["write", "flush", "write"], "no flush after a failed write"
    server.errors = {"flush": errno.ENOSPC}
    assert write(disk, 0, b"x", fua=True) == errno.ENOSPC


def test_writethrough_sets_fua_and_unsafe_never_flushes(open_export: Open) -> None:
    server, disk = open_export(options=OpenOptions(writeback=False))
    assert write(disk, 0, b"x") == 0
    assert do(disk, Operation.WRITE_ZEROES, 0, 512) == 0
    assert [c.flags & 1 for c in server.commands] == [1, 1]


def test_unsafe_never_flushes(open_export: Open) -> None:
    server, disk = open_export(options=OpenOptions(no_flush=True))
    assert write(disk, 0, b"x", fua=True) == 0
    assert do(disk, Operation.FLUSH) == 0
    assert server.commands == [Command("write", 0, 1, 0)]


def test_flush_is_sent_where_the_server_has_it(open_export: Open) -> None:
    server, disk = open_export()
    assert do(disk, Operation.FLUSH) == 0
    assert server.names() == ["flush"]


def test_a_server_without_flush_needs_none(open_export: Open) -> None:
    server, disk = open_export(flags=HAS_FLAGS)
    assert do(disk, Operation.FLUSH) == 0
    assert write(disk, 0, b"x", fua=True) == 0
    assert server.names() == ["write"]


@pytest.mark.parametrize(
    ("discard", "may_unmap", "flags"), [("unmap", True, 0), ("unmap", False, 2), ("ignore", True, 2)]
)
def test_zeroes_keep_their_space_unless_all_agree(open_export: Open, discard: str, may_unmap: bool, flags: int) -> None:
    server, disk = open_export(options=OpenOptions(discard="unmap" if discard == "unmap" else "ignore"))
    assert do(disk, Operation.WRITE_ZEROES, 512, 4096, may_unmap=may_unmap) == 0
    assert server.commands == [Command("zero", 512, 4096, flags)]


def test_zeroes_are_written_where_the_server_cannot_make_them(open_export: Open) -> None:
    server, disk = open_export(flags=HAS_FLAGS | FLUSH | FUA, data=bytearray(b"x" * 3 * MIB))
    assert do(disk, Operation.WRITE_ZEROES, 512, 5 * MIB // 2) == 0
    assert server.names() == ["write"] * 3
    assert server.data == b"x" * 512 + bytes(5 * MIB // 2) + b"x" * (MIB // 2 - 512)


def test_discard_is_trim_when_asked(open_export: Open) -> None:
    server, disk = open_export(options=OpenOptions(discard="unmap"))
    assert disk.supports_discard
    assert do(disk, Operation.DISCARD, 512, 4096) == 0
    assert server.commands == [Command("trim", 512, 4096, 0)]


@pytest.mark.parametrize(("flags", "discard"), [(ALL, "ignore"), (ALL & ~TRIM, "unmap")])
def test_discard_else_does_nothing(open_export: Open, flags: int, discard: str) -> None:
    server, disk = open_export(flags, OpenOptions(discard="unmap" if discard == "unmap" else "ignore"))
    assert not disk.supports_discard
    assert do(disk, Operation.DISCARD, 512, 4096) == 0
    assert server.commands == []


def test_detect_zeroes_sends_no_zeroes(open_export: Open) -> None:
    server, disk = open_export(options=OpenOptions(detect_zeroes="on"))
    assert write(disk, 0, bytes(4096), fua=True) == 0
    assert server.commands == [Command("zero", 0, 4096, 3)]


def test_requests_of_no_length_send_nothing(open_export: Open) -> None:
    server, disk = open_export(options=OpenOptions(discard="unmap"))
    for operation in (Operation.READ, Operation.WRITE, Operation.WRITE_ZEROES, Operation.DISCARD):
        assert do(disk, operation, 512, 0) == 0
    assert server.commands == []


def test_outside_the_export_is_eio(open_export: Open) -> None:
    server, disk = open_export()
    assert write(disk, MIB, b"x") == errno.EIO
    assert server.commands == []


def test_what_is_no_multiple_of_the_block_is_read_first(open_export: Open) -> None:
    server, disk = open_export(blocks=(4096, 4096, MIB), options=OpenOptions(discard="unmap"))
    assert disk.request_alignment == 4096
    expected = bytearray(server.data)
    assert read(disk, 512, 5000) == expected[512:5512]
    assert write(disk, 4000, b"x" * 200, fua=True) == 0
    expected[4000:4200] = b"x" * 200
    assert do(disk, Operation.WRITE_ZEROES, 9000, 100) == 0
    expected[9000:9100] = bytes(100)
    assert server.data == expected
    assert [tuple(c) for c in server.commands] == [
        ("read", 0, 8192, 0),
        ("read", 0, 8192, 0),
        ("write", 0, 8192, 1),
        ("read", 8192, 4096, 0),
        ("write", 8192, 4096, 0),
    ]
    server.commands.clear()
    assert do(disk, Operation.DISCARD, 4096 - 512, 4096 + 1024) == 0
    assert do(disk, Operation.DISCARD, 512, 4096) == 0
    assert server.commands == [Command("trim", 4096, 4096, 0)]


def test_writes_to_parts_of_one_block_wait_for_each_other(open_export: Open) -> None:
    server, disk = open_export(blocks=(4096, 4096, MIB))
    server.muted.set()
    waiters = [start(disk, Operation.WRITE, lane * 512, 512, [memoryview(bytes([lane]) * 512)]) for lane in range(8)]
    elsewhere = start(disk, Operation.WRITE, 8192, 4096, [memoryview(bytes(4096))])
    server.wait_for(2)
    server.muted.clear()
    read(disk, MIB - 4096, 4096)
    assert [waiter.wait() for waiter in [*waiters, elsewhere]] == [0] * 9
    assert server.data[:4096] == b"".join(bytes([lane]) * 512 for lane in range(8))


def test_a_failed_read_before_a_write_fails_the_write(open_export: Open) -> None:
    server, disk = open_export(blocks=(4096, 4096, MIB))
    before = bytes(server.data)
    server.errors["read"] = errno.EIO
    assert write(disk, 512, b"x" * 512) == errno.EIO
    assert server.data == before
    server.errors.clear()
    assert write(disk, 512, b"x" * 512) == 0, "its turn has ended"


@pytest.fixture
def no_revival(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost stays lost until the test does something."""
    monkeypatch.setattr(Revival, "want", lambda _self: None)


@pytest.mark.usefixtures("no_revival")
def test_a_lost_connection_fails_what_is_under_way_and_what_comes(open_export: Open) -> None:
    server, disk = open_export()
    server.muted.set()
    waiters = [start(disk, Operation.READ, 0, 512, [memoryview(bytearray(512))]) for _ in range(5)]
    server.wait_for(5)
    server.drop()
    assert [waiter.wait() for waiter in waiters] == [errno.ENOTCONN] * 5
    assert write(disk, 0, b"x") == errno.ENOTCONN
    assert not disk.is_connected


def lose(server: Server, disk: NbdBackend) -> None:
    """Cut the connection, and return when the disk knows."""
    server.drop()
    while disk.is_connected:
        time.sleep(0.001)


def test_a_lost_connection_is_made_anew_for_later_requests(open_export: Open) -> None:
    server, disk = open_export()
    lose(server, disk)
    assert write(disk, 0, b"x") == errno.ENOTCONN
    deadline = time.monotonic() + 20
    while (error := write(disk, 0, b"y")) and time.monotonic() < deadline:
        assert error == errno.ENOTCONN
    assert server.data[:1] == b"y"


def test_a_connection_that_cannot_be_made_anew_is_said_once_and_tried_again(
    open_export: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, disk = open_export()
    monkeypatch.setattr(revival, "PERIOD", 0.01)
    uri = disk._uri
    disk._uri = "nbd+unix:///?socket=/nonexistent"
    lose(server, disk)
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        assert write(disk, 0, b"x") == errno.ENOTCONN
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    disk._uri = uri
    while write(disk, 0, b"x"):
        assert time.monotonic() < deadline + 20


@pytest.mark.usefixtures("no_revival")
def test_reconnect_brings_a_lost_disk_back(open_export: Open) -> None:
    server, disk = open_export()
    server.drop()
    while write(disk, 0, b"x") == 0:
        pass
    disk.reconnect()
    assert disk.is_connected
    assert write(disk, 0, b"y") == 0
    assert server.data[:1] == b"y"


@pytest.mark.usefixtures("no_revival")
def test_who_is_told_that_the_connection_is_lost_finds_it_lost(
    open_export: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the moment when libnbd notices and the one when the connection's own thread goes on."""
    server, disk = open_export()
    noticed, go_on = threading.Event(), threading.Event()
    notify_read = libnbd.Handle.notify_read

    def held_up(handle: libnbd.Handle) -> None:
        try:
            notify_read(handle)
        finally:
            noticed.set()
            assert go_on.wait(20)

    monkeypatch.setattr(libnbd.Handle, "notify_read", held_up)
    server.drop()
    try:
        assert noticed.wait(20)
        assert write(disk, 0, b"x") == errno.ENOTCONN
        assert not disk.is_connected
    finally:
        go_on.set()


@pytest.mark.usefixtures("no_revival")
def test_recover_connects_again_only_when_the_connection_is_lost(open_export: Open) -> None:
    server, disk = open_export()
    connection = disk._connection
    disk.recover()
    assert disk._connection is connection
    server.drop()
    while write(disk, 0, b"x") == 0:
        pass
    disk.recover()
    assert disk._connection is not connection
    assert write(disk, 0, b"y") == 0


def test_reconnect_keeps_what_comes_meanwhile(open_export: Open) -> None:
    server, disk = open_export()
    server.muted.set()
    under_way = start(disk, Operation.WRITE, 0, 1, [memoryview(b"a")])
    server.wait_for(1)
    reconnecting = threading.Thread(target=disk.reconnect)
    reconnecting.start()
    while not disk._gate.refusal:
        pass
    meanwhile = start(disk, Operation.WRITE, 1, 1, [memoryview(b"b")])
    assert not meanwhile.calls
    assert not under_way.calls
    server.muted.clear()  # before the last answer: then the new connection may be there at once
    server.clients[0].sendall(server.held[0].pop())
    assert under_way.wait() == 0
    assert meanwhile.wait() == 0
    reconnecting.join(20)
    assert server.data[:2] == b"ab"


@pytest.mark.usefixtures("no_revival")
def test_a_failed_reconnect_can_be_tried_again(open_export: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    server, disk = open_export()
    server.drop()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_uri", "nbd+unix:///?socket=/nonexistent")
        with pytest.raises(BackendError, match="No such file or directory"):
            disk.reconnect()
        assert disk.refresh_size() == MIB
    assert write(disk, 0, b"x") == errno.ENOTCONN
    disk.reconnect()
    assert write(disk, 0, b"x") == 0


def test_refresh_size_asks_the_server(open_export: Open) -> None:
    server, disk = open_export()
    server.data += bytes(MIB)
    assert disk.size == MIB
    assert disk.refresh_size() == 2 * MIB
    assert read(disk, 2 * MIB - 512, 512) == bytes(512)


def test_close_finishes_what_is_under_way(open_export: Open) -> None:
    server, disk = open_export()
    server.muted.set()
    waiter = start(disk, Operation.READ, 0, 512, [memoryview(bytearray(512))])
    server.wait_for(1)
    closer = threading.Thread(target=disk.close)
    closer.start()
    while write(disk, 0, b"x") != errno.ESHUTDOWN:
        pass
    assert not waiter.calls
    server.clients[0].sendall(server.held[0].pop())
    assert waiter.wait() == 0
    closer.join(20)
    assert not closer.is_alive()
    disk.close()
    with pytest.raises(BackendError, match="is closed"):
        disk.reconnect()


def test_close_does_not_wait_for_ever(open_export: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "DRAIN_TIMEOUT", 0.05)
    server, disk = open_export()
    server.muted.set()
    memory = aligned(4096)
    waiter = start(disk, Operation.READ, 0, 4096, [memory])
    server.wait_for(1)
    disk.close()
    assert waiter.calls == [errno.ESHUTDOWN]
    memory.release()


def test_done_may_submit(open_export: Open) -> None:
    server, disk = open_export()
    finished = threading.Event()
    turns = 50

    def done(error: int) -> None:
        nonlocal turns
        assert error == 0
        turns -= 1
        if turns:
            disk.submit(Request(Operation.WRITE, done, turns, 1, [memoryview(bytearray(b"t"))]))
        else:
            finished.set()

    disk.submit(Request(Operation.FLUSH, done))
    assert finished.wait(20)
    assert server.data[1:50] == b"t" * 49


def test_a_read_only_export_must_be_asked_for_so(open_export: Open, tmp_path: Path) -> None:
    flags = HAS_FLAGS | READ_ONLY | FLUSH | ZEROES
    with pytest.raises(BackendError) as caught:
        open_export(flags)
    uri = f"nbd+unix:///?socket={tmp_path}/nbd.sock"
    assert str(caught.value) == (
        f"Could not use '{uri}': the export is read-only (readonly=on opens it for reading only)"
    )
    for options in (OpenOptions(read_only=True), OpenOptions(auto_read_only=True)):
        disk = open_nbd(uri, options=options)
        assert disk.read_only
        assert write(disk, 0, b"x") == errno.EROFS
        assert len(read(disk, 0, 512)) == 512
        disk.close()


def test_a_size_of_half_a_sector_is_refused(open_export: Open) -> None:
    with pytest.raises(BackendError, match="its size, 700 bytes, is not a multiple of 512"):
        open_export(data=bytearray(700))


@pytest.mark.parametrize("uri", ["nbds://host/", "http://host/", "nbd:host:10809", "nbd+unix:socket"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(BackendError, match="only nbd:// and nbd\\+unix:// are spoken, without TLS"):
        open_nbd(uri)


def test_no_server_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        open_nbd(nbd_unix_uri(f"{tmp_path}/none"))
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    assert str(caught.value) == f"Could not connect to '{uri}': connect: No such file or directory"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: nobody else's
        with pytest.raises(BackendError, match="Connection refused"):
            open_nbd(f"nbd://127.0.0.1:{unused.getsockname()[1]}/")


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/silent")
        silent.listen()
        with pytest.raises(BackendError, match=r"no answer within 0\.1 s"):
            open_nbd(nbd_unix_uri(f"{tmp_path}/silent"), timeout=0.1)


def test_a_server_that_hangs_up_is_one_clear_line(tmp_path: Path) -> None:
    def hang_up(listener: socket.socket) -> None:
        listener.accept()[0].close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/rude")
        listener.listen()
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        with pytest.raises(BackendError, match=r"rude': .*server (closed|disconnected)"):
            open_nbd(nbd_unix_uri(f"{tmp_path}/rude"), timeout=20)
        thread.join(20)


def test_without_libnbd_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError("libnbd.so.0: cannot open shared object file")

    libnbd.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BackendError) as caught:
        open_nbd("nbd://127.0.0.1:1/")
    assert str(caught.value) == "an NBD disk needs libnbd (apt-get install libnbd0)"


def test_a_libnbd_that_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: ctypes.PyDLL(None))
    libnbd.library.cache_clear()
    with pytest.raises(BackendError, match=r"needs libnbd 1\.14 or later: .*nbd_create"):
        open_nbd("nbd://127.0.0.1:1/")


def test_no_thread_and_no_descriptor_is_left(open_export: Open) -> None:
    _, disk = open_export()
    disk.close()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    uri = disk._uri
    for _ in range(3):
        again = open_nbd(uri)
        assert len(read(again, 0, 512)) == 512
        again.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1  # the server's end of the last may still be closing
