"""Raw images change hands together, and never while somebody is in the middle of it."""

from __future__ import annotations

import asyncio

import pytest

from nvmove.block.backend import BackendError
from nvmove.vm.images import Images


class Image:
    def __init__(self, locked: bool = False) -> None:
        self.locked = locked
        self.active = False

    def activate(self) -> None:
        if self.locked:
            raise BackendError("locked")
        self.active = True

    def inactivate(self) -> None:
        self.active = False


def test_all_are_taken_or_none() -> None:
    async def test() -> None:
        first, second = Image(), Image(locked=True)
        images = Images([first, second], taken=False)
        with pytest.raises(BackendError):
            await images.take()
        assert (first.active, images.taken) == (False, False)
        second.locked = False
        await images.take()
        await images.take()
        assert (first.active, second.active, images.taken) == (True, True, True)

    asyncio.run(test())


def test_a_release_that_is_not_wanted_any_more_does_nothing() -> None:
    async def test() -> None:
        image = Image()
        image.active = True
        images = Images([image])
        seen = [(await images.release(wanted), image.active) for wanted in (lambda: False, lambda: True)]
        assert seen == [(False, True), (True, False)]
        assert not images.taken

    asyncio.run(test())
