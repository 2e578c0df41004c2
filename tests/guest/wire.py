"""A wire between two Unix sockets that can be cut, in one direction or both."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path


class Wire:
    """Listens at `here`; its first client talks to `there`, as long as the wire is whole."""

    def __init__(self, here: Path, there: Path) -> None:
        self.there = there
        self.deaf = threading.Event()
        """While set, what comes back from `there` is lost, its end too."""
        self.mute = threading.Event()
        """While set, what comes back from `there` is lost, but not its end."""
        self._ends: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(here))
        self._listener.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client = self._listener.accept()[0]
            server = socket.socket(socket.AF_UNIX)
            self._ends = [client, server]
            server.connect(str(self.there))
            threading.Thread(target=self._copy, args=(server, client, self.deaf, self.mute), daemon=True).start()
            self._copy(client, server, threading.Event(), threading.Event())

    def _copy(self, source: socket.socket, sink: socket.socket, deaf: threading.Event, mute: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if not (deaf.is_set() or mute.is_set()):
                    sink.sendall(data)
            if not deaf.is_set():
                sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End it, at once; what is on its way is lost."""
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
