"""A device that its vfio-user client moves: state, commands and dirty pages; as `nvmove serve` offers it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from nvmove.device import NvmeDevice
from nvmove.nvme.config import ControllerConfig
from nvmove.vfio.client import ClientError
from nvmove.vfio.device import BAR0_REGION, CONFIG_REGION
from nvmove.vfio.migration import State
from nvmove.vfio.migration_client import MigrationClient
from tests.unit.test_device import ACQ, connected, dword, enable, identify, signalled, vector0

PAGE = 4096
CQE = bytes.fromhex("07000100")
"""Command id, phase 1, status 0: the last dword of the completion of `identify`."""


def make(serial: str = "S1") -> NvmeDevice:
    return NvmeDevice(ControllerConfig(serial=serial, msix_qsize=4), {}, id="nvme0", client_migrates=True)


@pytest.fixture
def devices() -> Iterator[tuple[NvmeDevice, NvmeDevice]]:
    pair = make(), make()
    yield pair
    for device in pair:
        device.close()


@pytest.mark.parametrize(("size", "hops"), [(1, 1), (7, 2), (PAGE, 5), (1 << 20, 5)])
def test_a_controller_goes_back_and_forth_with_commands_in_between(
    devices: tuple[NvmeDevice, NvmeDevice], size: int, hops: int
) -> None:
    """The state in pieces of `size` bytes: each is a message, so there are fewer hops where that is small."""
    with connected(devices[0]) as client:
        memory = bytearray(enable(client))
        state = MigrationClient(client).save(size)
    for hop in range(1, hops + 1):
        with connected(devices[hop % 2]) as client:
            mover = MigrationClient(client)
            ram = client.map_ram(0, 1 << 20).view
            ram[:] = memory
            mover.load(state, size)
            assert dword(client, 0x1C) == 1
            fd = vector0(client)
            identify(client, ram, hop - 1)  # rung while the device is stopped: must not be lost
            mover.state = State.RUNNING
            at = ACQ + 16 * (hop - 1) + 12
            while bytes(ram[at : at + 4]) != CQE:  # the first interrupt may be for those the host has not consumed
                assert signalled(fd) >= 1
            state = mover.save(size)
            memory = bytearray(ram)
            os.close(fd)


def test_after_it_moved_away_the_source_takes_a_new_client(devices: tuple[NvmeDevice, NvmeDevice]) -> None:
    device = devices[0]
    for _ in range(3):
        with connected(device) as client:
            enable(client)
            assert MigrationClient(client).save()
        assert not device.controller.paused
    with connected(device) as client:
        assert MigrationClient(client).state is State.RUNNING
        ram = enable(client)
        fd = vector0(client)
        identify(client, ram)
        assert signalled(fd) == 1
        os.close(fd)


def test_a_refused_state_needs_a_reset_and_the_device_works_after_it(devices: tuple[NvmeDevice, NvmeDevice]) -> None:
    with connected(devices[0]) as client:
        good = MigrationClient(client).save()
    other = make(serial="S2")
    with connected(other) as client:
        foreign = MigrationClient(client).save()
    other.close()
    with connected(devices[1]) as client:
        mover = MigrationClient(client)
        for bad in (b"", good[:-1], good + b"\0", b"x" * 100, foreign):
            with pytest.raises(ClientError) as refusal:
                mover.load(bad)
            assert refusal.value.errno == errno.EINVAL
            assert mover.get_state() is State.ERROR
            client.reset()
            assert mover.get_state() is State.RUNNING
        ram = enable(client)
        fd = vector0(client)
        identify(client, ram)
        assert signalled(fd) == 1
        os.close(fd)


def test_the_log_names_the_pages_of_data_and_completions(devices: tuple[NvmeDevice, NvmeDevice]) -> None:
    with connected(devices[0]) as client:
        ram = enable(client)
        fd = vector0(client)
        mover = MigrationClient(client)
        mover.start_log()
        identify(client, ram)
        assert signalled(fd) == 1
        mover.state = State.STOP_COPY
        assert list(mover.report(0, 1 << 20)) == [ACQ, 0x3000]
        assert client.unanswered == []
        os.close(fd)
    with connected(devices[0]) as client:  # the log has ended with its client
        MigrationClient(client).start_log()


def test_a_guests_own_reset_leaves_the_migration_alone(devices: tuple[NvmeDevice, NvmeDevice]) -> None:
    with connected(devices[0]) as client:
        enable(client)
        mover = MigrationClient(client)
        mover.state = State.PRE_COPY
        client.write(CONFIG_REGION, 0x88, b"\0\x80")
        assert mover.state is State.PRE_COPY
        state = mover.save()
    with connected(devices[1]) as client:
        MigrationClient(client).load(state)
        assert client.read(BAR0_REGION, 0x14, 4) == bytes(4)
