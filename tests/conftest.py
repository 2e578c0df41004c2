"""What all tests share: where the sysroot is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("nvmove", deadline=None)  # how long an example takes says more of the machine's load
settings.load_profile("nvmove")
SYSROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nvmove" / "sysroot"


@pytest.fixture(scope="session")
def sysroot() -> Path:
    """The tree that `make sysroot` builds: bin/ has QEMU's programs, guest/ a kernel and an initramfs."""
    assert (SYSROOT / ".whole").exists(), f"no sysroot at {SYSROOT}: run `make sysroot`"
    return SYSROOT
