"""`nvmove demo` itself, as `make demo` runs it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from nvmove.lab.processes import wait_gone
from tests.guest.command_lines import command_lines_with
from tests.guest.conftest import Nvmove


@pytest.mark.timeout(900)
def test_the_demo_holds(nvmove: Nvmove, work: Path) -> None:
    demo = nvmove("demo")
    assert demo.wait(500) == 0, demo.output
    assert demo.output.count("✓") == 21
    assert wait_gone(demo.mark, 10) == []
    assert [path.name for path in work.iterdir()] == ["said"]


def test_ctrl_c_leaves_nothing(nvmove: Nvmove, work: Path) -> None:
    demo = nvmove("demo")
    deadline = time.monotonic() + 300
    while "✓  1/21" not in demo.output and time.monotonic() < deadline:
        time.sleep(0.1)
    # The demo puts a mark of its own upon its VM: look for that, too, by the directory in its command line.
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(180) == 130, demo.output
    assert wait_gone(demo.mark, 30) == []
    assert [path.name for path in work.iterdir()] == ["said"]
    deadline = time.monotonic() + 30
    while left := command_lines_with(str(work)):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
