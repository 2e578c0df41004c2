"""A user's NBD connections, passed on to QEMU's private server: exports that are hidden are not there for them.

Only the handshake is looked at (NBD's proto.md, "Option haggling"): lists are filtered, and a hidden name is answered
as an unknown one. Then bytes go to and fro in the kernel (splice(2)), on two threads a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nvmove.vm.monitor.listener import Listener

log = logging.getLogger(__name__)

Hidden = Callable[[bytes], bool]
"""Whether an export of this name is to be hidden."""

# NBD proto.md, "Newstyle negotiation", "Option types" and "Option reply types"
GREETING = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 9, 10
REP_ACK, REP_SERVER = 1, 2
REP_FLAG_ERROR = 1 << 31
REP_ERR_UNKNOWN = REP_FLAG_ERROR | 6
_NAME_AFTER_LENGTH = frozenset({OPT_INFO, OPT_GO, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT})
"""Options whose data begin with the length of a name (32 bits) and the name."""

_MAX_OPTION = 1 << 20
"""Bytes of an option's data; names have 4096 at most, and few queries follow."""
_PIPE = 1 << 20
"""Bytes that one splice moves; what a pipe may hold without privileges (pipe(7), pipe-max-size)."""


class HandshakeError(Exception):
    """A peer broke the rules, took too long or hung up: the connection is of no use."""


class _Peer:
    """One end of a handshake."""

    def __init__(self, connection: socket.socket, deadline: float | None) -> None:
        self._connection = connection
        self._deadline = deadline

    def read(self, count: int) -> bytes:
        """Return exactly `count` bytes."""
        data = bytearray()
        while len(data) < count:
            self._limit()
            piece = self._connection.recv(count - len(data))
            if not piece:
                raise HandshakeError("hung up")
            data += piece
        return bytes(data)

    def send(self, data: bytes) -> None:
        self._limit()
        self._connection.sendall(data)

    def _limit(self) -> None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise HandshakeError("took too long")
            self._connection.settimeout(left)


def hidden_name(option: int, data: bytes, hidden: Hidden) -> bool:
    """Return whether an option names an export that is hidden."""
    if option == OPT_EXPORT_NAME:
        return hidden(data)
    if option in _NAME_AFTER_LENGTH and len(data) >= 4:
        return hidden(data[4 : 4 + int.from_bytes(data[:4])])
    return False


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """Return an option reply."""
    return struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data


def negotiate(client: socket.socket, server: socket.socket, hidden: Hidden, deadline: float | None = None) -> bool:
    """Pass a handshake on; return whether the transmission phase follows, else the client has taken its leave.

    `deadline` is on the monotonic clock. Raises HandshakeError, OSError.
    """
    ours, theirs = _Peer(server, deadline), _Peer(client, deadline)
    greeting = ours.read(len(GREETING) + 2)
    if not greeting.startswith(GREETING):
        raise HandshakeError("the server does not speak NBD's newstyle")
    theirs.send(greeting)
    ours.send(theirs.read(4))
    while True:
        head = theirs.read(16)
        option, length = struct.unpack(">II", head[8:])
        if not head.startswith(OPTION_MAGIC) or length > _MAX_OPTION:
            raise HandshakeError("sent what is no option")
        data = theirs.read(length)
        if hidden_name(option, data, hidden):
            if option == OPT_EXPORT_NAME:  # it has no answer: a server hangs up on an unknown name
                raise HandshakeError("asked for an unknown export")
            theirs.send(reply(option, REP_ERR_UNKNOWN, b"export not present"))
            continue
        ours.send(head + data)
        if option == OPT_EXPORT_NAME:
            return True
        kind = _pass_replies(ours, theirs, hidden)
        if option == OPT_ABORT:
            return False
        if option == OPT_GO and kind == REP_ACK:
            return True


def _pass_replies(server: _Peer, client: _Peer, hidden: Hidden) -> int:
    """Pass on the replies to one option; return the type of the last."""
    while True:
        head = server.read(20)
        _magic, option, kind, length = struct.unpack(">QIII", head)
        data = server.read(length)
        is_hidden = option == OPT_LIST and kind == REP_SERVER and hidden(data[4 : 4 + int.from_bytes(data[:4])])
        if not is_hidden:
            client.send(head + data)
        if kind == REP_ACK or kind & REP_FLAG_ERROR:
            return int(kind)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Move bytes until `source` has no more, or either end is gone."""
    try:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        log.warning("nbd: a client is hung up on: %s", error.strerror)
        return
    try:
        with contextlib.suppress(OSError):  # a user with many pipes gets small ones: it works, slower
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE)
        while count := os.splice(source.fileno(), write_end, _PIPE):
            while count:
                count -= os.splice(read_end, sink.fileno(), count)
    except OSError as error:
        log.debug("nbd: a connection broke: %s", error.strerror)
    finally:
        os.close(read_end)
        os.close(write_end)


class _Connection:
    """One client, from its connection to its end, on threads of its own."""

    def __init__(self, client: socket.socket, target: Path, hidden: Hidden, seconds: float) -> None:
        self._client = client
        self._server = socket.socket(socket.AF_UNIX)
        self._target = target
        self._hidden = hidden
        self._deadline = time.monotonic() + seconds if seconds else None
        self._lock = threading.Lock()
        self._ended = False

    def start(self, ended: Callable[[], None]) -> threading.Thread:
        """Begin; `ended` is called on another thread when all is over."""
        thread = threading.Thread(target=self._run, args=(ended,), name="nbd-proxy", daemon=True)
        thread.start()
        return thread

    def _run(self, ended: Callable[[], None]) -> None:
        try:
            self._client.setblocking(True)
            if self._client.family != socket.AF_UNIX:
                self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._server.connect(str(self._target))
            if negotiate(self._client, self._server, self._hidden, self._deadline):
                self._client.settimeout(None)
                self._server.settimeout(None)
                self._transmit()
        except (HandshakeError, OSError) as error:
            log.debug("nbd: a client's handshake failed: %s", error)
        except RuntimeError as error:  # no second thread
            log.warning("nbd: a client is hung up on: %s", error)
        finally:
            self.drop()
            ended()

    def drop(self) -> None:
        """Close both ends, which nobody waits for any more."""
        with self._lock:
            self._ended = True
            self._client.close()
            self._server.close()

    def _transmit(self) -> None:
        def answers() -> None:
            _pump(self._server, self._client)
            self.hang_up()

        answering = threading.Thread(target=answers, name="nbd-proxy-answers", daemon=True)
        answering.start()
        _pump(self._client, self._server)
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_WR)  # what is under way may still be answered
        answering.join()

    def hang_up(self) -> None:
        """End it; whoever waits for either side wakes up."""
        with self._lock:
            if not self._ended:
                for end in (self._client, self._server):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)


class NbdProxy:
    """Listens for NBD clients, and passes each on to the server at `target`."""

    def __init__(
        self, listener: Listener, target: Path, hidden: Hidden, *, max_connections: int, handshake_seconds: float
    ) -> None:
        """`max_connections` and `handshake_seconds`: 0 is without limit."""
        self._listener = listener
        self._target = target
        self._hidden = hidden
        self._seconds = handshake_seconds
        self._places = asyncio.Semaphore(max_connections) if max_connections else None
        self._connections: dict[_Connection, threading.Thread] = {}
        self._accepting: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen; raise UserError."""
        await self._listener.open()
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._places is not None:
                await self._places.acquire()  # one client too many waits, as with QEMU: it is not greeted
            client = await self._listener.accept()
            connection = _Connection(client, self._target, self._hidden, self._seconds)

            def ended(connection: _Connection = connection) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody counts any more
                    loop.call_soon_threadsafe(self._forget, connection)

            try:
                self._connections[connection] = connection.start(ended)
            except RuntimeError as error:  # no more threads: this client goes, others may come
                log.warning("nbd: a client was not served: %s", error)
                connection.drop()
                if self._places is not None:
                    self._places.release()

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)
        if self._places is not None:
            self._places.release()

    async def close(self) -> None:
        """Listen no more, and hang up on every client."""
        if self._accepting is not None:
            self._accepting.cancel()
        self._listener.close()
        threads = list(self._connections.values())
        for connection in list(self._connections):
            connection.hang_up()
        for thread in threads:
            await asyncio.to_thread(thread.join)
