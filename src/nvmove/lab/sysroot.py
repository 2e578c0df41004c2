"""Where the tree is that `make sysroot` builds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nvmove.errors import UserError


class SysrootError(UserError):
    """There is no whole sysroot: one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Sysroot:
    """The tree: `bin/` has stock QEMU's programs, `guest/` a kernel and an initramfs."""

    path: Path

    @property
    def kernel(self) -> Path:
        """The guest's Linux, as QEMU starts it soonest: not packed."""
        return self.path / "guest" / "vmlinux"

    @property
    def packed_kernel(self) -> Path:
        """The same as boot loaders want it."""
        return self.path / "guest" / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The guest's userland: busybox, fio, nvme-cli, lspci."""
        return self.path / "guest" / "initrd.cpio"

    def program(self, name: str) -> str:
        """Return the path of a program of the tree, `qemu-img` say."""
        return str(self.path / "bin" / name)

    @property
    def qemu_version(self) -> str:
        """QEMU's own first line of `--version`."""
        return (self.path / ".qemu-version").read_text().strip()


def find_sysroot() -> Sysroot:
    """Return the sysroot; raise SysrootError when it was not built, or only in part."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(cache) / "nvmove" / "sysroot"
    if not (path / ".whole").exists():
        raise SysrootError(f"no QEMU and guest at {path}: run `make sysroot` in nvmove's checkout first")
    return Sysroot(path)
