"""Identify: what is answered, and that it is what QEMU's nvme answers, byte for byte, but for the known differences."""

from __future__ import annotations

import struct
import uuid

import pytest

from nvmove.nvme.commands import effects, identify
from nvmove.nvme.commands.admin import HANDLERS as ADMIN_HANDLERS
from nvmove.nvme.commands.io import COMMAND_SETS
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.namespace import Namespace
from nvmove.nvme.spec import Cns, Feature, Status
from tests.disk import Disk
from tests.nvme_commands import CommandHost, namespace

# Read in a guest of QEMU 11.1.3 with `-device nvme,serial=S1,drive=d0`, a raw disk of 64 MiB (`nvme id-ctrl -b`, …).
QEMU_CONTROLLER = """
000: 36 1b f4 1a 53 31 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 51 45 4d 55 20 4e 56 4d
020: 65 20 43 74 72 6c 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20 20
040: 31 31 2e 31 2e 33 20 20 06 00 54 52 00 07 00 00 00 04 01 00 00 00 00 00 00 00 00 00 00 01 00 00
060: 00 80 00 00 00 00 00 00 00 00 00 00 00 00 00 01
100: 2b 01 03 03 03 07 00 00 00 00 57 01 75 01 00 00
200: 66 44 00 00 00 01 00 00 5d 07 00 00 00 07 00 00 00 00 00 00 00 00 0f 00 01 00 08 00
300: 6e 71 6e 2e 32 30 31 39 2d 30 38 2e 6f 72 67 2e 71 65 6d 75 3a 53 31
800: c4 09 00 00 10 00 00 00 04
"""
QEMU_NAMESPACE = """
000: 00 00 02 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00 02 00 00 00 00 00 34 07 00 03 1f 00 00 00 00 09
040: 00 00 00 00 07 00 07 00
080: 00 00 09 00 08 00 09 00 10 00 09 00 40 00 09 00 00 00 0c 00 08 00 0c 00 10 00 0c 00 40 00 0c 00
"""
QEMU_NVM_CONTROLLER = "000: 07 00 00 ff ff ff 3f 00 01 ff bf 3f"
QEMU_NVM_NAMESPACE = """
10c: 08 00 00 00
11c: 08 00 00 00
"""


def image(dump: str) -> bytes:
    data = bytearray(4096)
    for line in dump.strip().splitlines():
        offset, content = line.split(":")
        values = bytes.fromhex(content)
        data[int(offset, 16) : int(offset, 16) + len(values)] = values
    return bytes(data)


def differences(ours: bytes, theirs: bytes) -> dict[int, tuple[int, int]]:
    """Offset → (ours, QEMU's)."""
    return {offset: pair for offset, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]}


def qemu_like() -> Namespace:
    return Namespace(1, namespace(shared=False), Disk(64 << 20))


def test_the_controller_is_qemus_but_for_the_known_differences() -> None:
    ours = CommandHost().identify(Cns.CONTROLLER).data
    assert differences(ours, image(QEMU_CONTROLLER)) == {
        81: (0x00, 0x04),  # VER 2.0.0,
        82: (0x02, 0x01),  # not 1.4.0
        256: (0x0A, 0x2B),  # OACS: no Security Send, Directives,
        261: (0x26, 0x07),  # LPA: supported pages; no SMART log for each namespace
        262: (63, 0),  # ELPE: 64 entries
        520: (0xDD, 0x5D),  # ONCS: Verify
        521: (0x01, 0x07),  # no atomic, no fast copy
        534: (0x01, 0x0F),  # OCFS: copy format 0
    }


def test_the_namespace_is_qemus_but_for_the_known_differences() -> None:
    ours = identify.namespace_data(qemu_like())
    found = differences(ours, image(QEMU_NAMESPACE))
    formats = {offset for offset in found if 128 <= offset < 160}
    assert all(ours[offset] == 0 for offset in formats)  # formats with metadata are not available
    assert {offset: pair for offset, pair in found.items() if offset not in formats} == {
        24: (0x30, 0x34),  # NSFEAT: no DULBE
        27: (0x00, 0x03),  # MC
        28: (0x00, 0x1F),  # DPC
        74: (128, 0),  # MSSRL
        76: (128, 0),  # MCL
        80: (127, 0),  # MSRC
    }


def test_the_nvm_command_sets_own_structures_are_qemus() -> None:
    ours = identify.nvm_controller_data(ControllerConfig(serial="S1"), 512)
    assert differences(ours, image(QEMU_NVM_CONTROLLER)) == {}
    assert differences(identify.nvm_namespace_data(qemu_like()), image(QEMU_NVM_NAMESPACE)) == {}


@pytest.mark.parametrize(("block_size", "blocks"), [(512, 4194303), (4096, 524287)])
def test_the_largest_range_of_a_deallocation_is_qemus_in_blocks(block_size: int, blocks: int) -> None:
    data = identify.nvm_controller_data(ControllerConfig(serial="S1"), block_size)
    assert struct.unpack_from("<IQ", data, 4) == (blocks, 255 * blocks)


def test_what_is_deallocated_together_is_at_least_a_cluster_of_the_image() -> None:
    namespace = qemu_like()
    namespace.cluster_size = 65536
    granularity = 65536 >> namespace.block_shift
    assert struct.unpack_from("<HH", identify.namespace_data(namespace), 68) == (granularity - 1, granularity - 1)
    assert struct.unpack_from("<I", identify.nvm_namespace_data(namespace), 268) == (granularity,)


def test_intel_ids() -> None:
    data = identify.controller_data(ControllerConfig(serial="S1", use_intel_id=True), 0x20000, dbcs=True)
    assert (data[:2], data[73:76]) == (b"\x86\x80", b"\xb3\x02\x00")


def test_strings_are_cut_to_their_fields() -> None:
    config = ControllerConfig(serial="s" * 30, model="m" * 50, firmware_version="1" * 10)
    data = identify.controller_data(config, 0, dbcs=True)
    assert data[4:24] == b"s" * 20
    assert data[24:64] == b"m" * 40
    assert data[64:73] == b"1" * 8 + b"\x06"


def test_namespace_geometry_and_identity() -> None:
    config = namespace(
        logical_block_size=4096,
        physical_block_size=8192,
        opt_io_size=65536,
        discard_granularity=65536,
        nguid=bytes(range(16)),
        eui64=0x0123456789ABCDEF,
    )
    data = identify.namespace_data(Namespace(1, config, Disk(1 << 20)))
    assert struct.unpack_from("<QQQ", data) == (256, 256, 256)
    assert data[26] == 4
    assert data[30] == 1
    assert struct.unpack_from("<HHHHH", data, 64) == (1, 1, 15, 15, 15)
    assert data[104:120] == bytes(range(16))
    assert data[120:128] == bytes.fromhex("0123456789abcdef")


def test_an_uncommon_block_size_is_a_format_after_qemus() -> None:
    data = identify.namespace_data(Namespace(1, namespace(logical_block_size=2048), Disk()))
    assert (data[25], data[26], data[128 + 4 * 8 + 2]) == (8, 8, 11)


def test_a_read_only_disk_says_so_and_every_namespace_is_ready() -> None:
    disk = Namespace(1, namespace(), Disk(read_only=True))
    assert identify.namespace_data(disk)[99] == 1
    independent = identify.independent_data(disk)
    assert (independent[1], independent[8], independent[14]) == (1, 1, 1)


def test_descriptors_name_what_is_set_and_the_command_set() -> None:
    plain = identify.descriptors(qemu_like())
    assert plain[:8] == bytes((4, 1, 0, 0, 0, 0, 0, 0))
    uid = uuid.UUID("11112222-3333-4444-5555-666677778888")
    config = namespace(uuid=uid, nguid=b"n" * 16, eui64=5)
    full = identify.descriptors(Namespace(1, config, Disk()))
    expected = b"\x03\x10\0\0" + uid.bytes + b"\x02\x10\0\0" + b"n" * 16 + b"\x01\x08\0\0" + bytes(7) + b"\x05"
    assert full[: len(expected) + 5] == expected + b"\x04\x01\0\0\0"


ZEROES = bytes(4096)


@pytest.fixture
def host() -> CommandHost:
    """Namespaces 1, 3 (detached) and 7."""
    return CommandHost(namespace(), namespace(nsid=3, detached=True), namespace(nsid=7))


def words(data: bytes, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}I", data)


@pytest.mark.parametrize("cns", [Cns.ACTIVE_NAMESPACES, Cns.CSI_ACTIVE_NAMESPACES])
def test_active_lists_have_the_attached_namespaces_above_the_nsid(host: CommandHost, cns: Cns) -> None:
    assert words(host.identify(cns).data, 3) == (1, 7, 0)
    assert words(host.identify(cns, 1).data, 2) == (7, 0)
    assert host.identify(cns, 300).data == ZEROES
    assert host.identify(cns, 0xFFFF_FFFE).status == Status.INVALID_NAMESPACE


@pytest.mark.parametrize("cns", [Cns.ALLOCATED_NAMESPACES, Cns.CSI_ALLOCATED_NAMESPACES])
def test_allocated_lists_have_the_detached_ones_too(host: CommandHost, cns: Cns) -> None:
    assert words(host.identify(cns).data, 4) == (1, 3, 7, 0)


@pytest.mark.parametrize(
    ("active", "allocated"),
    [
        (Cns.NAMESPACE, Cns.ALLOCATED_NAMESPACE),
        (Cns.CSI_NAMESPACE, Cns.CSI_ALLOCATED_NAMESPACE),
        (Cns.INDEPENDENT_NAMESPACE, Cns.ALLOCATED_INDEPENDENT_NAMESPACE),
    ],
)
def test_structures_of_a_namespace_that_is_not_there_are_zero(host: CommandHost, active: Cns, allocated: Cns) -> None:
    assert host.identify(active, 1).data == host.identify(allocated, 1).data != ZEROES
    assert host.identify(active, 3).data == ZEROES != host.identify(allocated, 3).data
    assert host.identify(active, 2).data == host.identify(allocated, 2).data == ZEROES
    for nsid in (0, 257, 0xFFFF_FFFE):
        assert host.identify(active, nsid).status == Status.INVALID_NAMESPACE
        assert host.identify(allocated, nsid).status == Status.INVALID_NAMESPACE


def test_what_namespaces_have_in_common(host: CommandHost) -> None:
    data = host.identify(Cns.NAMESPACE, 0xFFFF_FFFF).data
    assert words(data, 6) == (0,) * 6
    assert (data[25], data[130], data[146]) == (7, 9, 12)


def test_a_controller_without_namespaces_answers() -> None:
    host = CommandHost()
    host.controller.namespaces._by_id.clear()
    assert host.identify(Cns.ACTIVE_NAMESPACES).data == ZEROES
    assert host.identify(Cns.NAMESPACE, 0xFFFF_FFFF).data == ZEROES
    assert host.identify(Cns.CONTROLLER).status == Status.SUCCESS


def test_descriptors_want_an_active_namespace(host: CommandHost) -> None:
    assert host.identify(Cns.NAMESPACE_DESCRIPTORS, 7).status == Status.SUCCESS
    assert host.identify(Cns.NAMESPACE_DESCRIPTORS, 3).status == Status.INVALID_FIELD
    assert host.identify(Cns.NAMESPACE_DESCRIPTORS, 0).status == Status.INVALID_NAMESPACE


def test_controller_lists() -> None:
    host = CommandHost(namespace(), namespace(nsid=3, detached=True), cntlid=5)
    one, none = b"\x01\0\x05\0", b"\0\0\0\0"
    assert host.identify(Cns.CONTROLLERS).data[:4] == one
    assert host.identify(Cns.CONTROLLERS, cntid=6).data[:4] == none
    assert host.identify(Cns.ATTACHED_CONTROLLERS, 1, cntid=5).data[:4] == one
    assert host.identify(Cns.ATTACHED_CONTROLLERS, 3).data[:4] == none
    assert host.identify(Cns.ATTACHED_CONTROLLERS, 2).status == Status.INVALID_FIELD
    assert host.identify(Cns.ATTACHED_CONTROLLERS, 0).status == Status.INVALID_NAMESPACE


def test_command_sets(host: CommandHost) -> None:
    assert host.identify(Cns.COMMAND_SETS, cntid=0xFFFF).data == b"\x01".ljust(4096, b"\0")
    assert host.identify(Cns.COMMAND_SETS, cntid=9).status == Status.INVALID_FIELD


def test_another_command_set_or_an_unknown_cns_is_an_invalid_field(host: CommandHost) -> None:
    for cns in (0x05, 0x06, 0x07, 0x1A, 0x1B):
        assert host.identify(cns, 1, csi=2).status == Status.INVALID_FIELD
    for cns in (0x04, 0x09, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1D, 0xFF):
        assert host.identify(cns, 1).status == Status.INVALID_FIELD


def test_the_effects_tables_promise_exactly_what_there_is() -> None:
    assert set(effects.ADMIN_EFFECTS) == set(ADMIN_HANDLERS)
    assert {csi: set(table) for csi, table in effects.IO_EFFECTS.items()} == {
        csi: set(handlers) for csi, handlers in COMMAND_SETS.items()
    }
    assert set(effects.FEATURE_EFFECTS) == set(Feature)
