"""Exports that are lent to the compiled loop: it speaks NBD itself, each queue on a connection of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.block_helpers import qemu_nbd, tool
from tests.nbd_server import ALL, FLUSH, FUA, MULTI_CONN, Command, Server, serving
from tests.nvme_host import DATA
from tests.waiting import wait

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.block.config import OpenOptions
from nvmove.block.fault import FaultRules, FaultyBackend
from nvmove.block.lend import ASK, NOTHING, LentExport
from nvmove.block.nbd import backend as nbd
from nvmove.block.nbd import revival
from nvmove.block.nbd.backend import nbd_unix_uri
from nvmove.block.policy import ErrorPolicy
from nvmove.nvme import spec
from nvmove.nvme.spec import DEAC, DSM_DEALLOCATE, DSM_RANGE, Nvm, Status
from tests.exported import LONG, ExportHost

MIB = 1 << 20
MANY = ALL | MULTI_CONN
Open = Callable[..., ExportHost]


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Open]:
    """Start a server, and a host of a disk there."""
    with contextlib.ExitStack() as stack:

        def open_it(
            flags: int = MANY,
            queues: int = 1,
            policy: ErrorPolicy = ErrorPolicy.REPORT,
            options: OpenOptions | None = None,
            **server: object,
        ) -> ExportHost:
            one = Server(bytearray(os.urandom(4 * MIB)), flags=flags, **server)  # type: ignore[arg-type]
            path = tmp_path / "nbd.sock"
            stack.enter_context(serving(one, path))
            host = ExportHost(one, nbd_unix_uri(str(path)), options or OpenOptions(), queues, policy=policy)
            stack.callback(host.close)
            return host

        yield open_it


@pytest.fixture
def lent(export: Open) -> ExportHost:
    host = export()
    host.borrow()
    return host


def bytes_of(host: ExportHost, slot: int, pages: int) -> bytes:
    """The data of a transfer, in its order."""
    found = [host.where(slot, pages, number) for number in range(pages)]
    return b"".join(bytes(host.ram.data[at : at + 4096]) for at in found)


# --- what is common ------------------------------------------------------------------------------------------------


def test_reads_and_writes_go_out_on_a_connection_of_the_loop(lent: ExportHost) -> None:
    server = lent.server
    lent.ram.data[DATA : DATA + 1024] = b"x" * 1024
    assert lent.do(Nvm.WRITE, cdw10=3, cdw12=1) == 0
    assert server.data[3 * 512 : 5 * 512] == b"x" * 1024
    assert lent.do(Nvm.READ, cdw10=7, cdw12=7) == 0
    assert lent.ram.data[DATA : DATA + 4096] == server.data[7 * 512 : 15 * 512]
    assert server.commands == [Command("write", 1536, 1024, 0), Command("read", 3584, 4096, 0)]
    assert server.sources == [1, 1]


def test_what_was_done_is_counted(lent: ExportHost) -> None:
    before = lent.controller.inspect()["smart"]
    assert [lent.do(opcode) for opcode in (Nvm.WRITE, Nvm.READ, Nvm.READ)] == [0, 0, 0]
    after = lent.controller.inspect()["smart"]
    assert after["write_commands"] - before["write_commands"] == 1
    assert after["read_commands"] - before["read_commands"] == 2
    assert not lent.in_python


def test_many_are_under_way_and_end_in_any_order(export: Open) -> None:
    host = export()
    host.borrow()
    host.server.together = 8
    cids = [host.transfer(Nvm.READ, number, 64 * number, 4) for number in range(8)]
    assert [completion.cid for completion in host.finish(8)] == cids[::-1]
    for number in range(8):
        assert bytes_of(host, number, 4) == host.server.data[64 * 512 * number :][: 4 * 4096]
    assert not host.in_python


@pytest.mark.parametrize("piece", [0, 1021, 16, 5])
def test_data_comes_and_goes_in_pieces(export: Open, piece: int) -> None:
    """Scattered, long enough to fill sockets, both ways at once."""
    host = export(piece=piece)
    host.borrow()
    pages = 64 if piece > 100 or not piece else 3
    expected = bytes(host.server.data)
    for number in range(5):
        for page in range(pages):
            at = host.where(2 * number + 1, pages, page)
            host.ram.data[at : at + 4096] = bytes([number * 16 + page & 0xFF]) * 4096
        host.transfer(Nvm.READ, 2 * number, 1024 * number, pages)
        host.transfer(Nvm.WRITE, 2 * number + 1, 1024 * number + 512, pages)
    assert [completion.status for completion in host.finish(10)] == [0] * 10
    for number in range(5):
        at = 1024 * 512 * number
        assert bytes_of(host, 2 * number, pages) == expected[at : at + 4096 * pages]
        assert bytes_of(host, 2 * number + 1, pages) == host.server.data[at + 512 * 512 :][: 4096 * pages]
    assert not host.in_python


@pytest.mark.parametrize(
    ("flags", "options", "found"),
    [
        (MANY, {}, [("write", 1), ("flush", 0)]),
        (MANY & ~FUA, {}, [("write", 0), ("flush", 0), ("flush", 0)]),
        (MANY & ~FUA & ~FLUSH, {}, [("write", 0)]),
        (MANY, {"no_flush": True}, [("write", 0)]),
    ],
)
def test_what_must_be_durable_is(
    export: Open, flags: int, options: dict[str, bool], found: list[tuple[str, int]]
) -> None:
    host = export(flags, options=OpenOptions(**options))  # type: ignore[arg-type]
    host.borrow()
    assert host.do(Nvm.WRITE, cdw12=spec.FUA) == 0
    assert host.do(Nvm.FLUSH) == 0
    assert [(command.name, command.flags) for command in host.server.commands] == found
    assert not host.in_python


def test_without_a_write_cache_each_write_is_durable(export: Open) -> None:
    host = export(options=OpenOptions(writeback=False))
    host.borrow()
    assert host.do(Nvm.WRITE) == 0
    assert host.server.commands == [Command("write", 0, 512, 1)]
    assert not host.in_python


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_and_deallocations_are_as_python_asks_for_them(export: Open, unmap: bool) -> None:
    options = OpenOptions(discard="unmap" if unmap else "ignore")
    host = export(options=options)
    host.borrow()
    host.ram.data[DATA : DATA + 32] = DSM_RANGE.pack(0, 2, 10) + DSM_RANGE.pack(0, 3, 20)
    for _ in range(2):
        assert host.do(Nvm.WRITE_ZEROES, cdw10=1, cdw12=1) == 0
        assert host.do(Nvm.WRITE_ZEROES, cdw10=4, cdw12=DEAC) == 0
        assert host.do(Nvm.DATASET_MANAGEMENT, cdw10=1, cdw11=DSM_DEALLOCATE) == 0
        if not host.in_python:
            by_loop = list(host.server.commands)
            host.server.commands.clear()
            host.server.sources.clear()
            host.controller.leases.bar()
    assert set(host.server.sources) == {0}
    assert host.server.commands == by_loop
    assert Command("zero", 512, 1024, 2) in by_loop
    assert (Command("trim", 5120, 1024, 0) in by_loop) == unmap
    host.controller.leases.unbar()


# --- what is Python's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "connections"),
    [
        ({"flags": ALL}, 1),
        ({"flags": MANY & ~FLUSH}, 1),
        ({"options": OpenOptions(detect_zeroes="on")}, 1),
        ({"blocks": (4096, 4096, MIB)}, 2),
    ],
    ids=["one connection only", "FUA and no flush", "detect-zeroes", "blocks larger than the host's"],
)
def test_an_export_that_is_not_plain_is_not_lent(export: Open, arguments: dict[str, object], connections: int) -> None:
    host = export(**arguments)
    wait(lambda: host.do(Nvm.READ) == 0 and len(host.server.connected) == connections)
    assert [host.do(Nvm.READ) for _ in range(20)] == [0] * 20
    assert not host.is_lent()
    assert len(host.server.clients) == connections
    assert set(host.server.sources) == {0}


def test_what_is_longer_than_the_server_takes_is_cut_by_python(export: Open) -> None:
    host = export(blocks=(512, 4096, 8192))
    host.borrow()
    assert host.do(Nvm.READ, prp2=DATA + 4096, cdw12=15) == 0
    assert host.server.commands == [Command("read", 0, 8192, 0)]
    host.transfer(Nvm.READ, 0, 0, 3)
    assert [completion.status for completion in host.finish()] == [0]
    assert host.server.commands[1:] == [Command("read", 0, 8192, 0), Command("read", 8192, 4096, 0)]
    assert host.server.sources == [1, 0, 0]


def test_an_odd_command_under_load_leaves_the_rest_to_the_loop(lent: ExportHost) -> None:
    """Python's commands are waited for, however many come behind them."""
    done = 0
    for turn in range(40):
        lent.submit(1, Nvm.VERIFY if turn % 4 == 0 else Nvm.READ, nsid=1)
        lent.submit(1, Nvm.WRITE, nsid=1, cdw10=turn)
        if turn > 8:
            assert {completion.status for completion in lent.finish(2)} == {0}
            done += 2
    lent.finish(80 - done)
    assert lent.server.sources.count(0) <= 12
    assert lent.server.sources.count(1) >= 60
    assert len(lent.server.clients) == 2


def test_rules_for_faults_pass_the_loan_on(export: Open) -> None:
    host = export(blocks=(512, 4096, MIB))
    disk = FaultyBackend(host.export, FaultRules(), ["d0"])
    host.controller.leases.bar()

    def borrowed() -> bool:
        file = disk.lend(print)
        if file is None:
            return False
        assert (file.export, file.alignment) == (LentExport(True, MIB), 512)
        assert file.space.discard == NOTHING
        assert file.space.zeroes != ASK
        file.release()
        return True

    wait(borrowed)
    host.controller.leases.unbar()


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [Nvm.READ, Nvm.WRITE, Nvm.FLUSH])
def test_what_the_server_fails_is_told_at_once(export: Open, opcode: Nvm) -> None:
    host = export()
    host.borrow()
    name = {Nvm.READ: "read", Nvm.WRITE: "write", Nvm.FLUSH: "flush"}[opcode]
    host.server.errors[name] = errno.ENOSPC
    assert host.do(opcode) == (Status.INTERNAL_ERROR if opcode == Nvm.READ else Status.CAPACITY_EXCEEDED)
    assert [(report.errno, report.is_read) for report in host.reports] == [(errno.ENOSPC, opcode == Nvm.READ)]
    assert host.server.sources == [1]


@pytest.mark.parametrize("number", [1, 5, 12, 28, 75, 95, 108, 22, 4711])
def test_errors_are_those_that_python_finds(export: Open, number: int) -> None:
    host = export()
    host.borrow()
    host.server.errors["write"] = number
    host.do(Nvm.WRITE)
    host.controller.leases.bar()
    host.do(Nvm.WRITE)
    host.controller.leases.unbar()
    by_loop, by_python = (report.errno for report in host.reports)
    assert by_loop == by_python


def test_failed_commands_are_held_and_tried_again_in_order(export: Open) -> None:
    host = export(policy=ErrorPolicy.STOP)
    host.borrow()
    host.server.errors["write"] = errno.EIO
    for number in range(5):
        host.submit(1, Nvm.WRITE, nsid=1, cdw10=number)
        host.submit(1, Nvm.READ, nsid=1, cdw10=number, prp1=DATA + 4096)
    # Those behind the first failure may be Python's, which goes on with them until the VM has stopped.
    assert {completion.status for completion in host.finish(5)} == {0}
    wait(lambda: len(host.reports) == 5)
    assert host.controller.pause(LONG)
    assert len(host.controller.save().held) == 5
    host.server.errors.clear()
    host.server.commands.clear()
    host.controller.resume()
    assert {completion.status for completion in host.finish(5)} == {0}
    assert [command.offset for command in host.server.commands] == [512 * number for number in range(5)]
    host.borrow()


def test_zeroes_that_fail_are_asked_for_again(lent: ExportHost) -> None:
    lent.server.errors["zero"] = errno.EIO
    assert lent.do(Nvm.WRITE_ZEROES) == Status.WRITE_FAULT
    assert lent.server.sources == [1, 0]


# --- lost connections ----------------------------------------------------------------------------------------------


def test_a_connection_lost_under_way_fails_all_once(export: Open) -> None:
    host = export(policy=ErrorPolicy.STOP)
    host.borrow()
    host.server.muted.set()
    for number in range(9):
        host.submit(1, Nvm.WRITE if number % 2 else Nvm.READ, nsid=1, cdw10=number)
    host.server.wait_for(9)
    host.server.muted.clear()
    host.server.drop()
    wait(lambda: len(host.reports) == 9)
    assert {report.errno for report in host.reports} == {errno.ENOTCONN}
    assert host.controller.pause(LONG)
    assert host.reap(1) == []
    host.export.recover()
    assert host.export.is_connected
    host.controller.resume()
    assert [completion.status for completion in host.finish(9)] == [0] * 9
    assert len(host.reports) == 9
    host.borrow()


def test_who_is_told_that_the_connection_is_lost_finds_it_lost(export: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python's own connection has not been looked at."""
    host = export()
    host.borrow()
    host.server.muted.set()
    host.submit(1, Nvm.READ, nsid=1)
    host.server.wait_for(1)
    seen: list[bool] = []
    host.controller.on_error = lambda _report: seen.append(host.export.is_connected)
    monkeypatch.setattr(host.export._connection, "_wait", lambda: threading.Event().wait(0.2))
    host.server.drop()
    host.finish()
    assert seen == [False]


def test_what_a_lost_server_never_got_is_asked_of_python(export: Open) -> None:
    """The loop's connection alone ends while it has nothing to do."""
    host = export()
    host.borrow()
    host.server.clients[1].shutdown(2)
    assert host.do(Nvm.WRITE) == 0
    assert host.server.sources == [0]
    assert not host.reports


def wrong(change: str) -> Callable[[bytes], bytes]:
    """What makes replies wrong."""

    def distort(reply: bytes) -> bytes:
        magic, error, cookie = struct.unpack_from(">IIQ", reply)
        if change == "magic":
            magic ^= 1
        elif change == "cookie of none":
            cookie += 1
        elif change == "cookie from before":
            cookie -= 128
        else:
            assert change == "twice"
            return reply * 2
        return struct.pack(">IIQ", magic, error, cookie) + reply[16:]

    return distort


@pytest.mark.parametrize("change", ["magic", "cookie of none", "cookie from before"])
def test_a_reply_that_is_wrong_ends_the_connection(export: Open, change: str) -> None:
    host = export()
    host.borrow()
    host.server.distort = wrong(change)
    host.ram.data[DATA : DATA + 512] = bytes(512)
    host.do(Nvm.READ)
    assert [report.errno for report in host.reports] == [errno.ENOTCONN]
    assert host.ram.data[DATA : DATA + 512] == bytes(512)
    wait(lambda: 1 not in host.server.connected)
    host.server.distort = bytes
    host.borrow()
    assert host.do(Nvm.READ) == 0
    assert host.server.sources == [len(host.server.clients) - 1]


def test_a_reply_that_nobody_waits_for_ends_the_connection(lent: ExportHost) -> None:
    lent.server.distort = wrong("twice")
    assert lent.do(Nvm.WRITE) == 0
    lent.server.distort = bytes
    wait(lambda: lent.do(Nvm.WRITE) == 0 and 1 not in lent.server.connected)
    assert not lent.reports


def test_a_lost_connection_is_made_anew(export: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revival, "PERIOD", 0.0)
    host = export()
    host.borrow()
    host.server.drop()
    wait(lambda: not host.export.is_connected)
    wait(lambda: host.do(Nvm.READ) == 0)
    host.borrow()
    assert host.do(Nvm.READ) == 0
    assert not host.in_python


# --- connections ---------------------------------------------------------------------------------------------------


def test_each_queue_has_a_connection(export: Open) -> None:
    host = export(queues=3)
    for qid in (1, 2, 3):
        host.borrow(qid)
    for qid in (1, 2, 3):
        assert host.do(Nvm.READ, qid) == 0
    assert sorted(host.server.sources) == [1, 2, 3]
    assert len(host.server.clients) == 4


def test_connections_are_used_again(lent: ExportHost) -> None:
    for _ in range(30):
        assert lent.controller.pause(LONG)
        lent.controller.resume()
        assert lent.do(Nvm.READ) == 0
    assert set(lent.server.sources) == {1}
    assert len(lent.server.clients) == 2


def test_nothing_is_left_when_it_is_closed(export: Open) -> None:
    host = export(queues=2)
    open_before = set(os.listdir("/proc/self/fd"))
    connected = set(host.server.connected)
    for qid in (1, 2):
        host.borrow(qid)
    assert host.server.connected > connected
    host.export.reconnect()
    for qid in (1, 2):
        host.borrow(qid)
    assert host.controller.pause(LONG)
    host.export.close()
    wait(lambda: not host.server.connected)
    sockets = [fd for fd in set(os.listdir("/proc/self/fd")) - open_before if is_open(fd)]
    assert sockets == []


def is_open(fd: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket")
    return False


def test_a_connection_that_ended_while_nobody_had_it_is_not_lent(lent: ExportHost) -> None:
    assert lent.controller.pause(LONG)
    lent.server.clients[1].shutdown(2)
    lent.controller.resume()
    lent.borrow()
    assert lent.do(Nvm.READ) == 0
    assert lent.server.sources == [2]
    assert not lent.reports


def test_a_connection_to_an_export_that_has_changed_is_not_lent(export: Open) -> None:
    host = export()
    host.server.data += bytes(MIB)  # Python's connection is to the old one
    wait(lambda: host.do(Nvm.READ) == 0 and len(host.server.connected) == 2)
    assert [host.do(Nvm.READ) for _ in range(20)] == [0] * 20
    assert not host.is_lent()
    assert len(host.server.clients) == 2
    host.export.refresh_size()
    host.borrow()


def test_a_new_size_makes_all_connections_anew(lent: ExportHost) -> None:
    lent.server.data += bytes(MIB)
    assert lent.export.refresh_size() == 5 * MIB
    wait(lambda: len(lent.server.connected) == 1)
    lent.borrow()
    assert lent.do(Nvm.READ) == 0
    assert not lent.in_python
    assert lent.server.sources[-1] >= 3


# --- pauses --------------------------------------------------------------------------------------------------------


def test_pauses_under_load_lose_nothing(export: Open) -> None:
    host = export(queues=2)
    done, sent = dict.fromkeys((1, 2), 0), dict.fromkeys((1, 2), 0)
    for qid in (1, 2):
        host.borrow(qid)
    turns = 0
    while min(done.values()) < 1500:
        for qid in (1, 2):
            while sent[qid] - done[qid] < 40:
                host.submit(qid, Nvm.WRITE if sent[qid] % 3 else Nvm.READ, nsid=1, cdw10=sent[qid] % 1000)
                sent[qid] += 1
            found = host.reap(qid)
            assert {completion.status for completion in found} <= {0}
            done[qid] += len(found)
        turns += 1
        if turns % 20 == 0:
            assert host.controller.pause(LONG)
            assert host.controller.save().held == []
            host.controller.resume()
        time.sleep(0)
    for qid in (1, 2):
        host.finish(sent[qid] - done[qid], qid)
    assert len(host.server.commands) == sum(sent.values())
    assert host.server.sources.count(0) < len(host.server.sources) / 2


def test_a_server_that_is_silent_keeps_a_pause_from_ending_and_close_ends_it(
    export: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "DRAIN_TIMEOUT", 0.05)
    host = export(policy=ErrorPolicy.STOP)
    host.borrow()
    host.server.muted.set()
    host.submit(1, Nvm.WRITE, nsid=1)
    host.server.wait_for(1)
    assert not host.controller.pause(0.05)
    host.export.close()
    assert host.controller.pause(LONG)
    assert [report.errno for report in host.reports] == [errno.ENOTCONN]
    assert len(host.controller.save().held) == 1
    assert host.reap(1) == []


def test_a_qcow2_behind_qemu_nbd_holds_what_was_written(tmp_path: Path, sysroot: Path) -> None:
    """On two queues, each with blocks of its own, and then read back by QEMU."""
    image, raw, socket = tmp_path / "disk.qcow2", tmp_path / "disk.raw", tmp_path / "nbd.sock"
    assert tool(sysroot, "qemu-img", "create", "-f", "qcow2", image, str(8 * MIB)).returncode == 0
    model, chance, server = bytearray(8 * MIB), random.Random(7), Server(bytearray())
    with qemu_nbd(sysroot, "-t", "-e", "0", "-f", "qcow2", "-k", str(socket), str(image)):
        host = ExportHost(server, nbd_unix_uri(str(socket)), OpenOptions(), queues=2)
        for qid in (1, 2):
            host.borrow(qid)
        for turn in range(60):
            for qid in (1, 2):
                for number, block in enumerate(chance.sample(range(1000), 8)):
                    at, lba = DATA + 0x8000 * (8 * qid + number), block * 16 + 8 * (qid - 1)
                    host.ram.data[at : at + 4096] = chance.randbytes(4096)
                    model[512 * lba : 512 * lba + 4096] = host.ram.data[at : at + 4096]
                    flags = spec.FUA if turn % 7 == number else 0
                    host.submit(qid, Nvm.WRITE, nsid=1, prp1=at, cdw10=lba, cdw12=7 | flags)
            for qid in (1, 2):
                assert {completion.status for completion in host.finish(8, qid)} == {0}
        assert host.is_lent(1)
        assert host.is_lent(2)
        host.close()
    assert tool(sysroot, "qemu-img", "check", image).returncode == 0
    assert tool(sysroot, "qemu-img", "convert", "-O", "raw", image, raw).returncode == 0
    assert raw.read_bytes() == model
