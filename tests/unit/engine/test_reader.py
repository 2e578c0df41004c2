"""Who reads the client's messages: the control thread, or a loop that has nothing else to do. With real threads."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import cast

import pytest

from tests.nvme_host import DATA, Host
from tests.posted import posted
from tests.waiting import PATIENCE, wait

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.engine import loop
from nvmove.engine.compiled import CompiledEngine
from nvmove.nvme.spec import DOORBELLS, Nvm
from nvmove.vfio import message
from nvmove.vfio.message import Command
from tests.rings import ExportedDisk, LentDisk, LentLines, LentRam


class Client:
    """A host whose doorbells are messages, and a control thread that passes on what comes to Python."""

    def __init__(self, queues: int = 1, disk: LentDisk | None = None, entries: int = 16) -> None:
        self.entries = entries
        self.engine = CompiledEngine(spin_us=0)
        self.host = Host(ram=LentRam(), lines=LentLines(), disk=disk or LentDisk(), engine=self.engine)
        assert isinstance(self.engine.receiver, loop.Bells)
        self.bells = self.engine.receiver
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.passed: SimpleQueue[tuple[bytes, list[int]] | None] = SimpleQueue()
        self.control = threading.Thread(target=self._receive, daemon=True)
        self.host.enable()
        for qid in range(1, queues + 1):
            self._create(qid)
        self.control.start()

    def _create(self, qid: int) -> None:
        host = self.host
        for opcode, cdw11 in ((5, 1), (1, qid << 16 | 1)):
            host.cid += 1
            prp1 = (0x3_0000 if opcode == 5 else 0x9_0000) + 0x1000 * qid
            dwords = (self.entries - 1 << 16 | qid, cdw11, 0, 0, 0, 0)
            host.put(0, struct.pack("<BBHI4Q6I", opcode, 0, host.cid, 0, 0, 0, prp1, 0, *dwords))
            host.ring_sq(0)
            wait(lambda: host.peek(0) is not None)
            host.reap(0)
        host.new_cq(qid, 0x3_0000 + 0x1000 * qid, self.entries)
        host.new_sq(qid, 0x9_0000 + 0x1000 * qid, self.entries, qid)
        self.put(qid)  # the queue is lent when it has run its first command
        host.ring_sq(qid)
        self.reap(qid)
        wait(lambda: qid in host.controller.inspect()["live"]["lent"])

    def _receive(self) -> None:
        buffer = memoryview(bytearray(message.MAX_MESSAGE_SIZE))
        while (fds := self.bells.receive(self.ours, buffer)) is not None:
            size = message.announced_size(buffer[: message.HEADER_SIZE])
            self.passed.put((bytes(buffer[:size]), fds))
        self.passed.put(None)

    def wait_reader(self, reader: int) -> None:
        wait(lambda: self.bells.reader == reader)

    def put(self, qid: int = 1, opcode: Nvm = Nvm.READ, prp1: int = DATA, prp2: int = 0, blocks: int = 1) -> int:
        """Put a command into a queue without a doorbell; return its tail."""
        self.host.cid += 1
        cdw = (0, 0, blocks - 1, 0, 0, 0)
        self.host.put(qid, struct.pack("<BBHI4Q6I", opcode, 0, self.host.cid, 1, 0, 0, prp1, prp2, *cdw))
        return self.host.rings[qid].tail

    def ring(self, qid: int = 1, **kind: int) -> None:
        self.theirs.sendall(tail(qid, self.put(qid, **kind)))  # type: ignore[arg-type]

    def reap(self, qid: int = 1, count: int = 1) -> None:
        """Wait for completions and consume them, by doorbell message where there is one who reads."""
        while count > 0:
            wait(lambda: self.host.peek(qid) is not None)
            count -= len(self.host.reap(qid, doorbell=not self.control.is_alive()))
        assert count == 0
        if self.control.is_alive():
            self.theirs.sendall(posted(DOORBELLS + 8 * qid + 4, self.host.cqs[qid].head))

    def command(self, qid: int = 1) -> None:
        self.ring(qid)
        self.reap(qid)

    def settle(self) -> None:
        """Make the loop the reader; it has read all that was sent."""
        before = self.host.controller.inspect()["live"]["doorbell_writes"]
        self.command()
        wait(lambda: self.host.controller.inspect()["live"]["doorbell_writes"] >= before + 2)
        self.wait_reader(loop.LOOP)

    def next(self) -> tuple[bytes, list[int]] | None:
        """What comes to Python next."""
        return self.passed.get(timeout=PATIENCE)

    def nothing(self) -> None:
        with pytest.raises(Empty):
            self.passed.get_nowait()

    def close(self) -> None:
        self.theirs.close()
        self.control.join(PATIENCE)
        assert not self.control.is_alive()
        self.ours.close()
        self.engine.close()


def tail(qid: int, value: int) -> bytes:
    return posted(DOORBELLS + 8 * qid, value)


ODD = posted(0x14, 0)
"""For Python."""


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


def test_doorbells_are_read_by_the_loop_that_they_ring(client: Client) -> None:
    assert client.bells.reader == loop.CONTROL
    client.settle()
    for _ in range(100):
        client.command()
    client.wait_reader(loop.LOOP)
    client.nothing()


def test_what_is_for_python_comes_there_and_the_control_thread_reads_on(client: Client) -> None:
    for _ in range(20):
        client.settle()
        client.theirs.sendall(ODD)
        assert client.next() == (ODD, [])
        assert client.bells.reader == loop.CONTROL


def test_order_is_kept_where_doorbells_and_others_come_in_one_go(client: Client) -> None:
    client.settle()
    odds = [posted(0x14, value) for value in range(50)]
    sent = [part for odd in odds for part in (tail(1, client.host.rings[1].tail), odd)]
    client.theirs.sendall(b"".join(sent))
    assert [client.next() for _ in odds] == [(odd, []) for odd in odds]
    client.nothing()
    client.settle()


def test_descriptors_that_a_loop_reads_come_to_python(client: Client) -> None:
    client.settle()
    read, write = os.pipe()
    whole = message.command(1, Command.DMA_MAP, bytes(32))
    socket.send_fds(client.theirs, [whole], [write])
    os.close(write)
    passed = client.next()
    assert passed is not None and passed[0] == whole
    [fd] = passed[1]
    os.write(fd, b"x")
    os.close(fd)
    assert os.read(read, 2) == b"x"
    os.close(read)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 35])
def test_a_message_that_comes_in_two_parts_holds_no_loop_up(client: Client, cut: int) -> None:
    client.settle()
    client.theirs.sendall(ODD[:cut])
    client.wait_reader(loop.CONTROL)
    client.host.controller.pause(0)  # the queue comes back
    assert client.host.controller.save().sqs[1].tail == client.host.rings[1].tail
    client.theirs.sendall(ODD[cut:])
    assert client.next() == (ODD, [])


def test_the_end_of_the_stream_is_the_control_threads(client: Client) -> None:
    client.settle()
    client.theirs.shutdown(socket.SHUT_WR)
    assert client.next() is None


def test_a_queue_that_is_taken_back_from_the_reader_loses_nothing(client: Client) -> None:
    client.settle()
    client.host.controller.pause(0)  # without waking its loop
    late = tail(1, client.put())
    client.theirs.sendall(late)
    assert client.next() == (late, [])
    assert client.bells.reader == loop.CONTROL


def test_with_two_queues_one_reads_for_both() -> None:
    client = Client(queues=2)
    try:
        client.settle()
        for _ in range(50):
            client.command(2)
            client.command(1)
        client.ring(1)
        client.ring(2)
        client.reap(2)
        client.reap(1)
        client.nothing()
    finally:
        client.close()


def test_the_loop_of_a_disk_that_takes_its_time_does_not_read() -> None:
    client = Client(disk=LentDisk(alignment=512))
    try:
        for _ in range(20):
            client.command()
        assert client.bells.reader == loop.CONTROL
    finally:
        client.close()


def test_the_loop_of_an_export_reads_while_it_waits_for_the_server() -> None:
    disk = ExportedDisk()
    client = Client(disk=disk)
    client.settle()
    before = len(disk.server.commands)
    disk.server.muted.set()
    for count in range(1, 4):
        client.ring()
        disk.server.wait_for(before + count)
    client.wait_reader(loop.LOOP)
    client.nothing()
    client.theirs.sendall(ODD)
    assert client.next() is not None
    disk.server.muted.clear()
    client.ring()
    client.reap(count=4)
    client.close()
    disk.hang_up()


def test_a_flush_gives_the_messages_to_the_control_thread(client: Client) -> None:
    client.settle()
    for _ in range(20):
        client.ring(opcode=Nvm.FLUSH)
        client.reap()
        client.theirs.sendall(ODD)
        assert client.next() == (ODD, [])


_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
"""The system call, by machine."""


class Missing:
    """A page of memory that whoever touches it waits for (userfaultfd(2)), until `close`."""

    _API, _REGISTER, _UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._length = mmap.PAGESIZE
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
        self._fd = ctypes.CDLL(None, use_errno=True).syscall(_USERFAULTFD[os.uname().machine], os.O_CLOEXEC)
        if self._fd < 0:
            pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        memory.madvise(mmap.MADV_DONTNEED, offset, self._length)
        fcntl.ioctl(self._fd, self._API, bytearray(struct.pack("<QQQ", 0xAA, 0, 0)))
        fcntl.ioctl(self._fd, self._REGISTER, bytearray(struct.pack("<QQQQ", self._start, self._length, 1, 0)))

    def close(self) -> None:
        fcntl.ioctl(self._fd, self._UNREGISTER, bytearray(struct.pack("<QQ", self._start, self._length)))
        os.close(self._fd)


def test_while_a_loop_is_held_up_the_control_thread_reads(client: Client) -> None:
    """Nobody waits for I/O, whatever it is that takes long."""
    memory = cast(mmap.mmap, client.host.ram.data)
    client.settle()
    for again in range(3):
        page = 0x20_0000 + again * mmap.PAGESIZE
        missing = Missing(memory, page)
        client.ring(prp1=page)
        client.theirs.sendall(ODD)
        assert client.next() == (ODD, [])
        client.ring()  # of the loop that is held up: it has it when it goes on
        client.theirs.sendall(ODD)
        assert client.next() == (ODD, [])
        assert client.host.peek(1) is None
        missing.close()
        client.reap(count=2)
        client.settle()


def test_a_loop_that_is_always_at_work_looks_for_messages_itself() -> None:
    """The control thread finds one, too, but looks more often after that."""
    client = Client(entries=512)
    host = client.host
    pages, prp_list = range(0x20_0000, 0x28_0000, 0x1000), 0x1F_0000
    host.ram.write(prp_list, struct.pack(f"<{len(pages) - 1}Q", *pages[1:]))
    try:
        for _ in range(50):
            client.settle()
            wait(lambda: client.bells.tick_ns > 1_000_000)
            for _ in range(500):
                end = client.put(prp1=pages[0], prp2=prp_list, blocks=len(pages) * 8)
            client.theirs.sendall(tail(1, end))
            client.theirs.sendall(ODD)
            assert client.next() == (ODD, [])
            was_found_by_the_loop = client.bells.tick_ns > 1_000_000
            client.reap(count=500)
            if was_found_by_the_loop:
                break
        assert was_found_by_the_loop
    finally:
        client.close()
