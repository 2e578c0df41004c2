"""A queue's doorbell: its cell, and the place where that is.

A doorbell register is a cell of 32 bits: submission queue y's tail is cell 2y, completion queue y's head cell 2y + 1
(PCIe 3.1.2). Cells in memory lie as the registers do.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from nvmove.nvme.queue import CompletionQueue, SubmissionQueue

CELL = 4
"""Bytes of a doorbell, a shadow doorbell and an EventIdx: CAP.DSTRD is 0."""

Ring = SubmissionQueue | CompletionQueue


class Place(enum.Enum):
    """Where a queue's doorbell is."""

    MESSAGE = "message"
    PAGE = "page"
    GUEST = "guest"


class Source(NamedTuple):
    """A queue's doorbell, and where who goes to sleep says how far it has looked, before it looks once more.

    GUEST: guest addresses of the cell and of its EventIdx. PAGE: addresses in this process, the second one for
    `Doorbells.scan`.
    """

    place: Place
    address: int = 0
    event: int = 0


MESSAGE = Source(Place.MESSAGE)


def cell_of(ring: Ring) -> int:
    """Return the index of a queue's doorbell."""
    return 2 * ring.sqid if isinstance(ring, SubmissionQueue) else 2 * ring.cqid + 1


def position(ring: Ring) -> int:
    """Return how far the host is in a ring, by its doorbell: a submission queue's tail, a completion queue's head."""
    return ring.tail if isinstance(ring, SubmissionQueue) else ring.head
