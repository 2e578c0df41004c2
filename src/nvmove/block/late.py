"""A back end for an image that is opened after the device exists: QEMU exports its nodes only once it runs."""

from __future__ import annotations

import errno
from collections.abc import Callable

from nvmove.block.backend import Backend, Request
from nvmove.block.lend import LendsFile, LentFile


class LateBackend:
    """Stands in for a back end until `open` gives it one: size 0, and every request fails with ENODEV."""

    def __init__(self) -> None:
        self._image: Backend | None = None

    def open(self, image: Backend) -> None:
        """Take `image` over; from now on all goes to it. The namespace's geometry has to be read again."""
        self._image = image

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._image.size if self._image else 0

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._image.read_only if self._image else False

    @property
    def supports_discard(self) -> bool:
        """Whether DISCARD does something."""
        return self._image.supports_discard if self._image else False

    @property
    def request_alignment(self) -> int:
        """As Backend's."""
        return self._image.request_alignment if self._image else 1

    def submit(self, request: Request) -> None:
        """Pass `request` on."""
        if self._image is None:
            request.done(errno.ENODEV)
        else:
            self._image.submit(request)

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """As `LendsFile`."""
        return self._image.lend(revoke) if isinstance(self._image, LendsFile) else None

    def sync_failed(self, code: int) -> None:
        """As `LendsFile`."""
        if self._image is not None and isinstance(self._image, LendsFile):
            self._image.sync_failed(code)

    def refresh_size(self) -> int:
        """Look at the size again and return it."""
        return self._image.refresh_size() if self._image else 0

    def recover(self) -> None:
        """As Backend's."""
        if self._image is not None:
            self._image.recover()

    def close(self) -> None:
        """Close what was opened."""
        if self._image is not None:
            self._image.close()
