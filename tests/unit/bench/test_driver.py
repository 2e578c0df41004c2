"""The host-side initiator against a device in this process: what it asks for is done, and what goes wrong is told."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nvmove.bench import driver, initiator
from nvmove.bench.driver import DoorbellKind, HostDriver, InitiatorError, Job
from nvmove.bench.inside import inside
from nvmove.block.backend import Backend, BackendError, Operation, Request
from nvmove.block.config import NullConfig, OpenOptions
from nvmove.block.fault import FaultRule, FaultRules, FaultyBackend
from nvmove.block.null import NullBackend
from nvmove.block.raw.backend import open_raw
from nvmove.device import NvmeDevice
from nvmove.nvme.config import ControllerConfig, NamespaceConfig

SIZE = 4 << 20


@contextmanager
def host(
    directory: Path, disk: Backend, queues: int = 1, kind: DoorbellKind = DoorbellKind.MESSAGES, **namespace: Any
) -> Iterator[HostDriver]:
    """A device with `disk`, served here, and a driver on it."""
    config = ControllerConfig(
        serial="S1",
        mapped_doorbells=kind is DoorbellKind.MAPPED,
        namespaces=(NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1), **namespace),),
    )
    device = NvmeDevice(config, {"d0": disk}, id="n0")
    try:
        device.start(directory / "s")
        with HostDriver.connect(directory / "s", 64 << 20) as driver:
            driver.make_queues(queues, doorbells=kind)
            yield driver
    finally:
        device.close()
        disk.close()


def raw(directory: Path, options: OpenOptions | None = None) -> Backend:
    image = directory / "image"
    image.write_bytes(bytes(SIZE))
    return open_raw(str(image), options=options)


def null() -> Backend:
    return NullBackend(NullConfig(size=SIZE), OpenOptions())


@pytest.mark.parametrize("size", [512, 4096, 8192, 128 << 10])
@pytest.mark.parametrize("depth", [1, 7])
@pytest.mark.parametrize("kind", DoorbellKind)
def test_what_is_written_is_read(tmp_path: Path, size: int, depth: int, kind: DoorbellKind) -> None:
    with host(tmp_path, raw(tmp_path), kind=kind) as driver:
        count = min(SIZE // size, 200)
        span = count * size
        every = Job(depth=depth, size=size, count=count, span=span, seconds=60, check=True, sequential=True)
        assert driver.run(Job(**{**fields(every), "read_percent": 0})).commands == count
        run = driver.run(every)
        assert run.commands == sum(run.histogram.values()) == count
        assert 0 < run.p50 <= run.p99
        assert 0 <= run.messages <= count + 1
        assert driver.run(Job(**{**fields(every), "sequential": False})).commands == count


@pytest.mark.parametrize("depth", [1, 200])
@pytest.mark.parametrize("kind", DoorbellKind)
def test_an_o_direct_disk_misses_no_doorbell(tmp_path: Path, depth: int, kind: DoorbellKind) -> None:
    """While the loop waits for the disk the host rings, with more than the loop has slots as well."""
    try:
        disk = raw(tmp_path, OpenOptions(direct=True))
    except BackendError as error:
        pytest.skip(str(error))
    with host(tmp_path, disk, kind=kind) as driver:
        job = Job(depth=depth, count=SIZE // 4096, seconds=60, check=True, sequential=True, read_percent=0)
        assert driver.run(job).commands == SIZE // 4096
        assert driver.run(Job(depth=depth, count=500, seconds=60, check=True)).commands == 500


def fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__slots__}


def test_data_that_is_not_what_was_written_is_found(tmp_path: Path) -> None:
    with host(tmp_path, raw(tmp_path)) as driver, pytest.raises(InitiatorError, match="10 of 10 reads had wrong data"):
        driver.run(Job(count=10, check=True, seconds=60))


def test_a_larger_block_size_is_kept_to(tmp_path: Path) -> None:
    with host(tmp_path, raw(tmp_path), logical_block_size=4096, physical_block_size=4096) as driver:
        assert (driver.block, driver.blocks) == (4096, SIZE // 4096)
        job = Job(count=SIZE // 4096, sequential=True, check=True, read_percent=0, depth=4, seconds=60)
        driver.run(job)
        driver.run(Job(count=500, check=True, depth=4, seconds=60))


def test_queues_run_side_by_side_on_parts_of_the_disk(tmp_path: Path) -> None:
    with host(tmp_path, null(), queues=3) as driver:
        assert driver.run(Job(depth=4, count=300, seconds=60), (1, 2, 3)).commands == 900


def test_shadow_doorbells_save_messages(tmp_path: Path) -> None:
    with host(tmp_path, null(), kind=DoorbellKind.SHADOW) as driver:
        assert driver.run(Job(depth=32, count=5000, seconds=60)).messages < 2500


def test_mapped_doorbells_need_no_message(tmp_path: Path) -> None:
    with host(tmp_path, null(), kind=DoorbellKind.MAPPED, queues=2) as driver:
        assert driver.run(Job(depth=32, count=5000, seconds=60), (1, 2)).messages == 0


def test_doorbells_that_the_device_has_not_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostDriver, "offered", frozenset())
    with (
        pytest.raises(InitiatorError, match="no doorbells of the kind shadow"),
        host(tmp_path, null(), kind=DoorbellKind.SHADOW),
    ):
        pass


def test_more_commands_than_a_ring_has_entries_wrap_around(tmp_path: Path) -> None:
    with host(tmp_path, null()) as driver:
        assert driver.run(Job(depth=1023, count=3000, seconds=60)).commands == 3000
        assert driver.run(Job(depth=2, count=3000, seconds=60)).commands == 3000


def test_reads_and_writes_mix(tmp_path: Path) -> None:
    class Counting(NullBackend):
        operations: list[Operation] = []  # noqa: RUF012 -- one test's

        def submit(self, request: Request) -> None:
            self.operations.append(request.operation)
            super().submit(request)

        def lend(self, revoke: Callable[[], None]) -> None:  # a disk that is lent sees no request
            return None

    with host(tmp_path, Counting(NullConfig(size=SIZE), OpenOptions())) as driver:
        driver.run(Job(depth=4, count=400, read_percent=50, seconds=60))
    assert 100 < Counting.operations.count(Operation.READ) < 300


def test_time_ends_a_job(tmp_path: Path) -> None:
    with host(tmp_path, null()) as driver:
        run = driver.run(Job(seconds=0.05))
        assert run.seconds >= 0.05
        assert run.iops == run.commands / run.seconds


@pytest.mark.parametrize("kind", DoorbellKind)
@pytest.mark.parametrize("queues", [(1,), (1, 2)])
def test_an_initiator_that_goes_ahead_keeps_its_queues_filled(
    tmp_path: Path, kind: DoorbellKind, queues: tuple[int, ...]
) -> None:
    with host(tmp_path, null(), queues=2, kind=kind) as driver:
        for _ in range(2):  # where the one ends in the ring the next begins
            run = driver.run(Job(depth=8, seconds=0.05, ahead=0.002), queues)
            assert run.seconds > 0
            assert run.iops == run.commands / run.seconds > 0
            assert run.commands >= run.starved
            assert (run.messages == 0) >= (kind is DoorbellKind.MAPPED)
        assert driver.run(Job(depth=4, count=3000, seconds=60), queues).commands == 3000 * len(queues)


def test_going_ahead_moves_the_data_of_each_entry(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with host(tmp_path, raw(tmp_path)) as driver:
        pages = SIZE // 4096
        driver.run(Job(depth=8, count=pages, sequential=True, read_percent=0, check=True, seconds=60))
        assert bytes(4096) not in [image.read_bytes()[at : at + 4096] for at in range(0, SIZE, 4096)]
        # Eight buffers, whose content is the last writes': the first 1024 pages have these only.
        driver.run(Job(depth=8, sequential=True, read_percent=0, seconds=0.05, ahead=0.002))
        data = image.read_bytes()
        assert len({data[at : at + 4096] for at in range(0, SIZE, 4096)}) == 8


def test_an_error_ahead_is_told(tmp_path: Path) -> None:
    rules = FaultRules()
    rules.add(FaultRule(operation=Operation.READ, errno=5))
    with (
        host(tmp_path, FaultyBackend(null(), rules, ["d0"])) as driver,
        pytest.raises(InitiatorError, match="commands failed, the last with status"),
    ):
        driver.run(Job(depth=8, seconds=0.05, ahead=0.002))


def test_a_device_that_hangs_is_told_to_who_goes_ahead(tmp_path: Path) -> None:
    with host(tmp_path, FaultyBackend(null(), delayed(1_000_000), ["d0"])) as driver:
        ring = driver._rings[1]
        end, done, *_ = ring.run_ahead(
            data=16 << 20, lists=32 << 20, depth=1, size=4096, block=512, first=0, blocks=64,
            read_percent=100, sequential=False, seconds=1, interval=0.005, stall=0.05,
        )  # fmt: skip
        assert (end, done) == (initiator.STALLED, 0)


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    rules = FaultRules()
    rules.add(FaultRule(operation=Operation.READ, errno=5, count=1))
    with (
        host(tmp_path, FaultyBackend(null(), rules, ["d0"])) as driver,
        pytest.raises(InitiatorError, match="1 of 20 commands failed"),
    ):
        driver.run(Job(count=20, seconds=60))


def test_a_device_that_hangs_is_told(tmp_path: Path) -> None:
    with host(tmp_path, FaultyBackend(null(), delayed(1_000_000), ["d0"])) as driver:
        ring = driver._rings[1]
        end, done, *_ = ring.run(
            data=16 << 20, lists=32 << 20, depth=1, size=4096, block=512, first=0, blocks=64,
            read_percent=100, sequential=False, seconds=1, stall=0.05,
        )  # fmt: skip
        assert (end, done) == (initiator.STALLED, 0)


def test_a_device_inside_holds_what_a_full_disk_refuses(tmp_path: Path) -> None:
    with inside(tmp_path / "s", null(), queues=1) as here:
        here.hold(20)
        here.device.pause()
        assert here.device.held == 20
        assert len(here.device.save()) > 20 * 64


def delayed(microseconds: int) -> FaultRules:
    rules = FaultRules()
    rules.add(FaultRule(delay=microseconds))
    return rules


def test_a_device_that_is_gone_is_told(tmp_path: Path) -> None:
    with host(tmp_path, null()) as driver:
        driver.client.close()
        with pytest.raises((InitiatorError, OSError)):
            driver.run(Job(count=10, seconds=60))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with host(tmp_path, null()) as driver:
        for job in (
            Job(depth=1024),
            Job(depth=0),
            Job(size=1000),
            Job(size=4 << 20),
            Job(read_percent=101),
            Job(span=512),
        ):
            with pytest.raises(ValueError, match=r"ring|job|PRP"):
                driver.run(job)
        with pytest.raises(InitiatorError, match="memory of 64 MiB is too small"):
            driver.run(Job(depth=512, size=1 << 20))
        with pytest.raises(InitiatorError, match="refuses admin command 0x6"):
            driver.identify(0x50, 0)


def test_too_many_queues_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InitiatorError, match="does not have 100 queues"), host(tmp_path, null(), queues=100):
        pass


def test_without_its_compiled_part_the_initiator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvmove.bench.initiator", None)
    with pytest.raises(InitiatorError, match="compiled at install"):
        driver.initiator_class()
