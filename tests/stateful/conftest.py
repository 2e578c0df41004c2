"""What fails here is made smaller for up to five minutes before it is told: the test must not end before that."""

from __future__ import annotations

import pytest

SHRINKS = 400
"""Seconds; hypothesis stops after 300."""


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.timeout(SHRINKS))
