"""Log pages, and Get Log Page."""

from __future__ import annotations

import errno
import struct

import pytest

from nvmove.block.backend import Operation
from nvmove.nvme.commands import notices
from nvmove.nvme.commands.logs import PAGES
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.logs import Logs, Smart
from nvmove.nvme.spec import Feature, Log, Nvm, Status
from tests.nvme_commands import CommandHost, namespace


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host() -> CommandHost:
    return CommandHost()


def dword(data: bytes, index: int) -> int:
    return int(struct.unpack_from("<I", data, 4 * index)[0])


def test_the_supported_pages_are_those_that_answer(host: CommandHost) -> None:
    data = host.get_log(Log.SUPPORTED, 1024).data
    supported = {lid for lid in range(256) if dword(data, lid) & 1}
    assert supported == set(PAGES) == set(Log)
    for lid in range(256):
        status = host.get_log(lid, 4).status
        assert status == (Status.SUCCESS if lid in supported else Status.INVALID_LOG_PAGE), lid


def test_offset_and_length_cut_a_piece_out(host: CommandHost) -> None:
    whole = host.get_log(Log.COMMANDS_SUPPORTED, 4096).data
    pieces = [host.get_log(Log.COMMANDS_SUPPORTED, 12, offset=offset).data for offset in range(0, 1200, 12)]
    assert b"".join(pieces) == whole[:1200]


def test_nothing_is_written_beyond_the_end_of_a_page(host: CommandHost) -> None:
    data = host.get_log(Log.SMART, 1024, offset=256).data
    assert data[256:] == b"\xa5" * 768


@pytest.mark.parametrize("offset", [2, 512, 516, 1 << 40])
def test_an_offset_off_the_page_or_not_aligned_is_an_invalid_field(host: CommandHost, offset: int) -> None:
    assert host.get_log(Log.SMART, 4, offset=offset).status == Status.INVALID_FIELD


def test_an_index_offset_or_more_than_mdts_is_an_invalid_field() -> None:
    host = CommandHost(mdts=1)
    assert host.get_log(Log.SMART, 4, cdw14=1 << 23).status == Status.INVALID_FIELD
    assert host.get_log(Log.SMART, 8192).status == Status.SUCCESS
    assert host.get_log(Log.SMART, 8196).status == Status.INVALID_FIELD


def test_smart_of_a_fresh_device(host: CommandHost) -> None:
    data = host.get_log(Log.SMART, 512).data
    assert data[0] == 0
    assert int.from_bytes(data[1:3], "little") == 323
    assert any(data[32:96]) is False
    assert data[112] == 1  # power cycles


def test_smart_is_the_controllers_alone(host: CommandHost) -> None:
    for nsid, status in (
        (0, Status.SUCCESS),
        (1, Status.INVALID_FIELD),
        (5, Status.INVALID_FIELD),
        (400, Status.INVALID_NAMESPACE),
    ):
        assert host.get_log(Log.SMART, 512, nsid=nsid).status == status


def test_smart_counts_hours_and_power_cycles() -> None:
    clock = Clock()
    smart = Smart(clock)
    smart.power_on_before_ms = 3_000_000
    clock.now += 601
    smart.power_cycle(clean=True)
    smart.power_cycle(clean=False)
    logs = Logs(ControllerConfig(serial="x"), clock)
    page = smart.page(CommandHost().controller.features, 9)
    cycles, hours, unsafe, media, errors = (int.from_bytes(page[at : at + 16], "little") for at in range(112, 192, 16))
    assert (cycles, hours, unsafe, media, errors) == (3, 1, 1, 0, 9)
    assert logs.smart.power_on_ms == 0


def test_the_temperature_warning_follows_the_thresholds(host: CommandHost) -> None:
    def warning() -> int:
        return host.get_log(Log.SMART, 4).data[0]

    host.set_feature(Feature.TEMPERATURE_THRESHOLD, 323)
    assert warning() == 2
    host.set_feature(Feature.TEMPERATURE_THRESHOLD, 324)
    assert warning() == 0
    host.set_feature(Feature.TEMPERATURE_THRESHOLD, 1 << 20 | 323)
    assert warning() == 2


def test_configured_critical_warnings_are_shown() -> None:
    assert CommandHost(smart_critical_warning=0x14).get_log(Log.SMART, 4).data[0] == 0x14


def test_errors_are_kept_newest_first_up_to_64(host: CommandHost) -> None:
    host.disk.fail[Operation.READ] = errno.EIO
    for lba in range(70):
        host.read(lba, 1)
    data = host.get_log(Log.ERROR_INFORMATION, 4096).data
    counts = [struct.unpack_from("<Q", data, 64 * index)[0] for index in range(64)]
    assert counts == list(range(70, 6, -1))
    assert struct.unpack_from("<Q", data, 16)[0] == 69
    smart = host.get_log(Log.SMART, 512).data
    assert int.from_bytes(smart[160:176], "little") == int.from_bytes(smart[176:192], "little") == 70


def test_unused_error_entries_are_zero(host: CommandHost) -> None:
    assert host.get_log(Log.ERROR_INFORMATION, 4096).data == bytes(4096)


def test_the_firmware_slot_has_the_revision(host: CommandHost) -> None:
    data = host.get_log(Log.FIRMWARE_SLOT, 512).data
    assert (data[0], data[8:16], any(data[16:])) == (1, b"11.1.3  ", False)


def test_changed_namespaces_are_listed_until_they_are_read() -> None:
    host = CommandHost(namespace(), namespace(), namespace())
    for nsid in (3, 1, 3):
        notices.namespace_changed(host.controller, nsid)
    with_rae = host.get_log(Log.CHANGED_NAMESPACES, 4096, rae=True).data
    assert struct.unpack_from("<3I", with_rae) == (1, 3, 0)
    assert host.get_log(Log.CHANGED_NAMESPACES, 4096).data == with_rae
    assert host.get_log(Log.CHANGED_NAMESPACES, 4096).data == bytes(4096)


def test_a_list_that_did_not_reach_the_guest_is_kept(host: CommandHost) -> None:
    notices.namespace_changed(host.controller, 1)
    host.ram.fails_on_finish = True
    assert host.get_log(Log.CHANGED_NAMESPACES, 4096).status == Status.DATA_TRANSFER_ERROR
    assert host.get_log(Log.CHANGED_NAMESPACES, 4096, offset=8192).status == Status.INVALID_FIELD
    host.ram.fails_on_finish = False
    assert dword(host.get_log(Log.CHANGED_NAMESPACES, 4096).data, 0) == 1


def test_effects_are_qemus_for_the_commands_that_exist(host: CommandHost) -> None:
    data = host.get_log(Log.COMMANDS_SUPPORTED, 4096).data
    effects = {index: dword(data, index) for index in range(512) if dword(data, index)}
    writes = {256 + op: 3 for op in (Nvm.FLUSH, Nvm.WRITE, Nvm.WRITE_ZEROES, Nvm.DATASET_MANAGEMENT, Nvm.COPY)}
    reads = {256 + op: 1 for op in (Nvm.READ, Nvm.COMPARE, Nvm.VERIFY)}
    admin = dict.fromkeys((0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7C), 1)
    assert effects == {**admin, 0x15: 0x19, 0x80: 7, **writes, **reads}
    assert host.get_log(Log.COMMANDS_SUPPORTED, 4096, cdw14=2 << 24).status == Status.INVALID_FIELD


def test_feature_effects_name_every_feature_and_its_scope(host: CommandHost) -> None:
    data = host.get_log(Log.FEATURES_SUPPORTED, 1024).data
    found = {index: dword(data, index) for index in range(256) if dword(data, index)}
    assert set(found) == set(Feature)
    assert found[Feature.ERROR_RECOVERY] == 1 << 20 | 1
    assert found[Feature.ARBITRATION] == 1 << 21 | 1
    assert host.get_log(Log.MI_COMMANDS_SUPPORTED, 1024).data == bytes(1024)


def test_logs_travel(host: CommandHost) -> None:
    host.disk.fail[Operation.READ] = errno.EIO
    host.read(5, 1)
    host.write(0, bytes(512))
    logs = host.controller.logs
    logs.changed = {2, 9}
    logs.smart.unsafe_shutdowns = 4
    logs.smart.busy_ns = 5
    clock = Clock()
    logs.smart.clock = clock
    logs.smart._since = clock.now - 7
    after = Logs(ControllerConfig(serial="x", smart_critical_warning=1), clock)
    after.load(*logs.save())
    assert after.save() == logs.save()
    clock.now += 3
    assert after.smart.power_on_ms == 10_000
