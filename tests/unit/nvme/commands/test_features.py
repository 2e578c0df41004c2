"""Get and Set Features."""

from __future__ import annotations

import errno

import pytest

from nvmove.block.backend import Operation
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.features import Features
from nvmove.nvme.spec import Feature, Register, Status
from tests.disk import Disk
from tests.nvme_commands import CommandHost, namespace

CURRENT, DEFAULT, SAVED, SUPPORTED = range(4)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host() -> CommandHost:
    return CommandHost(io_queue=False)


@pytest.mark.parametrize(
    ("feature", "value", "supported"),
    [
        (Feature.ARBITRATION, 7, 0),
        (Feature.POWER_MANAGEMENT, 0, 0),
        (Feature.TEMPERATURE_THRESHOLD, 343, 4),
        (Feature.VOLATILE_WRITE_CACHE, 1, 4),
        (Feature.NUMBER_OF_QUEUES, 0x3F_003F, 4),
        (Feature.INTERRUPT_COALESCING, 0, 4),
        (Feature.INTERRUPT_VECTOR_CONFIGURATION, 0x10000, 4),
        (Feature.WRITE_ATOMICITY, 0, 4),
        (Feature.ASYNC_EVENT_CONFIGURATION, 0, 4),
        (Feature.COMMAND_SET_PROFILE, 0, 4),
    ],
)
def test_initial_values_are_the_defaults(host: CommandHost, feature: Feature, value: int, supported: int) -> None:
    for select in (CURRENT, DEFAULT, SAVED):
        assert host.must(host.get_feature(feature, select=select)).result == value
    assert host.get_feature(feature, select=SUPPORTED).result == supported


@pytest.mark.parametrize("feature", [0x00, 0x03, 0x0C, 0x0D, 0x0F, 0x10, 0x80, 0x81, 0xFF])
def test_an_unknown_feature_is_an_invalid_field(host: CommandHost, feature: int) -> None:
    assert host.get_feature(feature).status == Status.INVALID_FIELD
    assert host.set_feature(feature).status == Status.INVALID_FIELD


@pytest.mark.parametrize("feature", sorted(Feature))
def test_no_feature_can_be_saved(host: CommandHost, feature: Feature) -> None:
    assert host.set_feature(feature, nsid=1, save=1).status == Status.FEATURE_NOT_SAVEABLE
    assert host.get_feature(feature, nsid=1, select=4).status == Status.INVALID_FIELD


@pytest.mark.parametrize(
    ("nsid", "status"),
    [
        (0, Status.SUCCESS),
        (0xFFFF_FFFF, Status.SUCCESS),
        (1, Status.FEATURE_NOT_NAMESPACE_SPECIFIC),
        (2, Status.FEATURE_NOT_NAMESPACE_SPECIFIC),
        (300, Status.INVALID_NAMESPACE),
    ],
)
def test_a_feature_of_the_controller_is_not_set_for_a_namespace(host: CommandHost, nsid: int, status: Status) -> None:
    assert host.set_feature(Feature.WRITE_ATOMICITY, 1, nsid=nsid).status == status
    assert host.get_feature(Feature.WRITE_ATOMICITY, nsid=nsid).status == Status.SUCCESS


@pytest.mark.parametrize("feature", [Feature.ARBITRATION, Feature.POWER_MANAGEMENT])
def test_fixed_features(host: CommandHost, feature: Feature) -> None:
    assert host.set_feature(feature, 0).status == Status.FEATURE_NOT_CHANGEABLE


@pytest.mark.parametrize(
    ("feature", "value", "stored"),
    [
        (Feature.INTERRUPT_COALESCING, 0xF_1234, 0x1234),
        (Feature.WRITE_ATOMICITY, 3, 1),
        (Feature.ASYNC_EVENT_CONFIGURATION, 0x1FF, 0x1FF),
        (Feature.VOLATILE_WRITE_CACHE, 0, 0),
        (Feature.TEMPERATURE_THRESHOLD, 400, 400),
    ],
)
def test_a_value_stays_until_the_controller_is_reset(
    host: CommandHost, feature: Feature, value: int, stored: int
) -> None:
    default = host.get_feature(feature, select=DEFAULT).result
    host.must(host.set_feature(feature, value))
    assert host.get_feature(feature).result == stored
    host.disable()
    host.enable()
    assert host.get_feature(feature).result == default


def test_number_of_queues_is_always_all_of_them(host: CommandHost) -> None:
    assert host.must(host.set_feature(Feature.NUMBER_OF_QUEUES, 0x3_0003)).result == 0x3F_003F
    for value in (0xFFFF, 0xFFFF_0000):
        assert host.set_feature(Feature.NUMBER_OF_QUEUES, value).status == Status.INVALID_FIELD
    host.must(host.create_cq(1, 4))
    assert host.set_feature(Feature.NUMBER_OF_QUEUES, 0).status == Status.COMMAND_SEQUENCE_ERROR


def test_temperature_thresholds(host: CommandHost) -> None:
    under = 1 << 20
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, under | 300))
    assert host.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=under).result == 300
    assert host.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=under, select=DEFAULT).result == 0
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, 0xF << 16 | 500))
    assert host.get_feature(Feature.TEMPERATURE_THRESHOLD).result == 500
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, 1 << 16 | 77))
    assert host.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=1 << 16).result == 0
    assert host.set_feature(Feature.TEMPERATURE_THRESHOLD, 2 << 20).status == Status.INVALID_FIELD
    assert host.get_feature(Feature.TEMPERATURE_THRESHOLD, cdw11=2 << 20).status == Status.INVALID_FIELD


def test_vectors_have_their_own_coalescing(host: CommandHost) -> None:
    vector = Feature.INTERRUPT_VECTOR_CONFIGURATION
    host.must(host.set_feature(vector, 0x1_0005))
    assert host.get_feature(vector, cdw11=5).result == 0x1_0005
    assert host.get_feature(vector, cdw11=5, select=DEFAULT).result == 5
    host.must(host.set_feature(vector, 5))
    assert host.get_feature(vector, cdw11=5).result == 5
    host.must(host.set_feature(vector, 0))
    assert host.get_feature(vector).result == 0x1_0000
    assert host.get_feature(vector, cdw11=65).status == Status.INVALID_FIELD
    assert host.set_feature(vector, 65).status == Status.INVALID_FIELD


def test_error_recovery_belongs_to_a_namespace() -> None:
    host = CommandHost(namespace(), namespace())
    recovery = Feature.ERROR_RECOVERY
    host.must(host.set_feature(recovery, 5, nsid=1))
    assert [host.get_feature(recovery, nsid=nsid).result for nsid in (1, 2)] == [5, 0]
    assert host.get_feature(recovery, nsid=1, select=DEFAULT).result == 0
    host.must(host.set_feature(recovery, 6, nsid=0xFFFF_FFFF))
    assert [host.get_feature(recovery, nsid=nsid).result for nsid in (1, 2)] == [6, 6]
    assert host.get_feature(recovery, nsid=1, select=SUPPORTED).result == 6
    host.disable()
    host.enable()
    assert [host.get_feature(recovery, nsid=nsid).result for nsid in (1, 2)] == [0, 0]


def test_error_recovery_of_a_wrong_namespace_or_with_dulbe(host: CommandHost) -> None:
    recovery = Feature.ERROR_RECOVERY
    assert host.set_feature(recovery, 1 << 16, nsid=1).status == Status.INVALID_FIELD
    for nsid, status in ((0, Status.INVALID_NAMESPACE), (3, Status.INVALID_FIELD)):
        assert host.set_feature(recovery, nsid=nsid).status == status
        assert host.get_feature(recovery, nsid=nsid).status == status
    assert host.get_feature(recovery, nsid=0xFFFF_FFFF).status == Status.INVALID_NAMESPACE


def test_switching_the_write_cache_off_flushes_what_is_in_it() -> None:
    disks = {"a": Disk(), "b": Disk(read_only=True)}
    host = CommandHost(namespace("a"), namespace("b"), disks=disks)
    cache = Feature.VOLATILE_WRITE_CACHE
    host.must(host.set_feature(cache, 0))
    assert [disk.operations for disk in disks.values()] == [[Operation.FLUSH], []]
    host.must(host.set_feature(cache, 0))
    host.must(host.set_feature(cache, 1))
    assert len(disks["a"].requests) == 1
    disks["a"].fail[Operation.FLUSH] = errno.EIO
    assert host.set_feature(cache, 0).status == Status.WRITE_FAULT


def test_a_disk_without_a_write_cache_starts_with_it_off() -> None:
    host = CommandHost(namespace(write_cache=False))
    for select in (CURRENT, DEFAULT):
        assert host.get_feature(Feature.VOLATILE_WRITE_CACHE, select=select).result == 0


def test_only_the_first_command_set_profile_exists(host: CommandHost) -> None:
    profile = Feature.COMMAND_SET_PROFILE
    host.must(host.set_feature(profile, 0))
    assert host.set_feature(profile, 1).status == Status.IO_COMMAND_SET_COMBINATION_REJECTED


def test_host_behavior_is_stored_as_given(host: CommandHost) -> None:
    behavior = Feature.HOST_BEHAVIOR_SUPPORT
    wanted = b"\x01\x00\x01".ljust(512, b"\0")
    host.must(host.set_feature(behavior, data=wanted))
    assert host.get_feature(behavior, length=512).data == wanted
    assert host.get_feature(behavior, length=512, select=DEFAULT).data == bytes(512)
    for bad in (b"\x02".ljust(512, b"\0"), bytes(511) + b"\x01"):
        assert host.set_feature(behavior, data=bad).status == Status.INVALID_FIELD
    assert host.get_feature(behavior, length=512).data == wanted


def test_the_timestamp_goes_on_from_what_the_host_set(host: CommandHost) -> None:
    clock = Clock()
    host.controller.features.clock = clock
    host.must(host.set_feature(Feature.TIMESTAMP, data=(1_700_000_000_000).to_bytes(8, "little")))
    clock.now += 1.5
    value = int.from_bytes(host.get_feature(Feature.TIMESTAMP, length=8).data, "little")
    assert value & (1 << 48) - 1 == 1_700_000_001_500
    assert value >> 48 == 1 << 1
    assert host.get_feature(Feature.TIMESTAMP, length=8, select=DEFAULT).data == bytes(8)


def test_features_travel() -> None:
    clock = Clock()
    before = Features(ControllerConfig(serial="a"), clock)
    before.temperature_over, before.temperature_under = 1, 2
    before.volatile_write_cache = 0
    before.interrupt_coalescing = 3
    before.coalescing_disabled = {4, 2}
    before.write_atomicity = 1
    before.async_event_configuration = 0x102
    before.host_behavior = b"\x01".ljust(512, b"\0")
    before.host_timestamp(5000)
    clock.now += 2
    after = Features(ControllerConfig(serial="a"), Clock())
    after.load(before.save())
    assert after.save() == before.save()
    assert after.timestamp == 7000
    assert after.clock_stood_still


def test_reset_by_cc_leaves_no_value(host: CommandHost) -> None:
    fresh = CommandHost(io_queue=False).controller.features.save()
    host.must(host.set_feature(Feature.INTERRUPT_VECTOR_CONFIGURATION, 0x1_0002))
    host.must(host.set_feature(Feature.TIMESTAMP, data=bytes((1,) * 8)))
    host.controller.write(Register.CC, 4, 0)
    saved = host.controller.features.save()
    saved.timestamp_age = fresh.timestamp_age = 0
    assert saved == fresh


CHANGEABLE, PER_NAMESPACE = 4, 2
GET_FEATURES = {
    # feature: current, default (and saved, of which there is none: Base 5.15), supported capabilities
    Feature.ARBITRATION: (7, 7, 0),
    Feature.POWER_MANAGEMENT: (0, 0, 0),
    Feature.TEMPERATURE_THRESHOLD: (343, 343, CHANGEABLE),
    Feature.ERROR_RECOVERY: (0, 0, CHANGEABLE | PER_NAMESPACE),
    Feature.VOLATILE_WRITE_CACHE: (1, 1, CHANGEABLE),
    Feature.NUMBER_OF_QUEUES: (0x3F_003F, 0x3F_003F, CHANGEABLE),
    Feature.INTERRUPT_COALESCING: (0, 0, CHANGEABLE),
    Feature.INTERRUPT_VECTOR_CONFIGURATION: (0x10000, 0x10000, CHANGEABLE),
    Feature.WRITE_ATOMICITY: (0, 0, CHANGEABLE),
    Feature.ASYNC_EVENT_CONFIGURATION: (0, 0, CHANGEABLE),
    Feature.TIMESTAMP: (0, 0, CHANGEABLE),
    Feature.HOST_BEHAVIOR_SUPPORT: (0, 0, CHANGEABLE),
    Feature.COMMAND_SET_PROFILE: (0, 0, CHANGEABLE),
}
NSIDS = {0: Status.INVALID_NAMESPACE, 1: Status.SUCCESS, 0xFFFF_FFFF: Status.INVALID_NAMESPACE}
"""What a namespace's own feature answers: Base 3.2.1.2 lets a command name one namespace, or all where it says so, and
Get Features does not. QEMU refuses the same. A controller's feature does not look at NSID."""


@pytest.mark.parametrize("nsid", NSIDS)
@pytest.mark.parametrize("select", [CURRENT, DEFAULT, SAVED, SUPPORTED])
@pytest.mark.parametrize("feature", sorted(Feature))
def test_get_features_is_this_table(host: CommandHost, feature: Feature, select: int, nsid: int) -> None:
    current, default, supported = GET_FEATURES[feature]
    answer = host.get_feature(feature, select=select, nsid=nsid)
    wanted = NSIDS[nsid] if feature == Feature.ERROR_RECOVERY else Status.SUCCESS
    assert answer.status == wanted
    if wanted == Status.SUCCESS:
        assert answer.result == (current, default, default, supported)[select]
