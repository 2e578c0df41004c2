"""Guest memory by message: DMA_READ and DMA_WRITE to the client, several under way at once, matched by message id.

Worker threads call and wait; the control thread delivers the answers, so it may never call. While a reset is under way
the client's main loop waits for us and answers nothing: `refuse` fails what is waiting and what comes, until `admit`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from nvmove.nvme.seams import DmaError
from nvmove.vfio import message
from nvmove.vfio.message import Buffer, Command, Header

log = logging.getLogger(__name__)

# QEMU (11.1.3, found by experiment) loses of its answers what does not fit into its socket buffer, 208 KiB by default:
# the stream is cut in the middle of a reply, or QEMU aborts. So the replies that may be unread at one time stay below.
_MAX_READ = 32 << 10
_MAX_UNREAD = 64 << 10
_REPLY_OVERHEAD = 1 << 10
"""What the kernel charges the sender for a message besides its data, bytes; generously."""
_MAX_SEND = 64 << 10
"""Messages are put together until they hold so much data, in bytes, and sent with one system call."""


class _Batch:
    """What one caller has under way and waits for. All of it wants the channel's lock, but for `wait`."""

    __slots__ = ("_answered", "_left", "failure")

    def __init__(self) -> None:
        self.failure: str | None = None
        self._left = 1  # the caller himself, until he has sent all
        self._answered = threading.Event()

    def add(self) -> None:
        self._left += 1

    def leave(self, failure: str | None = None) -> None:
        self.failure = self.failure or failure
        self._left -= 1
        if not self._left:
            self._answered.set()

    def wait(self) -> None:
        """Wait until all are answered; raise DmaError when one failed."""
        self._answered.wait()
        if self.failure is not None:
            raise DmaError(self.failure)


class _Exchange:
    """One message sent, until it is answered or failed (`settled`)."""

    __slots__ = ("batch", "code", "cost", "count", "data", "settled")

    def __init__(self, batch: _Batch, code: Command, count: int) -> None:
        self.batch = batch
        self.code = code
        self.count = count
        self.cost = _REPLY_OVERHEAD + (count if code is Command.DMA_READ else 0)
        self.data = b""
        self.settled = False

    def settle(self, failure: str | None = None) -> None:
        if not self.settled:
            self.settled = True
            self.batch.leave(failure)


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

    def dma_read(self, address: int, length: int) -> bytes:
        """Return `length` bytes of guest memory; raise DmaError when the client refuses or is gone."""
        size = min(self._max_size, _MAX_READ)
        pieces = ((address + at, count, b"") for at, count in _pieces(length, size))
        return b"".join(exchange.data for exchange in self._exchange_all(Command.DMA_READ, pieces))

    def dma_write(self, address: int, data: Buffer) -> None:
        """Store `data` into guest memory; on return the client has it there. Raises DmaError."""
        self.dma_write_all([(address, data)])

    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]]) -> None:
        """Store runs of (address, data) into guest memory, in order, several messages under way at once.

        On return the client has answered all of them. Raises DmaError when it refused one, or is gone.
        """
        views = ((address, memoryview(data).cast("B")) for address, data in runs)
        self._exchange_all(
            Command.DMA_WRITE,
            (
                (address + at, count, view[at : at + count])
                for address, view in views
                for at, count in _pieces(len(view), self._max_size)
            ),
        )

    def answer(self, header: Header, payload: memoryview) -> None:
        """Deliver a reply (control thread). Raises StreamError for one that answers nothing we asked."""
        with self._lock:
            exchange = self._exchanges.pop(header.id, None)
            if exchange is None or exchange.code != header.command:
                raise message.StreamError(f"reply to command {header.command} that was not sent, id {header.id}")
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

    def refuse(self, reason: str) -> None:
        """Fail everything that waits and all that is asked until `admit`, with DmaError."""
        with self._lock:
            self._refusal = reason
            self._lock.notify_all()
            for exchange in self._exchanges.values():
                exchange.settle(reason)  # it stays in the table: its id is taken until the client answers

    def admit(self) -> None:
        """Work again after `refuse`."""
        with self._lock:
            self._refusal = None

    def _exchange_all(self, code: Command, pieces: Iterable[tuple[int, int, Buffer]]) -> list[_Exchange]:
        """Send a message for each (address, count, data) and wait for all answers; raise DmaError."""
        assert threading.get_ident() != self._control_thread, "the control thread would wait for itself"
        batch, exchanges, unsent, size = _Batch(), list[_Exchange](), list[Buffer](), 0
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
        batch.wait()
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
            while self._refusal is None and self._unread and self._unread + exchange.cost > _MAX_UNREAD:
                if not wait:
                    return None
                self._lock.wait()
            if self._refusal is not None:
                raise DmaError(self._refusal)
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
