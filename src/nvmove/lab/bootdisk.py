"""A raw disk image that a PC boots Linux from, by BIOS and by UEFI, made without root and without mounting anything.

One FAT partition of type EF (EFI system partition) holds the kernel, the initramfs and GRUB for UEFI; GRUB for BIOS
lies before the partition, its first sector in the master boot record.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

from nvmove.lab.machine import QUICK
from nvmove.lab.sysroot import Sysroot

_SECTOR = 512
_PARTITION_START = 2048  # sectors: 1 MiB, where every partitioner starts
_PARTITION_SECTORS = 160 * 2048
_TABLE = 446  # of the MBR: boot code before it, four entries of 16 bytes, then 55 AA
_ESP = 0xEF

_GRUB_CONFIG = f"""\
search --no-floppy --file --set=root /vmlinuz
linux /vmlinuz {QUICK} nvmove.booted-from-disk
initrd /initrd.cpio
boot
"""
_MODULES = ["part_msdos", "fat", "normal", "linux", "search", "search_fs_file"]


def make_boot_disk(sysroot: Sysroot, image: Path) -> Path:
    """Write a raw image of 161 MiB that boots the sysroot's Linux; raise CalledProcessError when a tool fails."""
    with tempfile.TemporaryDirectory(prefix="nvmove-bootdisk-") as name:
        work = Path(name)
        config = work / "grub.cfg"
        config.write_text(_GRUB_CONFIG)
        bios = _grub(sysroot, config, work / "core.img", "i386-pc", ["biosdisk"])
        efi = _grub(sysroot, config, work / "bootx64.efi", "x86_64-efi", [])

        partition = work / "partition"
        with partition.open("wb") as file:
            file.truncate(_PARTITION_SECTORS * _SECTOR)
        _mtools(sysroot, "mformat", partition, "-F", "-T", str(_PARTITION_SECTORS), "-H", str(_PARTITION_START), "::")
        _mtools(sysroot, "mmd", partition, "::/EFI", "::/EFI/BOOT")
        _mtools(sysroot, "mcopy", partition, str(efi), "::/EFI/BOOT/BOOTX64.EFI")
        _mtools(sysroot, "mcopy", partition, str(sysroot.packed_kernel), "::/vmlinuz")
        _mtools(sysroot, "mcopy", partition, str(sysroot.initrd), "::/initrd.cpio")

        boot = (sysroot.path / "usr/lib/grub/i386-pc/boot.img").read_bytes()
        core = bios.read_bytes()
        if len(core) > (_PARTITION_START - 1) * _SECTOR:
            raise ValueError(f"GRUB has {len(core)} bytes, more than fit before the partition")
        entry = struct.pack(
            "<B3sB3sII", 0x80, b"\xfe\xff\xff", _ESP, b"\xfe\xff\xff", _PARTITION_START, _PARTITION_SECTORS
        )
        with image.open("wb") as file:
            file.write(boot[:_TABLE] + entry + bytes(48) + b"\x55\xaa" + core)
            file.seek(_PARTITION_START * _SECTOR)
            with partition.open("rb") as source:
                while piece := source.read(1 << 20):
                    file.write(piece)
    return image


def _grub(sysroot: Sysroot, config: Path, output: Path, target: str, modules: list[str]) -> Path:
    directory = str(sysroot.path / "usr/lib/grub" / target)
    command = [sysroot.program("grub-mkimage"), "-O", target, "-d", directory, "-p", "/", "-c", str(config)]
    subprocess.run([*command, "-o", str(output), *modules, *_MODULES], check=True)
    return output


def _mtools(sysroot: Sysroot, tool: str, partition: Path, *arguments: str) -> None:
    subprocess.run([sysroot.program("mtools"), "-c", tool, "-i", str(partition), *arguments], check=True)
