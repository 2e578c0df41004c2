"""QEMU's null disks (`null-co`, `null-aio`): no data is stored, none is moved. For measurements of all but the disk.

A read leaves the guest's memory as it is (`read-zeroes=off`, the default) or fills it with zeroes; a write is lost.
An engine that moves data itself may ask `moves_data` and leave the back end out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import msgspec

from nvmove.block.backend import BackendError, Operation, Request, refusal
from nvmove.block.config import NullConfig, OpenOptions
from nvmove.block.delay import Delays
from nvmove.block.gate import Gate
from nvmove.block.lend import NO_SPACE, LentFile, Loan

_SECTOR = 512
_ZEROES = bytes(1 << 16)


class NullBackend:
    """A disk of so many bytes and no content. Any number of threads may submit at once."""

    def __init__(self, config: NullConfig, options: OpenOptions, *, active: bool = True) -> None:
        """`active` off: every request is refused until `activate`, as of a raw image."""
        self._config = config
        self._options = options
        self._gate = Gate(0 if active else errno.EPERM)
        self._delays = Delays("null-disk")

    @property
    def size(self) -> int:
        """Length in bytes: whole sectors, as in QEMU."""
        return -(-self._config.size // _SECTOR) * _SECTOR

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (with EROFS)."""
        return self._options.read_only

    @property
    def moves_data(self) -> bool:
        """Whether a request touches its buffers or takes time; where not, checking its range is all there is to do."""
        return self._config.read_zeroes or self._config.latency_ns > 0

    @property
    def supports_discard(self) -> bool:
        """QEMU's null drivers have no discard."""
        return False

    @property
    def request_alignment(self) -> int:
        """None is demanded."""
        return 1

    def submit(self, request: Request) -> None:
        """Do nothing, and tell `request` so, at once or after the latency."""
        error = self._gate.enter()
        if error:
            request.done(error)
        elif self._config.latency_ns:
            self._delays.add(self._config.latency_ns / 1e9, 0, lambda: self._finish(request))
        else:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        error = refusal(request, self.size, self._options.read_only)
        if not error and self._config.read_zeroes and request.operation is Operation.READ:
            for buffer in request.buffers:
                for start in range(0, len(buffer), len(_ZEROES)):
                    part = buffer[start : start + len(_ZEROES)]
                    part[:] = _ZEROES[: len(part)]
        self._gate.leave()
        request.done(error)

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """Lend nothing for a file, as `LendsFile`, unless requests take their time."""
        if self._config.latency_ns or self._gate.stay(revoke):
            return None
        return Loan(
            -1,
            lambda: self._gate.depart(revoke),
            writable=not self.read_only,
            syncs=False,
            space=NO_SPACE,
            zeroes=self._config.read_zeroes,
        )

    def sync_failed(self, code: int) -> None:
        """Nothing is ever synced here."""

    def refresh_size(self) -> int:
        """Return the size, which does not change."""
        return self.size

    def recover(self) -> None:
        """There is nothing to lose."""

    def resize(self, size: int) -> None:
        """Refuse, as QEMU does, with BackendError."""
        raise BackendError("Image is read-only" if self.read_only else "Image format driver does not support resize")

    def inactivate(self) -> None:
        """Hand the disk over: finish what is under way. Requests are refused with EPERM."""
        self._gate.shut(errno.EPERM)

    def activate(self) -> None:
        """Take requests again."""
        self._gate.open()

    def close(self) -> None:
        """Finish what is under way, without its latency. Requests are refused with ESHUTDOWN."""
        self._delays.close()
        self._gate.shut()


def describe(driver: str, config: NullConfig) -> str:
    """Return the file name that QEMU shows for such a disk."""
    options = {"driver": driver, "size": config.size, "read-zeroes": config.read_zeroes}
    if config == NullConfig(latency_ns=config.latency_ns):
        return f"{driver}://"
    return "json:" + msgspec.json.encode(options).decode()
