"""Every back end against a model: batches of random operations with random buffers, many of them under way at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvmove.block import linux
from nvmove.block.backend import Backend, BackendError, Operation
from nvmove.block.config import OpenOptions
from nvmove.block.nbd.backend import nbd_unix_uri, open_nbd
from nvmove.block.raw import direct
from nvmove.block.raw.backend import open_raw
from tests.block_helpers import KIB, aligned, qemu_nbd, read, start, tool
from tests.nbd_server import ALL, FUA, TRIM, ZEROES, Server, serving

SECTORS = 96
SIZE = SECTORS * 512
OPTIONS = OpenOptions(discard="unmap", detect_zeroes="unmap")


@dataclass(frozen=True)
class Op:
    """One operation, on sectors; `seed` makes its data and its buffers."""

    operation: Operation
    first: int
    count: int
    seed: int
    fua: bool

    def overlaps(self, other: Op) -> bool:
        return self.first < other.first + other.count and other.first < self.first + self.count


def ops() -> st.SearchStrategy[Op]:
    return st.builds(
        Op,
        operation=st.sampled_from(
            [Operation.READ, Operation.WRITE, Operation.WRITE, Operation.WRITE_ZEROES, Operation.FLUSH]
        ),
        first=st.integers(0, SECTORS - 16),
        count=st.integers(1, 16),
        seed=st.integers(0, 2**16),
        fua=st.booleans(),
    )


def batches(operations: list[Op]) -> Iterator[list[Op]]:
    """Cut into runs that do not overlap: NVMe gives no order between commands under way."""
    batch: list[Op] = []
    for op in operations:
        if any(op.overlaps(other) for other in batch):
            yield batch
            batch = []
        batch.append(op)
    yield batch


def scattered(data: bytes, chance: random.Random) -> list[memoryview]:
    """Memory in random pieces, some empty, some adjacent, some aligned, filled with `data`."""
    pieces = []
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 1, 4))))
    if chance.random() < 0.5:
        cuts = [cut // 512 * 512 for cut in cuts]
    arena = aligned(2 * len(data) + 64 * KIB)
    at = chance.choice((0, 0, 512, 1))
    for begin, end in itertools.pairwise([0, *cuts, len(data)]):
        piece = arena[at : at + end - begin]
        piece[:] = data[begin:end]
        pieces.append(piece)
        at += end - begin + chance.choice((0, 0, 512, 3))
    return pieces


def check(disk: Backend, model: bytearray, operations: list[Op]) -> None:
    for batch in batches(operations):
        under_way = []
        for op in batch:
            chance = random.Random(op.seed)
            offset, length = op.first * 512, op.count * 512
            buffers: list[memoryview] = []
            if op.operation is Operation.READ:
                buffers = scattered(b"\xa5" * length, chance)
            elif op.operation is Operation.WRITE:
                data = bytes(length) if op.seed % 5 == 0 else chance.randbytes(length)
                buffers = scattered(data, chance)
                model[offset : offset + length] = data
            elif op.operation is Operation.WRITE_ZEROES:
                model[offset : offset + length] = bytes(length)
            waiter = start(disk, op.operation, offset, length, buffers, fua=op.fua, may_unmap=bool(op.seed % 2))
            under_way.append((op, buffers, waiter))
        for op, buffers, waiter in under_way:
            assert waiter.wait() == 0
            assert waiter.calls == [0]
            if op.operation is Operation.READ:
                assert b"".join(buffers) == model[op.first * 512 : (op.first + op.count) * 512]
    assert read(disk, 0, SIZE) == model


@contextlib.contextmanager
def raw(path: Path, size: int, options: OpenOptions) -> Iterator[Backend]:
    path.write_bytes(bytes(size))
    disk = open_raw(str(path), options=options)
    yield disk
    disk.close()


@contextlib.contextmanager
def direct_on(path: Path, alignment: int) -> Iterator[Backend]:
    with pytest.MonkeyPatch.context() as patch:
        real = linux.direct_alignment
        patch.setattr(direct, "direct_alignment", lambda fd: max(alignment, real(fd)))
        options = OpenOptions(direct=True, discard="unmap", detect_zeroes="on")
        with raw(path, SIZE - 512 * 3, options) as disk:
            os.truncate(path, SIZE - 400)
            assert disk.refresh_size() == SIZE
            yield disk


@contextlib.contextmanager
def export(path: Path, flags: int, blocks: tuple[int, int, int]) -> Iterator[Backend]:
    with serving(Server(bytearray(SIZE), flags, blocks), path):
        disk = open_nbd(nbd_unix_uri(str(path)), options=OPTIONS)
        yield disk
        disk.close()


BACKENDS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Backend]]] = {
    "raw": lambda path: raw(path, SIZE, OPTIONS),
    "raw, odd size, writethrough": lambda path: raw(path, SIZE - 300, OpenOptions(writeback=False)),
    "direct 512": lambda path: direct_on(path, 512),
    "direct 4096": lambda path: direct_on(path, 4096),
    "nbd": lambda path: export(path, ALL, (1, 4096, 3 * 512)),
    "nbd, 4096 blocks": lambda path: export(path, ALL, (4096, 4096, 4096)),
    "nbd, bare server": lambda path: export(path, ALL & ~(FUA | TRIM | ZEROES), (1024, 4096, 32 << 20)),
}


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(ops(), min_size=1, max_size=40))
def test_a_disk_holds_what_was_written(name: str, operations: list[Op]) -> None:
    with tempfile.TemporaryDirectory(prefix="nvmove-test-") as folder, BACKENDS[name](Path(folder, "d")) as disk:
        check(disk, bytearray(SIZE), operations)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_qcow2_behind_qemu_nbd_holds_what_was_written(tmp_path: Path, sysroot: Path, cache: str) -> None:
    image, socket, name = tmp_path / "disk.qcow2", tmp_path / "nbd.sock", "name /?&"
    assert tool(sysroot, "qemu-img", "create", "-f", "qcow2", image, str(SIZE)).returncode == 0
    with qemu_nbd(sysroot, "-t", "--cache", cache, "-f", "qcow2", "-x", name, "-k", str(socket), str(image)):
        with pytest.raises(BackendError, match="no export named 'other'"):
            open_nbd(nbd_unix_uri(str(socket), "other"))
        disk = open_nbd(nbd_unix_uri(str(socket), name), options=OPTIONS)
        chance = random.Random(7)
        kinds = [Operation.READ, Operation.WRITE, Operation.WRITE_ZEROES]
        operations = [
            Op(chance.choice(kinds), chance.randrange(SECTORS - 16), chance.randint(1, 16), seed, seed % 3 == 0)
            for seed in range(200)
        ]
        check(disk, bytearray(SIZE), operations)
        assert start(disk, Operation.DISCARD, 0, SIZE).wait() == 0
        assert disk.refresh_size() == SIZE, "qemu-nbd takes one client at a time"
        disk.close()
