"""Memory and ports as the guest's CPU reaches them, from outside: QEMU's object `qtest` on a private socket.

QEMU has the object for its own tests, in every build, and it works beside any accelerator and in any run state. Here it
is used for that alone; its accelerator of the same name, which stops the clock, has no part in this. Accesses go past
an IOMMU, as those of a CPU do. Measured (QEMU 11.1.3): 35 µs each; the VM's state, clock and messages are as without.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from pathlib import Path

from nvmove.vm.monitor.facade import QemuGone

_READ_LIMIT = 1 << 20
"""Bytes of one answer; the longest is an MSI-X table in base64, 44 KiB."""
_SUFFIXES = {1: "b", 2: "w", 4: "l", 8: "q"}


class ReplayError(Exception):
    """QEMU did not do what was asked of it: one line."""


class QTest:
    """The connection, which QEMU makes to a socket of ours when it starts. Accesses come one after the other."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._connected = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def listen(self, path: Path) -> None:
        """Wait for QEMU at `path`."""
        self._server = await asyncio.start_unix_server(self._accept, path, limit=_READ_LIMIT)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._connected.set()

    async def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def ask(self, *lines: str) -> list[str]:
        """Do what the lines say, nothing else of ours in between; return what each answers. Raises ReplayError."""
        async with self._lock:
            await self._connected.wait()
            assert self._writer is not None
            self._writer.write("".join(f"{line}\n" for line in lines).encode())
            try:
                answers = [(await self._reader.readline()).decode() for _ in lines]
            except OSError as error:
                raise QemuGone("QEMU ended") from error
        for line, answer in zip(lines, answers, strict=True):
            if not answer:
                raise QemuGone("QEMU ended")
            if answer.split()[:1] != ["OK"]:
                raise ReplayError(f"QEMU refused '{line.partition(' ')[0]}': {answer.strip()}")
        return [answer.removeprefix("OK").strip() for answer in answers]

    async def read(self, address: int, size: int) -> int:
        """Return what 1, 2, 4 or 8 bytes of memory hold, with one access. Raises ReplayError."""
        return int((await self.ask(f"read{_SUFFIXES[size]} {address:#x}"))[0], 16)

    async def write(self, address: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes of memory with one access. Raises ReplayError."""
        await self.ask(f"write{_SUFFIXES[size]} {address:#x} {value:#x}")

    async def read_bytes(self, address: int, length: int) -> bytes:
        """Return bytes of memory. Raises ReplayError."""
        return base64.b64decode((await self.ask(f"b64read {address:#x} {length:#x}"))[0])

    async def write_bytes(self, address: int, data: bytes) -> None:
        """Write bytes of memory. Raises ReplayError."""
        await self.ask(f"b64write {address:#x} {len(data):#x} {base64.b64encode(data).decode()}")
