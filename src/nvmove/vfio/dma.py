"""Guest memory by message: DMA_READ and DMA_WRITE to the client, several under way at once, matched by message id.

Worker threads call and wait; the control thread delivers the answers, so it may never call. While a reset is under way
the client's main loop waits for us and answers nothing: `refuse` fails what is waiting and what comes, until `admit`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from nvmove.nvme.seams import DmaError
from nvmove.vfio import message
from nvmove.vfio.message import Buffer, Command, Header
from nvmove.vfio.writing import Writing

log = logging.getLogger(__name__)

# QEMU (11.1.3, found by experiment) loses of its answers what does not fit into its socket buffer, 208 KiB by default:
# the stream is cut in the middle of a reply, or QEMU aborts. So the replies that may be unread at one time stay below.
_MAX_READ = 32 << 10
_MAX_UNREAD = 64 << 10
_REPLY_OVERHEAD = 1 << 10
"""What the kernel charges the sender for a message besides its data, bytes; generously."""
_MAX_SEND = 32 << 10
"""Messages are put together until they hold so much data, in bytes, and sent with one system call. No more: Linux cuts
what is sent to a Unix socket into pieces of some 48 KiB, and QEMU ends the connection when it meets half a header."""
_CANCELLED = "the client has unmapped the memory"


class _Batch:
    """What one caller has under way; `done` is called when all is answered. All of it wants the channel's lock."""

    __slots__ = ("_done", "_left", "failure", "writing")

    def __init__(self, done: Callable[[], None], writing: Writing | None = None) -> None:
        self.failure: str | None = None
        self.writing = writing
        self._left = 1  # the caller himself, until he has sent all
        self._done = done

    def add(self) -> None:
        self._left += 1

    @property
    def is_cancelled(self) -> bool:
        return self.writing is not None and self.writing.gone

    def leave(self, failure: str | None = None) -> None:
        self.failure = self.failure or failure
        self._left -= 1
        if not self._left:
            self._done()


class _Exchange:
    """One message sent, until it is answered or failed (`settled`)."""

    __slots__ = ("batch", "code", "cost", "count", "data", "settled", "silent")

    def __init__(self, batch: _Batch, code: Command, count: int) -> None:
        self.batch = batch
        self.code = code
        self.count = count
        self.cost = _REPLY_OVERHEAD + (count if code is Command.DMA_READ else 0)
        self.data = b""
        self.settled = False
        self.silent: Sequence[int] = ()
        """Ids of messages that were sent before and succeed without an answer: when this one is answered they have."""

    def settle(self, failure: str | None = None) -> None:
        if not self.settled:
            self.settled = True
            self.batch.leave(failure)


class _Write(NamedTuple):
    """A `dma_write_soon` that was not sent yet: (address, length, data) each a message."""

    pieces: Sequence[tuple[int, int, memoryview]]
    batch: _Batch


class DmaChannel:
    """`nvmove.vfio.device.Client` for one connection; create it on the control thread."""

    def __init__(self, send: Callable[[bytes], None], max_size: int) -> None:
        self._send = send
        self._max_size = max_size
        self._control_thread = threading.get_ident()
        self._lock = threading.Condition()
        self._unread = 0
        self._exchanges: dict[int, _Exchange] = {}
        self._next_id = 0
        self._refusal: str | None = None
        self._waiting: deque[_Write] = deque()
        """What must not wait for room itself."""

    def dma_read(self, address: int, length: int) -> bytes:
        """Return `length` bytes of guest memory; raise DmaError when the client refuses or is gone."""
        size = min(self._max_size, _MAX_READ)
        pieces = ((address + at, count, b"") for at, count in _pieces(length, size))
        return b"".join(exchange.data for exchange in self._exchange_all(Command.DMA_READ, pieces))

    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]], writing: Writing | None = None) -> None:
        """Store runs of (address, data) into guest memory, in order, several messages under way at once.

        On return the client has answered all of them. Raises DmaError when it refused one, is gone, or all of it was
        cancelled; no message of it is sent after that.
        """
        views = ((address, memoryview(data).cast("B")) for address, data in runs)
        self._exchange_all(
            Command.DMA_WRITE,
            (
                (address + at, count, view[at : at + count])
                for address, view in views
                for at, count in _pieces(len(view), self._max_size)
            ),
            writing,
        )

    def dma_write_soon(
        self,
        runs: Sequence[tuple[int, Buffer]],
        done: Callable[[DmaError | None], None],
        writing: Writing | None = None,
    ) -> None:
        """Store runs of (address, data) into guest memory in order; see `nvmove.vfio.device.Client`.

        All but the last are sent with the flag that no reply is wanted. QEMU does messages in their order, and leaves
        out the reply of a success only (found by experiment): the last reply stands for all.
        """
        views = ((address, memoryview(data).cast("B")) for address, data in runs)
        pieces = [
            (address + at, count, view[at : at + count])
            for address, view in views
            for at, count in _pieces(len(view), self._max_size)
        ]

        def ended() -> None:
            done(None if batch.failure is None else DmaError(batch.failure))

        batch = _Batch(ended, writing)
        write = _Write(pieces, batch)
        with self._lock:
            self._waiting.append(write)
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Send what waits for room, as far as there is some. The client reads messages whatever it does besides."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                if self._refusal is not None:
                    self._fail_waiting(self._refusal)
                    return
                if self._waiting[0].batch.is_cancelled:
                    self._waiting.popleft().batch.leave(_CANCELLED)
                    continue
                cost = _REPLY_OVERHEAD * len(self._waiting[0].pieces)
                if self._unread and self._unread + cost > _MAX_UNREAD:
                    return
                write = self._waiting.popleft()
                ids = [self._enter(_Exchange(write.batch, Command.DMA_WRITE, count)) for _, count, _ in write.pieces]
                if ids:
                    self._exchanges[ids[-1]].silent = ids[:-1]
            unsent, size = list[Buffer](), 0
            for message_id, (address, count, data) in zip(ids, write.pieces, strict=True):
                flags = 0 if message_id == ids[-1] else message.FLAG_NO_REPLY
                unsent += message.dma_command_parts(message_id, Command.DMA_WRITE, address, data, count, flags)
                size += count
                if size >= _MAX_SEND:
                    size = self._flush(unsent)
            self._flush(unsent)
            with self._lock:
                write.batch.leave()  # now: what is done sends nothing more

    def _fail_waiting(self, reason: str) -> None:
        while self._waiting:
            self._waiting.popleft().batch.leave(reason)

    def answer(self, header: Header, payload: memoryview) -> None:
        """Deliver a reply (control thread). Raises StreamError for one that answers nothing we asked."""
        with self._lock:
            exchange = self._exchanges.get(header.id)
            if exchange is None or exchange.code != header.command:  # it stays, for `refuse` to fail its waiter
                raise message.StreamError(f"reply to command {header.command} that was not sent, id {header.id}")
            del self._exchanges[header.id]
            for message_id in exchange.silent:
                silent = self._exchanges.pop(message_id, None)
                if silent is not None:  # else it was refused
                    self._unread -= silent.cost
                    silent.settle()
            self._unread -= exchange.cost
            self._lock.notify_all()
            failure: str | None = None
            if header.flags & message.FLAG_ERROR:
                failure = f"the client refused {exchange.code.name}: errno {header.error}"
            elif exchange.code is Command.DMA_READ:
                data = payload[message.DMA_ACCESS_SIZE :]
                if len(data) == exchange.count:
                    exchange.data = bytes(data)
                else:
                    failure = f"DMA_READ of {exchange.count} bytes answered with {len(data)}"
            exchange.settle(failure)
        self._send_waiting()

    def refuse(self, reason: str) -> None:
        """Fail everything that waits and all that is asked until `admit`, with DmaError."""
        with self._lock:
            self._refusal = reason
            self._lock.notify_all()
            self._fail_waiting(reason)
            for exchange in self._exchanges.values():
                exchange.settle(reason)  # it stays in the table: its id is taken until the client answers

    def cancel(self, writing: Writing) -> None:
        """Fail what is under way of `writing`, which is gone; when its caller hears of that, nothing more is sent."""
        with self._lock:
            for exchange in self._exchanges.values():
                if exchange.batch.writing is writing:
                    exchange.settle(_CANCELLED)
            self._lock.notify_all()
        self._send_waiting()

    def admit(self) -> None:
        """Work again after `refuse`."""
        with self._lock:
            self._refusal = None

    def _exchange_all(
        self, code: Command, pieces: Iterable[tuple[int, int, Buffer]], writing: Writing | None = None
    ) -> list[_Exchange]:
        """Send a message for each (address, count, data) and wait for all answers; raise DmaError."""
        assert threading.get_ident() != self._control_thread, "the control thread would wait for itself"
        answered = threading.Event()
        batch, exchanges, unsent, size = _Batch(answered.set, writing), list[_Exchange](), list[Buffer](), 0
        try:
            for address, count, data in pieces:
                exchange = _Exchange(batch, code, count)
                message_id = self._admitted(exchange, wait=False)
                if message_id is None:  # answers must come first, so what is asked must be sent
                    size = self._flush(unsent)
                    message_id = self._admitted(exchange, wait=True)
                assert message_id is not None  # it waited
                exchanges.append(exchange)
                unsent += message.dma_command_parts(message_id, code, address, data, count)
                size += len(data)
                if size >= _MAX_SEND:
                    size = self._flush(unsent)
        finally:
            self._flush(unsent)
            with self._lock:
                batch.leave()
        answered.wait()
        if batch.failure is not None:
            raise DmaError(batch.failure)
        return exchanges

    def _flush(self, unsent: list[Buffer]) -> int:
        """Send what was put together; return how many bytes are left: 0."""
        if unsent:
            self._send(b"".join(unsent))
            unsent.clear()
        return 0

    def _admitted(self, exchange: _Exchange, wait: bool) -> int | None:
        """Enter an exchange; return its id, or None when it has to wait and shall not. Raises DmaError."""
        with self._lock:
            while not (refusal := self._refusal or _CANCELLED * exchange.batch.is_cancelled):
                if not self._unread or self._unread + exchange.cost <= _MAX_UNREAD:
                    return self._enter(exchange)
                if not wait:
                    return None
                self._lock.wait()
            raise DmaError(refusal)

    def _enter(self, exchange: _Exchange) -> int:
        """Put an exchange into the table; return its id. Wants the lock."""
        self._unread += exchange.cost
        while self._next_id in self._exchanges:
            self._next_id = (self._next_id + 1) & 0xFFFF
        message_id = self._next_id
        self._next_id = (message_id + 1) & 0xFFFF
        self._exchanges[message_id] = exchange
        exchange.batch.add()
        return message_id


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, size):
        yield start, min(size, length - start)
