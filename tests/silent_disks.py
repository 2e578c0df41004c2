"""Disks that are silent when a test says so: their reads are under way, in nvmove, in the kernel or at a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nvmove.block.backend import Backend, Operation, Request
from nvmove.block.config import OpenOptions
from nvmove.block.fault import FaultRule, FaultRules, FaultyBackend
from nvmove.block.nbd.backend import open_nbd
from nvmove.block.raw.backend import open_raw
from tests.fuse_disk import fuse_disk
from tests.nbd_server import ALL, MULTI_CONN, Server, serving

_HOURS = 3600 * 1_000_000


@dataclass
class SilentDisk:
    """A disk full of `CONTENT`."""

    CONTENT = b"\xd1"
    SIZE = 1 << 20

    backend: FaultyBackend
    mute: Callable[[], None]
    """Answer no read from now on."""
    unmute: Callable[[], None]
    """Answer them; may be called again."""
    reads: Callable[[], list[int]]
    """Where the reads begin, in bytes, that have arrived since it is silent: those that were not split up."""
    is_lent: bool
    """Whether a compiled loop reads it while it is silent."""


@contextlib.contextmanager
def held_in_nvmove(work: Path, *, direct: bool) -> Iterator[SilentDisk]:
    """A file whose reads the fault layer begins late."""
    path = work / "disk.raw"
    path.write_bytes(SilentDisk.CONTENT * SilentDisk.SIZE)
    rules = _NotedRules()
    rule = FaultRule(operation=Operation.READ, delay=_HOURS)
    with contextlib.closing(FaultyBackend(_raw(path, direct), rules, ["d0"])) as backend:
        yield SilentDisk(backend, lambda: rules.begin(rule), rules.end, lambda: rules.seen, is_lent=False)


class _NotedRules(FaultRules):
    """One rule, which notes what it is used on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self._added: list[int] = []

    def begin(self, rule: FaultRule) -> None:
        self._added.append(self.add(rule))

    def end(self) -> None:
        while self._added:
            self.remove(self._added.pop())

    def take(self, request: Request, drive: frozenset[str], block_size: int) -> tuple[int, FaultRule] | None:
        hit = super().take(request, drive, block_size)
        if hit is not None:
            self.seen.append(request.offset)
        return hit


@contextlib.contextmanager
def held_in_the_kernel(_work: Path, *, direct: bool) -> Iterator[SilentDisk]:
    """A file whose filesystem does not answer."""
    with (
        fuse_disk(SilentDisk.CONTENT * SilentDisk.SIZE) as fuse,
        contextlib.closing(FaultyBackend(_raw(fuse.path, direct), FaultRules(), ["d0"])) as backend,
    ):
        yield SilentDisk(backend, fuse.muted.set, fuse.release, lambda: fuse.held_at, is_lent=True)


@contextlib.contextmanager
def held_by_a_server(work: Path) -> Iterator[SilentDisk]:
    """An export whose server is silent."""
    server = Server(bytearray(SilentDisk.CONTENT * SilentDisk.SIZE), ALL | MULTI_CONN)
    with serving(server, work / "nbd"):
        image = open_nbd(f"nbd+unix:///?socket={work / 'nbd'}", options=OpenOptions())
        with contextlib.closing(FaultyBackend(image, FaultRules(), ["d0"])) as backend:
            before: list[int] = []

            def mute() -> None:
                server.muted.set()
                before.append(len(server.commands))

            yield SilentDisk(
                backend,
                mute,
                server.unmute,
                lambda: [command.offset for command in server.commands[before[0] :]],
                is_lent=True,
            )


def _raw(path: Path, direct: bool) -> Backend:
    return open_raw(str(path), options=OpenOptions(direct=direct))
