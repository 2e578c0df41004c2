"""What a program leaves behind: mounts, shared memory, sockets and files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def _unix_sockets() -> frozenset[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return frozenset(fields[7] for line in lines if len(fields := line.split(maxsplit=7)) == 8)


def _tree(directory: Path) -> frozenset[str]:
    return frozenset(str(path) for path in directory.rglob("*"))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The state of what outlives a process, at one moment."""

    mounts: frozenset[str]
    """Those below the directory: others on this machine mount things, too."""
    shared_memory: frozenset[str]
    """QEMU's; `nvmove bench` has its files there too, and may run beside."""
    sockets: frozenset[str]
    """Names of listening or bound Unix sockets below the directory, and abstract ones that speak of nvmove."""
    files: frozenset[str]
    """All below the directory."""

    @classmethod
    def look(cls, directory: Path) -> Surroundings:
        """Look around; `directory` is where the programs under test may have put their files."""
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return cls(
            frozenset(line for line in mounts if str(directory) in line),
            frozenset(name for name in os.listdir("/dev/shm") if "qemu" in name),
            frozenset(name for name in _unix_sockets() if name.startswith(str(directory)) or "@nvmove" in name),
            _tree(directory),
        )

    def since(self, before: Surroundings) -> list[str]:
        """Return what is here and was not there `before`."""
        kinds = (
            ("mount", self.mounts - before.mounts),
            ("shared memory", self.shared_memory - before.shared_memory),
            ("socket", self.sockets - before.sockets),
            ("file", self.files - before.files),
        )
        return [f"{kind} {name}" for kind, names in kinds for name in sorted(names)]
