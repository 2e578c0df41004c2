"""Limits of descriptors, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """if True:
    import resource
    from nvmove import limits
    limits.ENOUGH = 300
    resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
    limits.raise_descriptors()
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    limits.restore_descriptors()
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(100, 500, 300), (100, 200, 200), (400, 400, 400)])
def test_the_soft_limit_is_raised_and_children_get_what_was_given(soft: int, hard: int, raised: int) -> None:
    code = CODE.format(soft=soft, hard=hard)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines() == [f"{raised} {hard}", f"{soft} {hard}"]
