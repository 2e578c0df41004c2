"""A disk in memory that does as a test says: it fails, it waits, it remembers what it was asked."""

from __future__ import annotations

import threading

from nvmove.block.backend import Operation, Request


class Disk:
    """`fail` maps operations to errnos. With `hold`, requests wait until `finish`."""

    def __init__(self, size: int = 1 << 20, hold: bool = False, *, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.hold = hold
        self.held: list[Request] = []
        self.requests: list[Request] = []
        """All that were submitted."""
        self.fail: dict[Operation, int] = {}
        self.actual_size = size
        """What `refresh_size` finds."""
        self.read_only = read_only
        self.supports_discard = True
        self.request_alignment = 1
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def operations(self) -> list[Operation]:
        """What it was asked, in order."""
        return [request.operation for request in self.requests]

    def refresh_size(self) -> int:
        self.data = self.data[: self.actual_size].ljust(self.actual_size, b"\0")
        return self.size

    def recover(self) -> None:
        pass

    def close(self) -> None:
        pass

    def submit(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            self.held.append(request)
        if not self.hold:
            self.finish()

    def finish(self, count: int = 1 << 30) -> None:
        """Finish the oldest `count` requests that are held."""
        with self._lock:
            ready, self.held = self.held[:count], self.held[count:]
        for request in ready:
            number = self.error_of(request)
            if not number:
                self.perform(request)
            request.done(number)

    def error_of(self, request: Request) -> int:
        """Return the errno that a request earns, or 0."""
        return self.fail.get(request.operation, 0)

    def perform(self, request: Request) -> None:
        """Do what a request asks."""
        at = request.offset
        for buffer in request.buffers:
            if request.operation is Operation.READ:
                buffer[:] = self.data[at : at + len(buffer)]
            else:
                self.data[at : at + len(buffer)] = buffer
            at += len(buffer)
        if request.operation in {Operation.WRITE_ZEROES, Operation.DISCARD}:
            self.data[request.offset : request.offset + request.length] = bytes(request.length)
