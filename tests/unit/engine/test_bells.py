"""Who receives the messages for the compiled engine: doorbells of lent queues stay there, nothing else does."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.descriptors import few_descriptors
from tests.nvme_host import DATA, Host
from tests.posted import posted
from tests.waiting import wait

pytest.importorskip("nvmove.engine.loop", reason="the compiled engine was not built")

from nvmove.engine.loop import Bells
from nvmove.nvme.spec import DOORBELLS, Nvm
from nvmove.vfio import message
from nvmove.vfio.device import BAR0_REGION, CONFIG_REGION
from nvmove.vfio.message import Command, RegionAccess
from nvmove.vfio.receive import LOST, PlainReceiver, Receiver, close_all
from tests.rings import LentDisk, LentLines, LentRam, Rig

TAIL1, HEAD1 = DOORBELLS + 8, DOORBELLS + 12


class Wire:
    """A client's end of a socket, and a receiver at the other."""

    def __init__(self, receiver: Receiver) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.receiver = receiver
        self.buffer = memoryview(bytearray(message.MAX_MESSAGE_SIZE))

    def next(self) -> bytes | None:
        """The next message that the receiver does not keep to itself; None at the end of the stream."""
        fds = self.receiver.receive(self.ours, self.buffer)
        if fds is None:
            return None
        assert fds == []
        size = message.announced_size(self.buffer[: message.HEADER_SIZE])
        return bytes(self.buffer[: message.HEADER_SIZE if size is None else size])

    def passed(self, *messages: bytes) -> list[bytes]:
        """What comes of `messages`, which are all that is sent before the mark."""
        mark = message.command(0xFFFF, Command.DEVICE_RESET)
        self.theirs.sendall(b"".join(messages) + mark)
        found = []
        while (one := self.next()) != mark:
            assert one is not None
            found.append(one)
        return found

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@contextlib.contextmanager
def wired(receiver: Receiver) -> Iterator[Wire]:
    wire = Wire(receiver)
    try:
        yield wire
    finally:
        wire.close()


def batch(*writes: tuple[int, int]) -> bytes:
    accesses = [RegionAccess(offset, BAR0_REGION, 4, value.to_bytes(4, "little")) for offset, value in writes]
    return message.command(2, Command.REGION_WRITE_MULTI, message.write_multi_payload(accesses), message.FLAG_NO_REPLY)


@pytest.fixture
def rig() -> Rig:
    """Queue 1 is lent: its first command has been run."""
    rig = Rig()
    assert rig.read() == 0
    return rig


@pytest.fixture
def wire(rig: Rig) -> Iterator[Wire]:
    with wired(rig.engine.bells) as found:
        yield found


def put(rig: Host, count: int = 1) -> int:
    """Put reads into queue 1 without a doorbell; return its tail."""
    for _ in range(count):
        rig.cid += 1
        rig.put(1, struct.pack("<BBHI4Q6I", Nvm.READ, 0, rig.cid, 1, 0, 0, DATA, 0, *[0] * 6))
    return rig.rings[1].tail


def test_a_doorbell_of_a_lent_queue_never_comes_to_python(rig: Rig, wire: Wire) -> None:
    before = rig.controller.doorbells.writes
    assert wire.passed(posted(TAIL1, put(rig, 3))) == []
    rig.drain()
    assert len(rig.reap(1, doorbell=False)) == 3
    assert wire.passed(posted(HEAD1, 4)) == []
    assert not rig.in_python
    assert rig.controller.inspect()["live"]["doorbell_writes"] == before + 2


def test_heads_told_past_python_make_room(rig: Rig, wire: Wire) -> None:
    for _ in range(5):  # five times what the completion queue holds
        assert wire.passed(posted(TAIL1, put(rig, 15))) == []
        rig.drain()
        assert len(rig.reap(1, doorbell=False)) == 15
        assert wire.passed(posted(HEAD1, rig.cqs[1].head)) == []
    assert not rig.in_python


def test_what_was_rung_before_the_queue_is_taken_back_is_not_lost(rig: Rig, wire: Wire) -> None:
    assert wire.passed(posted(TAIL1, put(rig, 4))) == []
    rig.controller.pause(0)
    assert rig.controller.save().sqs[1].tail == 5
    late = posted(TAIL1, put(rig))
    assert wire.passed(late) == [late]


@pytest.mark.parametrize(
    "odd",
    [
        posted(TAIL1, 16),  # beyond the ring
        posted(HEAD1, 2),  # what was not posted
        posted(DOORBELLS, 1),  # the admin queue's
        posted(DOORBELLS + 16, 1),  # no queue
        posted(TAIL1 + 2, 1),
        posted(TAIL1, 1, count=8),
        posted(TAIL1, 1, count=2),
        posted(TAIL1, 1, region=CONFIG_REGION),
        posted(0x14, 0),
        posted((1 << 64) - 4, 1),
        posted(DOORBELLS + (1 << 34), 1),
        message.command(3, Command.REGION_WRITE, posted(TAIL1, 1)[16:]),  # somebody waits for the reply
        message.command(3, Command.REGION_WRITE, posted(TAIL1, 1)[16:-1], message.FLAG_NO_REPLY),
        message.command(3, Command.REGION_WRITE, b"", message.FLAG_NO_REPLY),
        message.command(4, Command.REGION_WRITE_MULTI, b"", message.FLAG_NO_REPLY),
        message.command(4, Command.REGION_WRITE_MULTI, struct.pack("<Q", 1 << 61), message.FLAG_NO_REPLY),
        batch((TAIL1, 1))[:-1].replace(struct.pack("<I", 48), struct.pack("<I", 47), 1),
        batch(),
    ],
)
def test_everything_else_comes_as_it_was_sent(rig: Rig, wire: Wire, odd: bytes) -> None:
    assert wire.passed(odd) == [odd]
    rig.drain()
    assert rig.peek(1) is None


def test_of_a_batch_python_gets_what_follows_the_rings_own_in_order(rig: Rig, wire: Wire) -> None:
    tail = put(rig, 2)
    assert wire.passed(batch((TAIL1, tail - 1), (TAIL1, tail))) == []
    rest = [(DOORBELLS, 1), (TAIL1, tail + 1), (0x14, 0)]
    assert wire.passed(batch((TAIL1, tail), *rest)) == [batch(*rest)]
    rig.drain()
    assert len(rig.reap(1)) == 2


def test_a_queue_is_rung_by_its_own_doorbells_whatever_its_completion_queue_is_called() -> None:
    rig = Rig(LentDisk())
    rig.create(5, cqid=3)
    rig.drain()
    assert rig.command(5, Nvm.READ, nsid=1).status == 0
    with wired(rig.engine.bells) as wire:
        for odd in (posted(DOORBELLS + 8 * 3, 1), posted(DOORBELLS + 8 * 5 + 4, 0)):
            assert wire.passed(odd) == [odd]
        assert wire.passed(posted(DOORBELLS + 8 * 5, 1), posted(DOORBELLS + 8 * 3 + 4, 1)) == []


def test_a_queue_that_is_deleted_is_nobodys(rig: Rig, wire: Wire) -> None:
    assert rig.delete_sq(1).status == 0
    late = posted(TAIL1, 1)
    assert wire.passed(late) == [late]
    del rig.engine.rings[1]  # its memory is gone
    assert wire.passed(late) == [late]


def test_a_sleeping_loop_is_woken_by_a_message() -> None:
    from nvmove.engine.compiled import CompiledEngine

    engine = CompiledEngine()
    rig = Host(ram=LentRam(), lines=LentLines(), disk=LentDisk(), engine=engine)
    try:
        rig.enable()
        for opcode, cdw11 in ((5, 1), (1, 1 << 16 | 1)):  # CQ 1 and SQ 1 of 16 entries, no interrupts
            rig.cid += 1
            prp1 = 0x3_0000 if opcode == 5 else 0x9_0000
            rig.put(0, struct.pack("<BBHI4Q6I", opcode, 0, rig.cid, 0, 0, 0, prp1, 0, 15 << 16 | 1, cdw11, 0, 0, 0, 0))
            rig.ring_sq(0)
            wait(lambda: rig.peek(0) is not None)
            rig.reap(0)
        rig.new_cq(1, 0x3_0000, 16)
        rig.new_sq(1, 0x9_0000, 16, 1)
        assert isinstance(engine.receiver, Bells)
        with wired(engine.receiver) as wire:
            put(rig)
            rig.ring_sq(1)
            wait(lambda: rig.peek(1) is not None)
            rig.reap(1)
            assert rig.controller.inspect()["live"]["lent"] == [1]
            for _ in range(40):
                assert wire.passed(posted(TAIL1, put(rig))) == []
                wait(lambda: rig.peek(1) is not None)
                rig.reap(1, doorbell=False)
                assert wire.passed(posted(HEAD1, rig.cqs[1].head)) == []
    finally:
        engine.close()


# --- as the plain receiver -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Bells, PlainReceiver])
def test_descriptors_come_with_their_message(make: type[Receiver]) -> None:
    with wired(make()) as wire:
        first, second = (message.command(n, Command.DMA_MAP, bytes(32)) for n in (1, 2))
        with open(os.devnull) as null:
            wire.theirs.sendall(first)
            socket.send_fds(wire.theirs, [second], [null.fileno(), null.fileno()])
        assert wire.receiver.receive(wire.ours, wire.buffer) == []
        fds = wire.receiver.receive(wire.ours, wire.buffer)
        assert fds is not None and len(fds) == 2
        for fd in fds:
            assert not os.get_inheritable(fd)
            os.close(fd)


@pytest.mark.parametrize("make", [Bells, PlainReceiver])
def test_descriptors_with_a_message_that_is_cut_off_are_closed(make: type[Receiver]) -> None:
    with wired(make()) as wire:
        before = set(os.listdir("/proc/self/fd"))
        read, write = os.pipe()
        socket.send_fds(wire.theirs, [message.command(1, Command.DMA_MAP, bytes(32))[:-1]], [write])
        os.close(write)
        wire.theirs.shutdown(socket.SHUT_WR)
        assert wire.receiver.receive(wire.ours, wire.buffer) is None
        assert os.read(read, 1) == b""  # nobody has the other end
        os.close(read)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("make", [Bells, PlainReceiver])
def test_a_connection_that_is_reset_is_an_error(make: type[Receiver]) -> None:
    with wired(make()) as wire:
        wire.ours.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            wire.receiver.receive(wire.ours, wire.buffer)


SOME = st.one_of(
    st.builds(posted, st.sampled_from([0x14, TAIL1, HEAD1]), st.integers(0, 99)),
    st.builds(message.command, st.integers(0, 9), st.sampled_from([9, 10, 15, 99]), st.binary(max_size=60)),
    st.lists(st.tuples(st.sampled_from([TAIL1, 0x14]), st.integers(0, 9)), max_size=3).map(lambda w: batch(*w)),
    st.binary(min_size=16, max_size=16),
)


@given(messages=st.lists(SOME, max_size=6), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_where_nothing_is_lent_both_receive_the_same(messages: list[bytes], cuts: list[int]) -> None:
    """In pieces of any size, to the end of the stream or to a header after which nothing can be delimited."""
    stream = b"".join(messages)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    found = []
    for receiver in (Bells(), PlainReceiver()):
        with wired(receiver) as wire:
            sender = threading.Thread(target=send, args=(wire.theirs, stream, edges))
            sender.start()
            seen: list[bytes] = []
            while (one := wire.next()) is not None:
                seen.append(one)
                if message.announced_size(one[:16]) is None:
                    break
            sender.join()
        found.append(seen)
    assert found[0] == found[1]


def send(sock: socket.socket, stream: bytes, edges: list[int]) -> None:
    for start, end in itertools.pairwise(edges):
        sock.sendall(stream[start:end])
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("make", [Bells, PlainReceiver])
@pytest.mark.parametrize(("sent", "free"), [(32, 64), (1, 0), (16, 3), (16, 16)])
def test_descriptors_that_cannot_be_had_are_not_passed_over(make: type[Receiver], sent: int, free: int) -> None:
    """More than the protocol has, or than this process may have open: SCM_RIGHTS is cut short then (unix(7))."""
    with wired(make()) as wire, open(os.devnull) as null:
        fds = array.array("i", [null.fileno()] * sent)
        wire.theirs.sendmsg([message.command(1, Command.DMA_MAP)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        with few_descriptors(free):
            taken = wire.receiver.receive(wire.ours, wire.buffer)
        assert taken is not None
        had = min(sent, free, message.MAX_MSG_FDS)
        assert [fd == LOST for fd in taken] == [False] * had + [True] * (had < sent)
        close_all(taken)
