"""Attempts to connect, on threads of their own."""

from __future__ import annotations

import threading

import pytest

from nvmove.block.nbd import revival
from nvmove.block.nbd.revival import Revival


def test_a_thread_that_cannot_start_is_an_attempt_that_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(revival, "PERIOD", 0.0)
    attempted = threading.Event()
    wanted = Revival(attempted.set)

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        wanted.want()
        wanted.want()
    assert caplog.text.count("can't start new thread") == 1
    wanted.want()
    assert attempted.wait(20)
