"""Memory that the client of a device can map: pages of a sealed memfd, at the offset that they have in their region."""

from __future__ import annotations

import fcntl
import mmap
import os

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Without them a client could shrink the file, and kill this process by it (SIGBUS)."""


class SharedPages:
    """`size` bytes at `offset` of the file `fd`, all zero: whole pages. `view` is what is in them."""

    def __init__(self, offset: int, size: int) -> None:
        self.fd = os.memfd_create("nvmove-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, offset + size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self.view = memoryview(mmap.mmap(self.fd, size, offset=offset))

    def close(self) -> None:
        """Close the file; the memory goes with the last view of it and the client's mapping."""
        os.close(self.fd)
