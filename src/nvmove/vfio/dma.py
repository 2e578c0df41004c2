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
from nvmove.vfio.device import Buffer
from nvmove.vfio.message import Command, Header

log = logging.getLogger(__name__)

# QEMU (11.1.3, found by experiment) loses of its answers what does not fit into its socket buffer, 208 KiB by default:
# the stream is cut in the middle of a reply, or QEMU aborts. So the replies that may be unread at one time stay below.
_MAX_READ = 32 << 10
_MAX_UNREAD = 64 << 10
_REPLY_OVERHEAD = 2 << 10
"""What the kernel charges the sender for a message besides its data, bytes; generously."""


class _Exchange:
    """One message sent, until it is answered. `failure` or `data` is set before `answered`."""

    __slots__ = ("answered", "code", "cost", "count", "data", "failure")

    def __init__(self, code: Command, count: int) -> None:
        self.code = code
        self.count = count
        self.cost = _REPLY_OVERHEAD + (count if code is Command.DMA_READ else 0)
        self.answered = threading.Event()
        self.data = b""
        self.failure: str | None = None

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.answered.set()

    def wait(self) -> bytes:
        self.answered.wait()
        if self.failure is not None:
            raise DmaError(self.failure)
        return self.data


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
        exchanges = [self._start(Command.DMA_READ, address + at, count) for at, count in _pieces(length, size)]
        return b"".join(exchange.wait() for exchange in exchanges)

    def dma_write(self, address: int, data: Buffer) -> None:
        """Store `data` into guest memory; on return the client has it there. Raises DmaError."""
        self.dma_write_all([(address, data)])

    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]]) -> None:
        """Store runs of (address, data) into guest memory, in order, several messages under way at once.

        On return the client has answered all of them. Raises DmaError when it refused one, or is gone.
        """
        exchanges: list[_Exchange] = []
        for address, data in runs:
            view = memoryview(data).cast("B")
            for at, count in _pieces(len(view), self._max_size):
                exchanges.append(self._start(Command.DMA_WRITE, address + at, count, view[at : at + count]))
        for exchange in exchanges:
            exchange.answered.wait()
        for exchange in exchanges:
            exchange.wait()

    def answer(self, header: Header, payload: memoryview) -> None:
        """Deliver a reply (control thread). Raises StreamError for one that answers nothing we asked."""
        with self._lock:
            exchange = self._exchanges.pop(header.id, None)
            if exchange is not None:
                self._unread -= exchange.cost
                self._lock.notify_all()
        if exchange is None or exchange.code != header.command:
            raise message.StreamError(f"reply to command {header.command} that was not sent, id {header.id}")
        if header.flags & message.FLAG_ERROR:
            exchange.fail(f"the client refused {exchange.code.name}: errno {header.error}")
        elif exchange.code is Command.DMA_READ:
            data = payload[message.DMA_ACCESS_SIZE :]
            if len(data) == exchange.count:
                exchange.data = bytes(data)
            else:
                exchange.fail(f"DMA_READ of {exchange.count} bytes answered with {len(data)}")
        exchange.answered.set()

    def refuse(self, reason: str) -> None:
        """Fail everything that waits and all that is asked until `admit`, with DmaError."""
        with self._lock:
            self._refusal = reason
            waiting = list(self._exchanges.values())
            self._lock.notify_all()
        for exchange in waiting:
            # It stays in the table: its id is taken until the client answers.
            if not exchange.answered.is_set():
                exchange.fail(reason)

    def admit(self) -> None:
        """Work again after `refuse`."""
        with self._lock:
            self._refusal = None

    def _start(self, code: Command, address: int, count: int, data: memoryview | bytes = b"") -> _Exchange:
        assert threading.get_ident() != self._control_thread, "the control thread would wait for itself"
        exchange = _Exchange(code, count)
        with self._lock:
            while self._refusal is None and self._unread and self._unread + exchange.cost > _MAX_UNREAD:
                self._lock.wait()
            if self._refusal is not None:
                raise DmaError(self._refusal)
            self._unread += exchange.cost
            while self._next_id in self._exchanges:
                self._next_id = (self._next_id + 1) & 0xFFFF
            message_id = self._next_id
            self._next_id = (message_id + 1) & 0xFFFF
            self._exchanges[message_id] = exchange
        self._send(message.command(message_id, code, message.dma_access_payload(address, count, data)))
        return exchange


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, size):
        yield start, min(size, length - start)
