"""Guest memory by message: DMA_READ and DMA_WRITE to the client, several under way at once, matched by message id.

Worker threads call and wait; the control thread delivers the answers, so it may never call. While a reset is under way
the client's main loop waits for us and answers nothing: `refuse` fails what is waiting and what comes, until `admit`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

from nvmove.nvme.seams import DmaError
from nvmove.vfio import message
from nvmove.vfio.message import Command, Header

log = logging.getLogger(__name__)

_WINDOW = 8
"""Messages that one transfer has under way at most."""


class _Exchange:
    """One message sent, until it is answered. `failure` or `data` is set before `answered`."""

    __slots__ = ("answered", "code", "count", "data", "failure")

    def __init__(self, code: Command, count: int) -> None:
        self.code = code
        self.count = count
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
        self._lock = threading.Lock()
        self._exchanges: dict[int, _Exchange] = {}
        self._next_id = 0
        self._refusal: str | None = None

    def dma_read(self, address: int, length: int) -> bytes:
        """Return `length` bytes of guest memory; raise DmaError when the client refuses or is gone."""
        parts = []
        under_way: deque[_Exchange] = deque()
        for start, count in self._pieces(length):
            under_way.append(self._start(Command.DMA_READ, address + start, count))
            if len(under_way) == _WINDOW:
                parts.append(under_way.popleft().wait())
        parts.extend(exchange.wait() for exchange in under_way)
        return b"".join(parts)

    def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` into guest memory; on return the client has it there. Raises DmaError."""
        view = memoryview(data).cast("B")
        under_way: deque[_Exchange] = deque()
        for start, count in self._pieces(len(view)):
            under_way.append(self._start(Command.DMA_WRITE, address + start, count, view[start : start + count]))
            if len(under_way) == _WINDOW:
                under_way.popleft().wait()
        for exchange in under_way:
            exchange.wait()

    def answer(self, header: Header, payload: memoryview) -> None:
        """Deliver a reply (control thread). Raises StreamError for one that answers nothing we asked."""
        with self._lock:
            exchange = self._exchanges.pop(header.id, None)
        if exchange is None or exchange.code != header.command:
            raise message.StreamError(f"reply to command {header.command} that was not sent, id {header.id}")
        if header.flags & message.FLAG_ERROR:
            exchange.fail(f"the client refused {exchange.code.name}: errno {header.error}")
        elif exchange.code is Command.DMA_READ:
            # Data is the end of the message; QEMU and the protocol's text differ in what the count before it takes.
            if len(payload) < exchange.count:
                exchange.fail(f"DMA_READ of {exchange.count} bytes answered with {len(payload)}")
            else:
                exchange.data = bytes(payload[len(payload) - exchange.count :])
        exchange.answered.set()

    def refuse(self, reason: str) -> None:
        """Fail everything that waits and all that is asked until `admit`, with DmaError."""
        with self._lock:
            self._refusal = reason
            waiting = list(self._exchanges.values())
        for exchange in waiting:
            # It stays in the table: its id is taken until the client answers.
            if not exchange.answered.is_set():
                exchange.fail(reason)

    def admit(self) -> None:
        """Work again after `refuse`."""
        with self._lock:
            self._refusal = None

    def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
        for start in range(0, length, self._max_size):
            yield start, min(self._max_size, length - start)

    def _start(self, code: Command, address: int, count: int, data: memoryview | bytes = b"") -> _Exchange:
        assert threading.get_ident() != self._control_thread, "the control thread would wait for itself"
        exchange = _Exchange(code, count)
        with self._lock:
            if self._refusal is not None:
                raise DmaError(self._refusal)
            if len(self._exchanges) > 0xFFFF:
                raise DmaError("the client answers nothing: 65536 messages are under way")
            while self._next_id in self._exchanges:
                self._next_id = (self._next_id + 1) & 0xFFFF
            message_id = self._next_id
            self._next_id = (message_id + 1) & 0xFFFF
            self._exchanges[message_id] = exchange
        self._send(message.command(message_id, code, message.dma_access_payload(address, count, data)))
        return exchange
