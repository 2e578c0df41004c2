"""A small NBD server for tests, whose features, errors and silences can be chosen (NBD's proto.md)."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HAS_FLAGS, READ_ONLY, FLUSH, FUA, TRIM, ZEROES, MULTI_CONN = 1, 2, 4, 8, 32, 64, 256
ALL = HAS_FLAGS | FLUSH | FUA | TRIM | ZEROES
COMMANDS = {0: "read", 1: "write", 2: "disconnect", 3: "flush", 4: "trim", 6: "zero"}
_OPTION_MAGIC, _REPLY_MAGIC = 0x49484156454F5054, 0x3E889045565A9
_OPT_INFO, _OPT_GO = 6, 7
_REP_ACK, _REP_INFO, _ERR_UNSUP = 1, 3, 0x80000001


class Command(NamedTuple):
    """A command that arrived; bit 0 of `flags` is FUA, bit 1 NO_HOLE."""

    name: str
    offset: int
    length: int
    flags: int


@dataclass
class Server:
    """Serves `data`: one client after the other, or with MULTI_CONN all at once."""

    data: bytearray
    flags: int = ALL
    blocks: tuple[int, int, int] | None = None
    """Minimum, preferred, maximum block size, when they are to be told."""
    commands: list[Command] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    """NBD errors to answer commands with, by name."""
    muted: threading.Event = field(default_factory=threading.Event)
    """While set, commands are read and not answered."""
    arrived: threading.Condition = field(default_factory=threading.Condition)
    together: int = 1
    """So many replies go out at once."""
    piece: int = 0
    """Bytes that are sent and received at a time through sockets that take few; 0: as many as there are."""
    distort: Callable[[bytes], bytes] = bytes
    """What becomes of a reply."""
    held: dict[int, list[bytes]] = field(default_factory=dict)
    """Replies that are not sent, by client."""
    clients: list[socket.socket] = field(default_factory=list)
    """All that ever came."""
    sources: list[int] = field(default_factory=list)
    """Which client each command came from."""
    connected: set[int] = field(default_factory=set)
    """The clients that are there."""
    sending: threading.Lock = field(default_factory=threading.Lock)
    """Held by whom looks at `held` and `muted`, and sends."""

    def names(self) -> list[str]:
        """The commands so far, without their ranges."""
        return [command.name for command in self.commands]

    def wait_for(self, count: int) -> None:
        """Wait until `count` commands have arrived."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.commands) >= count, 20)

    def unmute(self) -> None:
        """Answer what was held, and what comes."""
        with self.sending:
            self.muted.clear()
            for number, held in self.held.items():
                self._flush(self.clients[number], held)

    def drop(self) -> None:
        """Cut all clients off."""
        for client in self.clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def serve(self, listener: socket.socket) -> None:
        """Serve until the listener is closed."""
        threads: list[threading.Thread] = []
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                break
            if self.piece:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            number = len(self.clients)
            self.clients.append(client)
            if self.flags & MULTI_CONN:
                threads.append(threading.Thread(target=self._serve, args=(client, number), daemon=True))
                threads[-1].start()
            else:
                self._serve(client, number)
        for thread in threads:
            thread.join(20)

    def _serve(self, client: socket.socket, number: int) -> None:
        self.connected.add(number)
        with client, contextlib.suppress(OSError, EOFError):
            if self._handshake(client):
                self.transmit(client, number)
        self.connected.discard(number)

    def _handshake(self, client: socket.socket) -> bool:
        client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        exactly(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", exactly(client, 16))
            exactly(client, length)

            def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
                client.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(payload)) + payload)

            if option not in (_OPT_GO, _OPT_INFO):
                reply(_ERR_UNSUP)
                continue
            reply(_REP_INFO, struct.pack(">HQH", 0, len(self.data), self.flags))
            if self.blocks:
                reply(_REP_INFO, struct.pack(">HIII", 3, *self.blocks))
            reply(_REP_ACK)
            if option == _OPT_GO:
                return True

    def transmit(self, client: socket.socket, number: int = 0) -> None:
        """Answer commands until the client ends that; raises EOFError and OSError when it hangs up."""
        held = self.held[number] = []
        while True:
            _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", exactly(client, 28, self.piece))
            name = COMMANDS[kind]
            payload = exactly(client, length, self.piece) if name == "write" else b""
            if name == "disconnect":
                return
            with self.arrived:
                self.commands.append(Command(name, offset, length, flags))
                self.sources.append(number)
                self.arrived.notify_all()
            error = self.errors.get(name, 0)
            answer = struct.pack(">IIQ", 0x67446698, error, cookie)
            if not error:
                answer += self._do(name, offset, length, payload)
            with self.sending:
                held.append(self.distort(answer))
                if not self.muted.is_set() and len(held) >= self.together:
                    self._flush(client, held)

    def _flush(self, client: socket.socket, held: list[bytes]) -> None:
        for reply in reversed(held):  # out of order, as a server may
            size = self.piece or len(reply)
            for at in range(0, len(reply), size):
                client.sendall(reply[at : at + size])
        held.clear()

    def _do(self, name: str, offset: int, length: int, payload: bytes) -> bytes:
        if name == "read":
            return bytes(self.data[offset : offset + length])
        if name == "write":
            self.data[offset : offset + length] = payload
        elif name == "zero":
            self.data[offset : offset + length] = bytes(length)
        return b""


def exactly(client: socket.socket, count: int, piece: int = 0) -> bytes:
    data = bytearray()
    while len(data) < count:
        some = client.recv(min(count - len(data), piece or count))
        if not some:
            raise EOFError
        data += some
    return bytes(data)


@contextlib.contextmanager
def serving(server: Server, path: Path) -> Iterator[Server]:
    """Serve on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.drop()
            thread.join(20)
    path.unlink()
