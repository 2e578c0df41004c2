"""The assembled device, driven as QEMU drives it: over vfio-user, with guest memory and eventfds."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvmove.block.backend import BackendError
from nvmove.device import NvmeDevice
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.state import vmsd
from nvmove.vfio import message
from nvmove.vfio.client import VfioUserClient
from nvmove.vfio.device import BAR0_REGION, CONFIG_REGION, ERROR, MSIX
from nvmove.vfio.transport import Connection
from nvmove.vm.moves.snapshot import SavedDevice
from nvmove.vmstate.bus import Stateful
from nvmove.vmstate.schema import StateError
from tests.disk import Disk
from tests.vfio_peer import ask_until
from tests.waiting import ended, in_thread

ASQ, ACQ = 0x1000, 0x2000
IDENTIFY = struct.pack("<BBH I 16x QQ I 20x", 0x06, 0, 7, 0, 0x3000, 0, 1)
ENABLED = 0x00460001


def make(serial: str = "S1", disk: Disk | None = None, vectors: int = 4, mapped: bool = False) -> NvmeDevice:
    namespace = NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1))
    config = ControllerConfig(
        serial=serial, msix_qsize=vectors, namespaces=(namespace,), mapped_doorbells=mapped, dbcs=not mapped
    )
    return NvmeDevice(config, {"d0": disk or Disk(hold=True)}, id="nvme0")


@contextmanager
def connected(device: NvmeDevice) -> Iterator[VfioUserClient]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(ours, device, device.receiver)
    thread = in_thread(connection.serve)
    with VfioUserClient(theirs, timeout=5) as client:
        yield client
    ended(thread)


def dword(client: VfioUserClient, offset: int) -> int:
    return int.from_bytes(client.read(BAR0_REGION, offset, 4), "little")


def write(client: VfioUserClient, offset: int, value: int, size: int = 4) -> None:
    client.write(BAR0_REGION, offset, value.to_bytes(size, "little"))


def enable(client: VfioUserClient) -> memoryview:
    """Give the device memory and admin queues of 8 entries, and MSI-X in configuration space."""
    ram = client.map_ram(0, 1 << 20).view
    client.write(CONFIG_REGION, 0x42, b"\x00\x80")
    write(client, 0x24, 0x00070007)
    write(client, 0x28, ASQ, 8)
    write(client, 0x30, ACQ, 8)
    write(client, 0x14, ENABLED)
    assert dword(client, 0x1C) == 1
    return ram


def vector0(client: VfioUserClient) -> int:
    fd = os.eventfd(0)
    client.set_irqs(MSIX, 0, 1, message.SET_DATA_EVENTFD | message.SET_TRIGGER, [fd])
    return fd


def signalled(fd: int) -> int:
    """Wait for an eventfd, which the device has made non-blocking."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(5000), "no interrupt"
    return os.eventfd_read(fd)


def timeless(data: bytes) -> vmsd.DeviceState:
    """A saved state without its clocks."""
    state = vmsd.load(data)
    state.controller.smart.power_on_ms = state.controller.features.timestamp_age = 0
    return state


def identify(client: VfioUserClient, ram: memoryview, index: int = 0) -> None:
    ram[ASQ + 64 * index : ASQ + 64 * index + 64] = IDENTIFY
    write(client, 0x1000, index + 1)


@pytest.fixture
def device() -> Iterator[NvmeDevice]:
    device = make()
    yield device
    device.close()


def test_a_command_is_fetched_executed_completed_and_signalled(device: NvmeDevice) -> None:
    with connected(device) as client:
        ram = enable(client)
        fd = vector0(client)
        identify(client, ram)
        assert signalled(fd) == 1
        assert ram[ACQ + 12 : ACQ + 16] == bytes.fromhex("07000100")
        assert bytes(ram[0x3004:0x3006]) == b"S1"
        os.close(fd)


def test_bar0_beyond_the_registers(device: NvmeDevice) -> None:
    with connected(device) as client:
        client.write(BAR0_REGION, 0x2000, b"\xff" * 16)  # the MSI-X table is QEMU's
        assert client.read(BAR0_REGION, 0x2000, 16) == bytes(16)
        assert client.read(BAR0_REGION, 0x3000, 16) == bytes(16)
        assert client.read(BAR0_REGION, 0x3FF0, 16) == bytes(16)
        ram = enable(client)
        identify(client, ram)
        ask_until(client, lambda: device.inspect()["pci"]["pending"])
        assert client.read(BAR0_REGION, 0x3000, 2) == b"\1\0"
        client.write(CONFIG_REGION, 0x42, b"\0\0")
        assert client.read(BAR0_REGION, 0x3000, 2) == b"\0\0"


def test_the_error_interrupt_is_taken_and_never_used(device: NvmeDevice) -> None:
    with connected(device) as client:
        fd = os.eventfd(0)
        client.set_irqs(ERROR, 0, 1, message.SET_DATA_EVENTFD | message.SET_TRIGGER, [fd])
        client.set_irqs(ERROR, 0, 0, message.SET_DATA_NONE | message.SET_TRIGGER)
        os.close(fd)


@pytest.mark.parametrize("by_config", [True, False])
def test_a_reset_forgets_the_guest(device: NvmeDevice, by_config: bool) -> None:
    with connected(device) as client:
        enable(client)
        if by_config:
            client.write(CONFIG_REGION, 0x88, b"\0\x80")
        else:
            client.reset()
        assert (dword(client, 0x14), dword(client, 0x1C)) == (0, 0)
        assert client.config(0x42, 2) == b"\3\0"
        assert device.resets == 1


def test_a_client_that_goes_leaves_a_fresh_device(device: NvmeDevice) -> None:
    for _ in range(2):
        with connected(device) as client:
            assert dword(client, 0x14) == 0
            enable(client)
    assert device.inspect()["memory"] == []
    assert not device.inspect()["connected"]


def test_state_travels_to_another_device_which_goes_on() -> None:
    source, target = make(), make()
    table = bytes(range(64))
    with connected(source) as client:
        ram = enable(client)
        client.write(CONFIG_REGION, 0x10, bytes.fromhex("0480bffe"))
        identify(client, ram)
        ask_until(client, lambda: source.inspect()["pci"]["pending"])
        source.pause(5)
        identify(client, ram, 1)  # rung while paused: must not be lost
        source.keep_msix_table(table)
        saved = source.save()
        content = bytes(ram)
    with connected(target) as client:
        client.map_ram(0, 1 << 20).view[:] = content
        target.pause(5)
        client.reset()
        target.load(saved)
        client.write(CONFIG_REGION, 0x42, b"\0\0")  # QEMU's own idea, until replay
        assert (target.msix_table, target.loads, target.resets) == (table, 1, 1)
        assert target.pci_config[0x10:0x14] == bytes.fromhex("0480bffe")
        assert target.pci_config[0x42:0x44] == b"\3\x80"
        assert timeless(saved) == timeless(target.save())
        client.write(CONFIG_REGION, 0x42, b"\0\x80")
        client.write(CONFIG_REGION, 0x10, bytes.fromhex("0480bffe"))
        fd = vector0(client)
        assert signalled(fd) == 1  # the message that was pending at the source
        target.resume()
        assert signalled(fd) >= 1
        while client._ram[0].view[ACQ + 16 + 12 : ACQ + 32] != bytes.fromhex("07000100"):
            client.config(0, 4)
        assert target.pci_config[0x42:0x44] == b"\3\x80"
        os.close(fd)
    for device in (source, target):
        device.close()


@pytest.mark.parametrize("other", [make(serial="S2"), make(vectors=5)], ids=["serial", "vectors"])
def test_another_devices_state_is_refused_untouched(device: NvmeDevice, other: NvmeDevice) -> None:
    other.pause()
    device.pause()
    with connected(device) as client:
        client.write(CONFIG_REGION, 0x10, bytes.fromhex("0480bffe"))
        before = device.save()
        with pytest.raises(StateError):
            device.load(other.save())
        with pytest.raises(StateError):
            device.load(before[:-1])
        assert timeless(before) == timeless(device.save())
        assert device.loads == 0


def test_a_reset_after_a_load_forgets_what_was_loaded(device: NvmeDevice) -> None:
    device.pause()
    with connected(device) as client:
        device.keep_msix_table(bytes(64))
        client.write(CONFIG_REGION, 0x10, bytes.fromhex("0480bffe"))
        device.load(device.save())
        client.reset()
        assert device.pci_config[0x10:0x14] == bytes.fromhex("04000000")
        assert device.msix_table == (bytes(12) + b"\1\0\0\0") * 4


def test_a_table_of_another_size_is_refused(device: NvmeDevice) -> None:
    with pytest.raises(ValueError, match="expected 64"):
        device.keep_msix_table(bytes(80))


@pytest.mark.parametrize("by_config", [True, False])
def test_pause_gives_up_after_its_timeout_and_reset_waits_for_the_disk(by_config: bool) -> None:
    """A function-level reset too: QEMU lets the guest wait for the answer to its write."""

    def reset() -> None:
        if by_config:
            client.write(CONFIG_REGION, 0x88, b"\0\x80")
        else:
            client.reset()

    disk = Disk(hold=True)
    device = make(disk=disk)
    with connected(device) as client:
        ram = enable(client)
        ram[ASQ : ASQ + 64] = struct.pack("<BBH I 56x", 0x80, 0, 1, 1)  # Format NVM: the disk is asked, and holds
        write(client, 0x1000, 1)
        ask_until(client, lambda: disk.held)
        with pytest.raises(TimeoutError, match="nvme0: I/O is still in flight"):
            device.pause(0.01)
        resetting = in_thread(reset)
        ask_until(client, lambda: device.resets)
        assert resetting.is_alive()
        disk.finish()
        ended(resetting)
    device.close()


def test_refresh_tells_the_namespaces_new_size() -> None:
    disk = Disk(hold=True)
    device = make(disk=disk)
    disk.actual_size = 2 << 20
    device.refresh()
    assert [namespace.blocks for namespace in device.controller.namespaces] == [4096]
    device.close()


def test_it_listens_and_cleans_up(tmp_path: Path) -> None:
    device = make()
    device.start(tmp_path / "s")
    with VfioUserClient.connect(tmp_path / "s") as client:
        assert client.config(0, 4) == bytes.fromhex("361b1000")
        device.close()
        assert client.closed.wait(5)
    assert not (tmp_path / "s").exists()


def test_it_is_what_the_other_parts_ask_for(device: NvmeDevice) -> None:
    saved: SavedDevice = device
    stateful: Stateful = device
    saved.pause()
    assert vmsd.load(stateful.save()).pci.config[:256] == saved.pci_config


def test_resume_recovers_each_disk_once_before_anything_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    class LostDisk(Disk):
        recovered = 0

        def recover(self) -> None:
            self.recovered += 1
            assert made.controller.paused
            raise BackendError("Could not connect to 'nbd://h/e': Connection refused")

    disk = LostDisk()
    made = make(disk=disk)
    made.pause(5)
    made.resume()
    assert (disk.recovered, made.controller.paused, made.held) == (1, False, 0)
    assert caplog.messages == ["nvme0: Could not connect to 'nbd://h/e': Connection refused"]
    made.close()


def begin_to_mark(device: NvmeDevice, client: VfioUserClient) -> memoryview:
    """Enable the controller and run a command whose data is to be marked; the client does not answer that.

    Returns the guest's memory.
    """
    ram = enable(client)
    device.track_dirty(True)
    client.answers_dma = False
    identify(client, ram)
    ask_until(client, lambda: client.unanswered)
    return ram


def test_data_is_marked_before_its_completion_and_the_completion_at_the_switch_over(device: NvmeDevice) -> None:
    with connected(device) as client:
        fd = vector0(client)
        ram = begin_to_mark(device, client)
        assert ram[ACQ + 12 : ACQ + 16] == bytes(4), "completed before its page was marked"
        assert [message.parse_dma_access(memoryview(data))[0] for _, data in client.unanswered] == [0x3000]
        client.answer_dma()
        assert signalled(fd) == 1
        with pytest.raises(RuntimeError, match="not paused"):
            device.mark_dirty()
        device.pause(5)
        assert device.mark_dirty().pages == 1
        assert device.mark_dirty().pages == 0
        device.track_dirty(False)
        os.close(fd)


def test_a_client_lost_while_marking_leaves_the_device_usable(device: NvmeDevice) -> None:
    for _ in range(2):
        with connected(device) as client:
            begin_to_mark(device, client)
            client.close()
        assert device.inspect()["memory"] == []


def test_a_reset_while_marking_does_not_wait_for_the_client(device: NvmeDevice) -> None:
    with connected(device) as client:
        begin_to_mark(device, client)
        client.reset()
        client.answer_dma()
        device.pause(5)
        assert device.mark_dirty().pages == 1  # the command's data, which was not marked in time


def test_a_client_that_maps_the_doorbells_never_sends_one(tmp_path: Path) -> None:
    """And the next client gets other memory."""
    device = make(mapped=True)
    device.start(tmp_path / "socket")
    views = []
    for _ in range(2):
        with VfioUserClient.connect(tmp_path / "socket") as client:
            mapped = client.map_region(BAR0_REGION)
            assert mapped is not None
            offset, view = mapped
            assert (offset, len(view)) == (0x1000, 0x1000)
            assert bytes(view[:8]) == bytes(8)
            ram = enable(client)
            ram[ASQ : ASQ + 64] = IDENTIFY
            view[0:4] = (1).to_bytes(4, "little")
            deadline = time.monotonic() + 20
            while not ram[ACQ + 14] & 1:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            views.append(view)
        assert device.controller.doorbells.writes == 0
    views[0][0:4] = b"late"
    assert bytes(views[1][0:4]) != b"late"
    device.close()


def test_doorbells_by_message_cannot_be_mapped() -> None:
    device = make()
    with connected(device) as client:
        assert client.map_region(BAR0_REGION) is None
    device.close()
