"""The descriptors that a process may have: nvmove takes what it needs, what it starts gets what the user gave."""

from __future__ import annotations

import contextlib
import resource

ENOUGH = 1 << 16
"""Four for each queue pair, 256 controllers of 64. Some programs look at every number up to their limit."""

_given: tuple[int, int] | None = None


def raise_descriptors() -> None:
    """Raise the soft limit as far as the hard one lets, up to ENOUGH: often it is 1024."""
    global _given  # noqa: PLW0603  the limit is the process's, too
    if _given is not None:
        return
    soft, hard = _given = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a container may forbid it: what there is has to do
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def restore_descriptors() -> None:
    """In a child, before exec: have the limit that nvmove was started with."""
    if _given is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, _given)
