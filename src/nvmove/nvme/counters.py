"""What was asked of one namespace's disk since the process started, as QEMU counts it for `query-blockstats`.

Not part of the device's state, and not SMART, which counts commands of the guest's and travels with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nvmove.block.backend import Operation


@dataclass(slots=True)
class Count:
    """Requests of one kind."""

    operations: int = 0
    """Those that succeeded."""
    bytes: int = 0
    """What they moved or changed; a flush has none."""
    failed: int = 0
    """Those that failed; one that is held and tried again counts each time."""


_SAME = {Operation.WRITE_ZEROES: Operation.WRITE}


@dataclass(slots=True)
class Counters:
    """Of one namespace. Everything here wants the controller's lock."""

    _counts: dict[Operation, Count] = field(
        default_factory=lambda: {kind: Count() for kind in Operation if kind not in _SAME}
    )

    def __getitem__(self, operation: Operation) -> Count:
        """Return the count of a kind of request; zeroes are written, as QEMU has it."""
        return self._counts[_SAME.get(operation, operation)]

    def add(self, operation: Operation, operations: int, length: int) -> None:
        """So many requests have succeeded, with `length` bytes in all."""
        count = self[operation]
        count.operations += operations
        count.bytes += length

    def fail(self, operation: Operation) -> None:
        """A request has failed."""
        self[operation].failed += 1

    def copy(self) -> Counters:
        """Return the counts as they are now."""
        return Counters({kind: Count(one.operations, one.bytes, one.failed) for kind, one in self._counts.items()})
