"""Directories for tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def short_directory() -> Iterator[Path]:
    """One with a short name, removed at the end.

    A socket's path has 107 bytes at most (unix(7)), and those of pytest grow with the number of its runs.
    """
    with tempfile.TemporaryDirectory(prefix="nvmove-t-", dir="/tmp") as path:
        yield Path(path)
