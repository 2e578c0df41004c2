"""Directories for sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: a socket's path has 107 bytes at most (unix(7)), and pytest's grow with the number of its runs."""
    with tempfile.TemporaryDirectory(prefix="nvmove-t-", dir="/tmp") as directory:
        yield Path(directory)
