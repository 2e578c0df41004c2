"""The protocol's own migration: its state machine, its stream, its log; and a device moved with it."""

from __future__ import annotations

import errno
import itertools
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nvmove.vfio import features
from nvmove.vfio.client import ClientError, VfioUserClient
from nvmove.vfio.dirty import PAGE, DirtyLog, bitmap_size
from nvmove.vfio.features import GET, SET, Feature
from nvmove.vfio.message import Command, RequestError
from nvmove.vfio.migration import MAX_STATE, Migration, State, path
from nvmove.vfio.migration_client import MigrationClient
from tests.vfio_peer import MovedState, PlainDevice, ask_until, connected
from tests.waiting import ended, in_thread

STATES = set(State) - {State.ERROR}


@contextmanager
def migrated(
    fake: MovedState | None = None,
) -> Iterator[tuple[MigrationClient, MovedState, PlainDevice, VfioUserClient]]:
    """A device that the client may migrate."""
    fake = fake or MovedState()
    device = PlainDevice()
    fake.dirty = device.memory.dirty
    migration = Migration(fake)
    device.migration = migration
    try:
        with connected(device) as client:
            yield MigrationClient(client), fake, device, client
    finally:
        migration.close()


def refused(code: int) -> pytest.RaisesExc[ClientError]:
    return pytest.RaisesExc(ClientError, check=lambda error: error.errno == code)


def test_paths_are_the_shortest_and_pass_through_no_saving_state() -> None:
    assert path(State.RUNNING, State.STOP_COPY) == [State.STOP, State.STOP_COPY]
    assert path(State.PRE_COPY, State.STOP_COPY) == [State.STOP_COPY]
    assert path(State.PRE_COPY, State.STOP) == [State.RUNNING, State.STOP]
    assert path(State.STOP_COPY, State.RUNNING) == [State.STOP, State.RUNNING]
    assert path(State.RESUMING, State.PRE_COPY) == [State.STOP, State.RUNNING, State.PRE_COPY]
    assert path(State.STOP_COPY, State.RESUMING) == [State.STOP, State.RESUMING]
    for start, target in itertools.permutations(STATES, 2):
        steps = path(start, target)
        if (start, target) == (State.STOP_COPY, State.PRE_COPY):
            assert steps is None
        else:
            assert steps is not None
            assert not {State.STOP_COPY, State.PRE_COPY} & set(steps[:-1])
    assert path(State.RUNNING, State.RUNNING) == []


def test_there_is_no_way_out_of_error_nor_into_it() -> None:
    assert all(path(State.ERROR, target) is None for target in State)
    assert all(path(start, State.ERROR) is None for start in State)


def test_version_offers_migration_only_to_who_asks_and_where_it_is() -> None:
    with migrated() as (_, _, _, client):
        assert client.version is not None
        assert client.version.migration
    with connected(PlainDevice()) as client:
        assert client.version is not None
        assert not client.version.migration


@pytest.mark.parametrize("size", [1, 7, PAGE, 1 << 20])
def test_a_state_is_read_and_written_in_pieces_of_any_size(size: int) -> None:
    state = bytes(range(256)) * 40
    with migrated(MovedState(state)) as (source, fake, _, _), migrated(MovedState(state)) as (target, other, _, _):
        assert source.flags == features.MIGRATION_STOP_COPY | features.MIGRATION_PRE_COPY
        assert source.save(size) == state
        assert source.read(size) == b""
        target.load(state, size)
        target.state = State.RUNNING
        assert (fake.calls, other.calls) == (["pause", "save"], ["pause", "load", "resume"])


def test_in_pre_copy_the_device_runs_and_has_nothing_to_read() -> None:
    with migrated() as (source, fake, _, _):
        source.state = State.PRE_COPY
        assert source.read(100) == b""
        assert fake.calls == []
        fake.state = b"of later"
        source.state = State.STOP_COPY
        assert source.read(3) + source.read(100) == b"of later"
        source.state = State.RUNNING
        assert fake.calls == ["pause", "save", "resume"]
        assert source.state is State.RUNNING


def test_a_pause_that_takes_time_is_answered_later_and_blocks_nothing() -> None:
    with migrated() as (source, fake, _, client):
        fake.may_pause.clear()
        stopping = in_thread(lambda: setattr(source, "state", State.STOP))
        ask_until(client, lambda: fake.calls)
        assert source.get_state() == State.RUNNING
        assert stopping.is_alive()
        fake.may_pause.set()
        ended(stopping)
        assert source.get_state() == State.STOP


def test_a_refused_state_is_an_error_until_a_reset() -> None:
    with migrated() as (target, fake, device, _):
        target.state = State.RESUMING
        target.write(b"what is this")
        with refused(errno.EINVAL):
            target.state = State.STOP
        assert target.state is State.ERROR
        for state in STATES:
            with refused(errno.EINVAL):
                target.state = state
        assert device.migration is not None
        done = threading.Event()
        device.migration.reset(done.set)
        assert done.wait(5)
        assert target.state is State.RUNNING
        assert fake.calls == ["pause", "load", "resume"]


def test_a_save_that_fails_is_an_error() -> None:
    with migrated() as (source, fake, _, _):
        fake.fails = RuntimeError("defect")
        with refused(errno.EIO):
            source.state = State.STOP_COPY
        assert source.state is State.ERROR


def test_a_reset_leads_to_running_from_everywhere() -> None:
    for state in STATES:
        fake = MovedState()
        migration = Migration(fake)
        reached, done = list[int](), threading.Event()
        migration.set_state(state, reached.append)
        migration.reset(done.set)
        assert done.wait(5)
        assert (reached, migration.get_state()) == ([0], State.RUNNING)
        assert fake.calls.count("pause") == fake.calls.count("resume")
        migration.close()


@pytest.mark.parametrize("state", sorted(STATES))
def test_the_stream_is_there_in_its_states_only(state: State) -> None:
    with migrated() as (client, _, _, _):
        client.state = state
        if state not in {State.PRE_COPY, State.STOP_COPY}:
            with refused(errno.EINVAL):
                client.read(1)
        if state is not State.RESUMING:
            with refused(errno.EINVAL):
                client.write(b"x")


def test_a_state_has_a_largest_size() -> None:
    fake = MovedState()
    migration = Migration(fake)
    done = threading.Event()
    migration.set_state(State.RESUMING, lambda _errno: done.set())
    assert done.wait(5)
    migration.write(bytes(MAX_STATE))
    with pytest.raises(RequestError) as refusal:
        migration.write(b"x")
    assert refusal.value.errno == errno.EFBIG
    migration.close()


def test_probes_say_what_there_is() -> None:
    with migrated() as (client, _, _, raw):
        client.probe(Feature.MIG_DEVICE_STATE, GET | SET)
        client.probe(Feature.DMA_LOGGING_REPORT, GET)
        client.probe(Feature.MIGRATION)
        with refused(errno.EINVAL):
            client.probe(Feature.MIGRATION, SET)
        with refused(errno.ENOTTY):
            client.probe(3)
        with refused(errno.EINVAL):
            raw.call(Command.DEVICE_FEATURE, struct.pack("<II", 8, Feature.MIGRATION | GET | SET))
        with refused(errno.EINVAL):
            raw.call(Command.DEVICE_FEATURE, struct.pack("<II", 8, Feature.MIGRATION))
        with refused(errno.EINVAL):
            raw.call(Command.DEVICE_FEATURE, struct.pack("<II", 8, Feature.MIGRATION | GET))  # no room for the answer
        with refused(errno.EINVAL):
            raw.call(Command.DEVICE_FEATURE, struct.pack("<II", 16, Feature.MIGRATION | GET | 1 << 20))
        for state in (State.ERROR, 5, 7, 99):
            with refused(errno.EINVAL):
                client.set(Feature.MIG_DEVICE_STATE, features.state_payload(state))


def test_without_migration_features_are_refused_as_unknown() -> None:
    with connected(PlainDevice()) as raw:
        client = MigrationClient(raw)
        with refused(errno.ENOTTY):
            client.probe(Feature.MIGRATION)
        with refused(errno.ENOTSUP):
            client.read(1)
        with refused(errno.ENOTSUP):
            client.write(b"x")


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.MIG_DATA_READ, b"1234"),
        (Command.MIG_DATA_READ, struct.pack("<II", 8, 1 << 21)),
        (Command.MIG_DATA_WRITE, struct.pack("<II", 16, 8) + b"short"),
        (Command.DEVICE_FEATURE, b"123"),
        (Command.DEVICE_FEATURE, struct.pack("<II", 8, Feature.DMA_LOGGING_START | SET)),
    ],
)
def test_malformed_requests_are_einval(command: Command, payload: bytes) -> None:
    with migrated() as (_, _, _, raw), refused(errno.EINVAL):
        raw.call(command, payload)


def test_the_log_has_what_was_written_and_is_cleared_by_the_report() -> None:
    with migrated() as (client, _, device, raw):
        raw.map_ram(0, 64 * PAGE)
        raw.map_ram(64 * PAGE, PAGE, shared=False)
        assert client.start_log(65536) == PAGE
        device.memory.write(5 * PAGE, b"x")
        device.memory.write(63 * PAGE, b"x")
        writing = in_thread(lambda: device.memory.write(64 * PAGE, b"by message"))
        ended(writing)
        assert list(client.report(0, 64 * PAGE)) == [5 * PAGE, 63 * PAGE]
        assert list(client.report(0, 65 * PAGE)) == [64 * PAGE]
        client.stop_log()
        device.memory.write(0, b"x")
        with refused(errno.EINVAL):
            list(client.report(0, PAGE))
        client.start_log()
        with refused(errno.EINVAL):
            client.start_log()
        assert list(client.report(0, 64 * PAGE)) == []


def test_a_log_of_ranges_has_nothing_else() -> None:
    log = DirtyLog([range(PAGE, 2 * PAGE), range(8 * PAGE, 10 * PAGE)])
    log.add(0, 20 * PAGE)
    log.add(30 * PAGE, 1)
    assert int.from_bytes(log.report(0, 64 * PAGE, PAGE), "little") == 0b11_0000_0010


def test_a_report_may_have_larger_or_smaller_pages() -> None:
    log = DirtyLog()
    log.add(5 * PAGE, 1)
    assert int.from_bytes(log.report(0, 64 * PAGE, 4 * PAGE), "little") == 0b10
    log.add(PAGE, 1)
    assert int.from_bytes(log.report(0, 4 * PAGE, PAGE // 2), "little") == 0b1100


def test_a_page_reported_in_part_is_reported_again() -> None:
    log = DirtyLog()
    log.add(0, PAGE)
    assert int.from_bytes(log.report(0, 1024, 1024), "little") == 1
    assert int.from_bytes(log.report(0, PAGE, 1024), "little") == 0b1111
    assert int.from_bytes(log.report(0, PAGE, 1024), "little") == 0
    assert bitmap_size(65 * PAGE, PAGE) == 16


@pytest.mark.parametrize(
    ("start", "length", "page_size"),
    [(0, 0, PAGE), (0, PAGE, 3), (0, PAGE, 0), (1, PAGE, PAGE), (0, 1 << 60, PAGE), ((1 << 64) - PAGE, 2 * PAGE, PAGE)],
)
def test_a_report_that_makes_no_sense_is_refused(start: int, length: int, page_size: int) -> None:
    with migrated() as (client, _, _, raw):
        client.start_log()
        with refused(errno.EINVAL):
            payload = features.feature_payload(
                Feature.DMA_LOGGING_REPORT, GET, features.log_report_payload(start, length, page_size), 1 << 19
            )
            raw.call(Command.DEVICE_FEATURE, payload)
        with refused(errno.EINVAL):
            client.start_log(3)
