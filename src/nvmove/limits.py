"""The descriptors that a process may have: nvmove takes what it is allowed, what it starts gets what the user gave."""

from __future__ import annotations

import contextlib
import resource

_given: tuple[int, int] | None = None


def raise_descriptors() -> None:
    """Raise the soft limit to the hard one: a queue pair takes four descriptors, and the soft one is often 1024."""
    global _given  # noqa: PLW0603  the limit is the process's, too
    if _given is None:
        _given = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # a container may forbid it: what there is has to do
            resource.setrlimit(resource.RLIMIT_NOFILE, (_given[1], _given[1]))


def restore_descriptors() -> None:
    """In a child, before exec: have the limit that nvmove was started with."""
    if _given is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, _given)
