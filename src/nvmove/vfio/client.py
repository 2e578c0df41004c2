"""A vfio-user client: what QEMU is to a server, for tests and measurements.

It owns guest memory: shared with the server by memfd, or kept back and served by message. A reader thread takes replies
and the server's DMA requests.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import mmap
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nvmove.vfio import deviceinfo, message
from nvmove.vfio.device import CONFIG_REGION
from nvmove.vfio.message import Command, DmaMap, DmaUnmap, Header, IrqSet, RegionAccess
from nvmove.vfio.version import Version, parse_version, version_payload


class ClientError(OSError):
    """The server answered with an error: `errno` is its own."""


class _Reply:
    __slots__ = ("arrived", "header", "payload")

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.header: Header | None = None
        self.payload = b""


class GuestRam:
    """A run of the client's memory at guest address `address`: `view` is its content."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.view = memoryview(mmap.mmap(self.fd, size))

    @property
    def end(self) -> int:
        """The guest address after the last byte."""
        return self.address + len(self.view)

    def close(self) -> None:
        """Close the descriptor; the memory goes with the last view of it."""
        os.close(self.fd)


class VfioUserClient:
    """A connected client, negotiated on construction. Its methods wait for the reply, `timeout` seconds at most.

    Raises ClientError for error replies, TimeoutError, ConnectionError when the server closes.
    """

    def __init__(self, sock: socket.socket, timeout: float = 10.0, negotiate: bool = True) -> None:
        self._socket = sock
        self._timeout = timeout
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._replies: dict[int, _Reply] = {}
        self._ram: list[GuestRam] = []
        self._fds: list[int] = []
        """Descriptors that came with replies and were not taken."""
        self.answers_dma = True
        """Set to False, the server's DMA requests stay unanswered in `unanswered`, until `answer_dma`."""
        self.unanswered: list[tuple[Header, bytes]] = []
        self.closed = threading.Event()
        """Set when the server has closed the connection."""
        self._reader = threading.Thread(target=self._read, name="vfio-user-client", daemon=True)
        self._reader.start()
        self.version = self.negotiate() if negotiate else None

    @classmethod
    def connect(cls, path: Path, timeout: float = 10.0) -> VfioUserClient:
        """Connect to a server's socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            sock.close()
            raise
        return cls(sock, timeout)

    def __enter__(self) -> VfioUserClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up and let go of the memory."""
        with contextlib.suppress(OSError):  # the server may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()
        for ram in self._ram:
            ram.close()
        self._ram.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def fileno(self) -> int:
        """Return the socket's descriptor, for one that posts writes past this class; it must send whole messages."""
        return self._socket.fileno()

    # Messages.

    def call(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a command, return its reply's payload."""
        reply = _Reply()
        message_id = next(self._ids) & 0xFFFF
        with self._lock:
            self._replies[message_id] = reply
        self.send_raw(message.command(message_id, code, payload), fds)
        if not reply.arrived.wait(self._timeout):
            raise TimeoutError(f"no reply to command {code} in {self._timeout} s")
        if reply.header is None:
            raise ConnectionError("the server closed the connection")
        if reply.header.flags & message.FLAG_ERROR:
            raise ClientError(reply.header.error, os.strerror(reply.header.error))
        return reply.payload

    def post(self, code: int, payload: bytes) -> None:
        """Send a command that is not answered."""
        self.send_raw(message.command(next(self._ids) & 0xFFFF, code, payload, message.FLAG_NO_REPLY))

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are: tests of hostile clients."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with self._lock:
            sent = self._socket.sendmsg([data], ancillary)
            if sent < len(data):
                self._socket.sendall(memoryview(data)[sent:])

    # Commands.

    def negotiate(self) -> Version:
        """Propose our version and capabilities; return the server's."""
        return parse_version(memoryview(self.call(Command.VERSION, version_payload(True, True))))

    def map_ram(self, address: int, size: int, shared: bool = True, writable: bool = True) -> GuestRam:
        """Give the guest memory; not `shared`, the server reaches it by message only."""
        ram = GuestRam(address, size)
        self._ram.append(ram)
        request = DmaMap(address, size, 0, True, writable)
        self.call(Command.DMA_MAP, message.dma_map_payload(request), [ram.fd] if shared else [])
        return ram

    def unmap(self, address: int, size: int) -> None:
        """Take memory away; returns when the server no longer uses it."""
        self.call(Command.DMA_UNMAP, message.dma_unmap_payload(DmaUnmap(address, size, False)))

    def unmap_all(self) -> None:
        """Take all memory away."""
        self.call(Command.DMA_UNMAP, message.dma_unmap_payload(DmaUnmap(0, 0, True)))

    def region_size(self, region: int) -> int:
        """Return a region's size, 0 when it is absent."""
        return self._region_info(region, deviceinfo.REGION_INFO_SIZE).size

    def map_region(self, region: int) -> tuple[int, memoryview] | None:
        """Map what the server offers of a region: return its offset in the region and the memory, None without any."""
        first = self._region_info(region, deviceinfo.REGION_INFO_SIZE)
        if first.argsz <= deviceinfo.REGION_INFO_SIZE:
            return None
        whole = self._region_info(region, first.argsz)
        with self._lock:
            fds, self._fds = self._fds, []
        try:
            if not whole.areas or not fds:
                return None
            offset, size = whole.areas[0]
            return offset, memoryview(mmap.mmap(fds[0], size, offset=offset))
        finally:
            for fd in fds:
                os.close(fd)

    def _region_info(self, region: int, argsz: int) -> deviceinfo.RegionReply:
        reply = self.call(Command.DEVICE_GET_REGION_INFO, deviceinfo.region_info_payload(region, argsz=argsz))
        return deviceinfo.parse_region_info(memoryview(reply))

    def irq_count(self, index: int) -> int:
        """Return how many interrupts an index has."""
        reply = self.call(Command.DEVICE_GET_IRQ_INFO, deviceinfo.indexed_info_payload(index))
        return deviceinfo.parse_indexed_info(memoryview(reply))[2]

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read a region."""
        payload = message.region_access_payload(RegionAccess(offset, region, count))
        return self.call(Command.REGION_READ, payload)[len(payload) :]

    def write(self, region: int, offset: int, data: bytes, posted: bool = False) -> None:
        """Write a region."""
        payload = message.region_access_payload(RegionAccess(offset, region, len(data), data))
        if posted:
            self.post(Command.REGION_WRITE, payload)
        else:
            self.call(Command.REGION_WRITE, payload)

    def write_multi(self, writes: Sequence[RegionAccess], posted: bool = True) -> None:
        """Write several registers with one message, as QEMU does under load."""
        payload = message.write_multi_payload(list(writes))
        if posted:
            self.post(Command.REGION_WRITE_MULTI, payload)
        else:
            self.call(Command.REGION_WRITE_MULTI, payload)

    def config(self, offset: int, count: int) -> bytes:
        """Read PCI configuration space."""
        return self.read(CONFIG_REGION, offset, count)

    def set_irqs(
        self, index: int, start: int, count: int, flags: int, fds: Sequence[int] = (), fire: Sequence[bool] = ()
    ) -> None:
        """Send a SET_IRQS with `flags` of `nvmove.vfio.message` (SET_*)."""
        self.call(
            Command.DEVICE_SET_IRQS, message.irq_set_payload(IrqSet(index, start, count, flags, tuple(fire))), fds
        )

    def reset(self) -> None:
        """Reset the device; returns when no I/O started before touches memory any more."""
        self.call(Command.DEVICE_RESET)

    # The server's requests.

    def answer_dma(self) -> None:
        """Answer what came while `answers_dma` was False, and what comes."""
        self.answers_dma = True
        with self._lock:
            waiting, self.unanswered = self.unanswered, []
        for header, payload in waiting:
            self._serve_dma(header, payload)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while (head := self._receive(message.HEADER_SIZE)) is not None:
                header = message.parse_header(head)
                payload = self._receive(header.size - message.HEADER_SIZE)
                if payload is None:
                    break
                if header.is_reply:
                    with self._lock:
                        reply = self._replies.pop(header.id)
                    reply.header, reply.payload = header, payload
                    reply.arrived.set()
                elif self.answers_dma:
                    self._serve_dma(header, payload)
                else:
                    with self._lock:
                        self.unanswered.append((header, payload))
        self.closed.set()
        with self._lock:
            for reply in self._replies.values():
                reply.arrived.set()

    def _serve_dma(self, header: Header, payload: bytes) -> None:
        address, count, data = message.parse_dma_access(memoryview(payload))
        ram = next((ram for ram in self._ram if ram.address <= address and address + count <= ram.end), None)
        if ram is None:
            self.send_raw(message.error_reply(header, errno.EFAULT))
            return
        part = ram.view[address - ram.address : address - ram.address + count]
        if header.command == Command.DMA_WRITE:
            part[:] = data
            if header.wants_reply:
                self.send_raw(message.reply(header, message.dma_access_payload(address, count)))
        else:
            self.send_raw(message.reply(header, message.dma_access_payload(address, count, part)))

    def _receive(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            part, fds, _, _ = socket.recv_fds(self._socket, size - len(parts), message.MAX_MSG_FDS)
            with self._lock:
                self._fds += fds
            if not part:
                return None
            parts += part
        return bytes(parts)
