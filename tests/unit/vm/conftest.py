"""Directories for sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.directories import short_directory


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In place of pytest's, which is too long for a socket."""
    with short_directory() as directory:
        yield directory
