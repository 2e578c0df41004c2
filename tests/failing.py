"""A disk that fails on demand, and a host of a controller whose errors have a policy."""

from __future__ import annotations

import errno
from collections.abc import Callable

from nvmove.block.backend import Request
from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.nvme.config import ControllerConfig
from tests.disk import Disk
from tests.nvme_host import CONFIG, Completion, Host


class FailingDisk(Disk):
    """Fails what `fails` picks with `errno`; 512-byte blocks."""

    def __init__(self, size: int = 1 << 20, hold: bool = False) -> None:
        super().__init__(size, hold)
        self.errno = errno.ENOSPC
        self.fails: Callable[[Request], bool] = lambda _request: False
        self.order: list[tuple[str, int]] = []
        """What was tried: operation and block."""
        self.recovered = 0

    def fail_all(self, number: int = errno.ENOSPC) -> None:
        self.errno, self.fails = number, lambda _request: True

    def heal(self) -> None:
        self.fails = lambda _request: False

    def recover(self) -> None:
        self.recovered += 1

    def error_of(self, request: Request) -> int:
        self.order.append((request.operation.value, request.offset // 512))
        return self.errno if self.fails(request) else 0


class PolicyHost(Host):
    """A host whose drive d0 has the policies `errors`; what was reported is in `reports`."""

    errors: DriveErrors

    def __init__(
        self,
        disk: FailingDisk | None = None,
        werror: ErrorPolicy = ErrorPolicy.STOP,
        rerror: ErrorPolicy = ErrorPolicy.STOP,
        config: ControllerConfig = CONFIG,
        entries: int = 16,
    ) -> None:
        self.failing = disk or FailingDisk()
        super().__init__(disk=self.failing, config=config, errors=DriveErrors(werror, rerror))
        self.enable()
        self.create(1, sq_size=entries, cq_size=entries)

    def try_again(self) -> None:
        """The VM was stopped and runs again."""
        assert self.controller.pause(0)
        self.controller.resume()
        self.drain()

    def done(self, cqid: int = 1) -> list[Completion]:
        self.drain()
        return self.reap(cqid)
