"""The socket side of vfio-user: a listening Unix socket and one control thread that serves one client after the other.

A second client that connects while one is served waits in the socket's backlog, unanswered, until the first has gone: a
new QEMU may start while the old one is still closing. QEMU itself gives up after 5 s.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from nvmove.vfio import message
from nvmove.vfio.device import Device
from nvmove.vfio.receive import PlainReceiver, Receiver, close_all
from nvmove.vfio.session import Session

log = logging.getLogger(__name__)

_MAX_PATH = 107
"""Bytes of a Unix socket's path (sun_path without its NUL, unix(7))."""
_CLOSE_TIMEOUT = 10
"""Seconds that `Server.close` waits for I/O that a back end does not finish."""


class ListenError(Exception):
    """The socket cannot be had: one line that says what is wrong and how to mend it."""


class Connection:
    """One client. `serve` runs on the control thread; `send` and `shutdown` may be called from any thread."""

    def __init__(self, sock: socket.socket, device: Device, receiver: Receiver | None = None) -> None:
        self._socket = sock
        self._receiver = receiver or PlainReceiver()
        self._send_lock = threading.Lock()
        self._buffer = memoryview(bytearray(message.MAX_MESSAGE_SIZE))
        self._session = Session(device, self.send)

    def serve(self) -> None:
        """Handle messages until the client closes or cannot be understood; then wait until its memory is released."""
        try:
            while self._serve_one():
                pass
        except message.StreamError as error:
            log.warning("vfio-user client: %s: connection closed", error)
        except OSError as error:
            log.info("vfio-user connection lost: %s", error.strerror)
        finally:
            self._socket.close()
            released = threading.Event()
            self._session.close(released.set)
            released.wait()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one whole message. When the client is gone nothing happens here: the control thread finds out itself."""
        with self._send_lock, contextlib.suppress(OSError):
            if fds:
                sent = socket.send_fds(self._socket, [data], list(fds))
                data = data[sent:]
            self._socket.sendall(data)

    def shutdown(self) -> None:
        """Make `serve` return."""
        with contextlib.suppress(OSError):  # the client was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve_one(self) -> bool:
        fds = self._receiver.receive(self._socket, self._buffer)
        if fds is None:
            return False
        try:
            header = message.parse_header(self._buffer[: message.HEADER_SIZE])
        except message.StreamError:
            close_all(fds)
            raise
        self._session.handle(header, self._buffer[message.HEADER_SIZE : header.size], fds)
        return True


class Server:
    """Listens at `path` and serves `device` there on its control thread, from `start` to `close`."""

    def __init__(self, path: Path, device: Device, receiver: Receiver | None = None) -> None:
        self._path = path
        self._device = device
        self._receiver = receiver
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="vfio-user", daemon=True)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._closed = False

    def start(self) -> None:
        """Listen. Raises ListenError; nothing is left behind then."""
        self._listener = _listen(self._path)
        self._thread.start()

    def close(self) -> None:
        """End the connection, remove the socket and wait for the control thread, for a while. May be called again."""
        with self._lock:
            self._closed = True
            connection = self._connection
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            if connection is not None:
                connection.shutdown()
            self._thread.join(_CLOSE_TIMEOUT)
            if self._thread.is_alive():
                log.error("vfio-user: I/O under way still uses the guest's memory after %d s", _CLOSE_TIMEOUT)
            self._listener.close()
            self._path.unlink(missing_ok=True)
            self._listener = None

    def _run(self) -> None:
        assert self._listener is not None  # `start` has made it
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                # Descriptors or memory ran out, or the client hung up: accept would fail at once again.
                log.error("vfio-user: accept: %s", error.strerror)
                threading.Event().wait(0.1)
                continue
            connection = Connection(sock, self._device, self._receiver)
            with self._lock:
                if self._closed:
                    sock.close()
                    return
                self._connection = connection
            log.debug("vfio-user client connected")
            connection.serve()
            with self._lock:
                self._connection = None


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ListenError(f"{path}: longer than the {_MAX_PATH} bytes that a socket's path may have; use a shorter one")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        listener.bind(os.fspath(path))
        bound = True
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)  # nobody can connect before listen
        listener.listen(1)
    except OSError as error:
        listener.close()
        if bound:
            path.unlink(missing_ok=True)
        raise ListenError(f"{path}: {error.strerror}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed server left behind; refuse one that is served, and what is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"{path}: exists and is no socket; remove it or choose another path")
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        raise ListenError(f"{path}: {error.strerror}") from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # its backlog is full, so somebody listens
            pass
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror}") from error
    raise ListenError(f"{path}: another process serves this socket; choose another path")
