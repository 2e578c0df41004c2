"""Takes one message after the other off a client's socket.

Messages are read exactly, header then payload, so descriptors that arrive belong to the message being read. The kernel
closes those that come with a payload. In place of what it could not give us (we have too many open, or it is more than
`MAX_MSG_FDS`) there is `LOST`, once.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Protocol

from nvmove.vfio import message

LOST = -1
_ANCILLARY_SIZE = socket.CMSG_SPACE(message.MAX_MSG_FDS * array.array("i").itemsize)


class Receiver(Protocol):
    """Who receives. One that knows better what to do with a message keeps it to itself (`nvmove.engine.loop.Bells`)."""

    def receive(self, sock: socket.socket, buffer: memoryview) -> list[int] | None:
        """Wait for a message and put it into `buffer`, of `MAX_MESSAGE_SIZE`; return its descriptors, now the caller's.

        The last is `LOST` where there were more. None when the stream has ended; a header that `parse_header` refuses
        comes alone. Raises OSError.
        """


class PlainReceiver:
    """Receives every message."""

    def receive(self, sock: socket.socket, buffer: memoryview) -> list[int] | None:
        """As `Receiver`."""
        fds: list[int] = []
        try:
            if _fill(sock, buffer[: message.HEADER_SIZE], fds):
                size = message.announced_size(buffer[: message.HEADER_SIZE])
                if size is None or _fill(sock, buffer[message.HEADER_SIZE : size], None):
                    taken, fds = fds, []
                    return taken
            return None
        finally:
            close_all(fds)


def _fill(sock: socket.socket, buffer: memoryview, fds: list[int] | None) -> bool:
    """Fill `buffer`; False when the stream ends first. Descriptors go into `fds`."""
    done = 0
    while done < len(buffer):
        if fds is None:
            count = sock.recv_into(buffer[done:])
        else:
            count, ancillary, flags, _ = sock.recvmsg_into([buffer[done:]], _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
            fds.extend(_descriptors(ancillary))
            if flags & socket.MSG_CTRUNC:
                fds.append(LOST)
        if not count:
            return False
        done += count
    return True


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def close_all(fds: list[int]) -> None:
    """Close descriptors as they were received, and empty the list."""
    while fds:
        fd = fds.pop()
        if fd != LOST:
            os.close(fd)
