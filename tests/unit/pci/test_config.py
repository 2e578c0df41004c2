"""Configuration space against what QEMU 11.1.3's nvme shows (qtest, lspci)."""

from __future__ import annotations

import pytest

from nvmove.nvme.config import ControllerConfig
from nvmove.pci.config import BarLayout, ConfigSpace
from nvmove.vmstate.schema import StateError

# Measured: the dwords that are not zero after reset, and each after all ones and all zeroes were written to it.
QEMU_NVME = {
    0x00: (0x00101B36, 0x00101B36, 0x00101B36),
    0x04: (0x00100000, 0x00100507, 0x00100000),
    0x08: (0x01080202, 0x01080202, 0x01080202),
    0x0C: (0x00000000, 0x000000FF, 0x00000000),
    0x10: (0x00000004, 0xFFFFC004, 0x00000004),
    0x14: (0x00000000, 0xFFFFFFFF, 0x00000000),
    0x2C: (0x11001AF4, 0x11001AF4, 0x11001AF4),
    0x34: (0x00000040, 0x00000040, 0x00000040),
    0x3C: (0x00000100, 0x000001FF, 0x00000100),
    0x40: (0x00408011, 0xC0408011, 0x00408011),
    0x44: (0x00002000, 0x00002000, 0x00002000),
    0x48: (0x00003000, 0x00003000, 0x00003000),
    0x60: (0x00030001, 0x00030001, 0x00030001),
    0x64: (0x00000008, 0x0000000B, 0x00000008),
    0x80: (0x00026010, 0x00026010, 0x00026010),  # Endpoint, as behind a root port
    0x84: (0x10008020, 0x10008020, 0x10008020),
    0x88: (0x00000000, 0x0000000F, 0x00000000),
    0x8C: (0x00000411, 0x00000411, 0x00000411),
    0x90: (0x00110000, 0x00110000, 0x00110000),
    0xA4: (0x00300000, 0x00300000, 0x00300000),
    0xA8: (0x00000000, 0x00008000, 0x00000000),
}
PLAIN_MEMORY = [*range(0x4C, 0x60, 4), *range(0x68, 0x80, 4), *range(0xBC, 0x100, 4)]


def space(**options: object) -> ConfigSpace:
    return ConfigSpace(ControllerConfig(serial="S1", **options))  # type: ignore[arg-type]


def dword(config: ConfigSpace, offset: int) -> int:
    return int.from_bytes(config.read(offset, 4), "little")


@pytest.mark.parametrize("offset", range(0, 0x110, 4))
def test_each_dword_reads_and_writes_as_in_qemu(offset: int) -> None:
    config = space()
    measured = QEMU_NVME.get(offset, (0, 0xFFFFFFFF, 0) if offset in PLAIN_MEMORY else (0, 0, 0))
    seen = [dword(config, offset)]
    for value in (b"\xff" * 4, bytes(4)):
        config.write(offset, value)
        seen.append(dword(config, offset))
    assert [hex(v) for v in measured] == [hex(v) for v in seen]


@pytest.mark.parametrize(
    ("pairs", "vectors", "table", "pba", "size"),
    [
        (1, 65, 0x2000, 0x3000, 0x4000),
        (1, 1, 0x2000, 0x3000, 0x4000),
        (64, 2048, 0x2000, 0xA000, 0x10000),
        (1000, 65, 0x3000, 0x4000, 0x8000),
        (1000, 2048, 0x3000, 0xB000, 0x10000),
        (10, 129, 0x2000, 0x3000, 0x4000),
    ],
)
def test_bar0_is_laid_out_as_in_qemu(pairs: int, vectors: int, table: int, pba: int, size: int) -> None:
    layout = BarLayout(pairs, vectors)
    assert (table, pba, size) == (layout.table, layout.pba, layout.size)


def test_intel_id_changes_vendor_and_device_only() -> None:
    plain, intel = space(), space(use_intel_id=True)
    assert bytes.fromhex("86804558") == intel.read(0, 4)
    assert plain.read(4, 4092) == intel.read(4, 4092)


@pytest.mark.parametrize(("offset", "data"), [(0x88, b"\x00\x80\x00\x00"), (0x89, b"\x80"), (0x80, bytes(9) + b"\x80")])
def test_flr_bit_is_seen_in_any_access_and_reads_as_zero(offset: int, data: bytes) -> None:
    config = space()
    assert config.write(offset, data)
    assert dword(config, 0x88) == 0


@pytest.mark.parametrize(("offset", "data"), [(0x88, b"\x0f\x00"), (0x04, b"\xff\xff"), (0x8A, b"\x80")])
def test_other_writes_are_no_flr(offset: int, data: bytes) -> None:
    assert not space().write(offset, data)


def test_status_shows_the_intx_level() -> None:
    config = space()
    assert config.read(4, 4) == bytes.fromhex("00001000")
    assert config.read(4, 4, intx=True) == bytes.fromhex("00001800")
    assert config.read(8, 4, intx=True) == config.read(8, 4)


def test_msix_is_enabled_by_its_control_bit() -> None:
    config = space()
    config.write(0x42, b"\x00\x80")
    assert config.msix_enabled
    config.reset()
    assert not config.msix_enabled


def test_saved_bytes_load_and_reset_forgets_them() -> None:
    config, other = space(), space()
    config.write(0x10, bytes.fromhex("0480bffe"))
    config.write(4, b"\x06\x05")
    other.load(config.save())
    assert config.save() == other.save()
    other.reset()
    assert space().save() == other.save()


@pytest.mark.parametrize(
    ("options", "saved", "words"),
    [
        ({"msix_qsize": 16}, space().save(), "at 0x42 is 0x0f here, and was 0x40"),
        ({"use_intel_id": True}, space().save(), "at 0x0 is 0x86 here"),
        ({}, bytes(256), "256 bytes"),
    ],
)
def test_bytes_of_another_function_are_refused_untouched(options: dict[str, object], saved: bytes, words: str) -> None:
    config = space(**options)
    before = config.save()
    with pytest.raises(StateError, match=words):
        config.load(saved)
    assert before == config.save()
