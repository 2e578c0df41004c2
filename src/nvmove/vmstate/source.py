"""Bytes at an offset: a file, or a part of one that lies elsewhere. Migration files hold gigabytes; little is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from nvmove.vmstate.schema import StateError


class Source(Protocol):
    """Random access to bytes."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; raise StateError when there are fewer."""


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """See Source."""
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        """See Source."""
        data = self._data[offset : offset + length] if offset >= 0 else b""
        if len(data) != length:
            raise StateError(f"truncated: {length} bytes at {offset} expected, there are {self.size} in all")
        return data


class FileSource:
    """An open file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            os.close(self._fd)
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """See Source."""
        pieces: list[bytes] = []
        left = length if 0 <= offset <= self.size - length else 0
        while left and (piece := os.pread(self._fd, left, offset + length - left)):
            pieces.append(piece)
            left -= len(piece)
        data = b"".join(pieces)
        if len(data) != length:
            raise StateError(f"truncated: {length} bytes at {offset} expected, there are {self.size} in all")
        return data

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
