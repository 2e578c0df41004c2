"""Raw images change hands together, and never while somebody is in the middle of it."""

from __future__ import annotations

import asyncio

import pytest

from nvmove.block.backend import BackendError
from nvmove.vm.moves.images import Images


class Image:
    def __init__(self, locked: bool = False) -> None:
        self.locked = locked
        self.active = False
        self.broken = False

    def activate(self) -> None:
        if self.locked:
            raise BackendError("locked")
        self.active = True

    def inactivate(self) -> None:
        if self.broken:
            raise BackendError("cannot be flushed")
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


def test_when_one_cannot_be_handed_over_all_can_be_taken_again() -> None:
    async def test() -> None:
        first, second = Image(), Image()
        images = Images([first, second], taken=False)
        await images.take()
        second.broken = True
        with pytest.raises(BackendError, match="cannot be flushed"):
            await images.release(lambda: True)
        assert (first.active, second.active, images.taken) == (False, True, False)
        await images.take()
        assert (first.active, second.active, images.taken) == (True, True, True)

    asyncio.run(test())


def test_an_image_that_cannot_be_given_back_does_not_hide_why_another_was_not_to_be_had() -> None:
    async def test() -> None:
        first, second = Image(), Image(locked=True)
        first.broken = True
        images = Images([first, second], taken=False)
        with pytest.raises(BackendError, match="locked"):
            await images.take()

    asyncio.run(test())
