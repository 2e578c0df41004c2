"""The images that nvmove has opened itself, as migration sees them: this side's, or handed over to the other.

QEMU does the same for the nodes it keeps: it inactivates them at the source's end, and activates them to run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from nvmove.block.backend import BackendError

log = logging.getLogger(__name__)


class Image(Protocol):
    """An image with locks that another host's nvmove or QEMU respects."""

    def activate(self) -> None:
        """Take the image; raises BackendError when another has it. Does nothing when it is taken."""

    def inactivate(self) -> None:
        """Finish what is under way, flush, drop the locks. Requests are refused from then on.

        Raises BackendError, with nothing changed, when it cannot be flushed.
        """


class Images:
    """All of a VM's. They are taken and given away together."""

    def __init__(self, images: Sequence[Image], *, taken: bool = True) -> None:
        self._images = images
        self.taken = taken
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Take all; raises BackendError, with none taken, when another has one of them."""
        async with self._lock:
            if self.taken:
                return
            taken: list[Image] = []
            for image in self._images:
                try:
                    await asyncio.to_thread(image.activate)
                except BackendError:
                    for one in taken:
                        await asyncio.to_thread(_give_back, one)
                    raise
                taken.append(image)
            self.taken = True

    async def release(self, wanted: Callable[[], bool]) -> bool:
        """Give all away; return False, and do nothing, when that is not `wanted` any more once it is our turn.

        Raises BackendError when one cannot be flushed: none counts as taken then, and `take` gets back what was given.
        """
        async with self._lock:
            if not wanted():
                return False
            self.taken = False
            for image in self._images:
                await asyncio.to_thread(image.inactivate)
            return True


def _give_back(image: Image) -> None:
    """Undo `activate`; what cannot be flushed now, nothing having been written, is for the next hand-over to say."""
    try:
        image.inactivate()
    except BackendError as error:
        log.error("%s", error)
