"""Faults on purpose: requests that fail or come late by rules that can change at any time.

For tests of nvmove, and for users who want to see what their guest makes of a bad disk. `FaultyBackend` stands before
every drive's back end; without rules it passes requests on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nvmove.block.backend import Backend, Operation, Request
from nvmove.block.delay import Delays
from nvmove.block.lend import LendsFile, LentFile, Loan

SECTOR = 512


@dataclass(frozen=True, slots=True)
class FaultRule:
    """Which requests fail or come late. All that is not said fits any request."""

    operation: Operation | None = None
    lbas: tuple[int, int] | None = None
    """First and last logical block of the namespace, as it is formatted when the request comes."""
    drive: str = ""
    errno: int = 0
    """What the request fails with, untried; 0: it is done, only late."""
    delay: int = 0
    """Microseconds before it fails or is begun."""
    count: int | None = None
    """How many requests; None: all."""

    def fits(self, request: Request, drive: frozenset[str], block_size: int) -> bool:
        """Whether `request` to a drive of these names is one of those. A flush has no blocks."""
        if self.operation not in {None, request.operation} or (self.drive and self.drive not in drive):
            return False
        if self.lbas is None:
            return True
        first, last = self.lbas
        end = request.offset + request.length
        return request.offset < end and request.offset < (last + 1) * block_size and first * block_size < end


@dataclass(slots=True)
class ActiveFault:
    """A rule in use."""

    id: int
    rule: FaultRule
    hits: int = 0
    """Requests it was used on."""

    @property
    def exhausted(self) -> bool:
        """Whether it is used up."""
        return self.rule.count is not None and self.hits >= self.rule.count


class FaultRules:
    """The rules of one VM or device. Any thread may call anything."""

    def __init__(self) -> None:
        self.any = False
        """Whether there is a rule that is not used up."""
        self._lock = threading.Lock()
        self._faults: dict[int, ActiveFault] = {}
        self._next = 1
        self._removed: list[Callable[[int], None]] = []
        self._bypasses: list[Callable[[], None]] = []

    def bypass(self, revoke: Callable[[], None]) -> bool:
        """Let requests go past the rules while there are none; return whether there are none.

        `revoke` is called when there is one, until `stop_bypass`.
        """
        with self._lock:
            if not self.any:
                self._bypasses.append(revoke)
            return not self.any

    def stop_bypass(self, revoke: Callable[[], None]) -> None:
        """Requests come here again."""
        with self._lock:
            self._bypasses.remove(revoke)

    def add(self, rule: FaultRule) -> int:
        """Use `rule` from now on, after all that are there; return its id."""
        with self._lock:
            for revoke in self._bypasses:
                revoke()
            fault = ActiveFault(self._next, rule)
            self._next += 1
            self._faults[fault.id] = fault
            self._look()
            return fault.id

    def remove(self, id: int) -> bool:
        """End a rule, the delay of requests that it holds included; return False when there is no such rule."""
        with self._lock:
            if self._faults.pop(id, None) is None:
                return False
            self._look()
        for callback in self._removed:
            callback(id)
        return True

    def list(self) -> list[ActiveFault]:
        """Return all rules, in order, those used up too."""
        with self._lock:
            return [ActiveFault(fault.id, fault.rule, fault.hits) for fault in self._faults.values()]

    def take(self, request: Request, drive: frozenset[str], block_size: int) -> tuple[int, FaultRule] | None:
        """Return id and rule of the first that fits, counted as used on `request`."""
        with self._lock:
            for fault in self._faults.values():
                if not fault.exhausted and fault.rule.fits(request, drive, block_size):
                    fault.hits += 1
                    self._look()
                    return fault.id, fault.rule
        return None

    def __contains__(self, id: int) -> bool:
        with self._lock:
            return id in self._faults

    def on_removed(self, callback: Callable[[int], None]) -> None:
        """Call `callback` with the id of each rule that is removed."""
        self._removed.append(callback)

    def _look(self) -> None:
        self.any = not all(fault.exhausted for fault in self._faults.values())


class FaultyBackend:
    """`image` as long as no rule says otherwise.

    A rule's delay holds up nothing else: neither the queue's thread nor other requests wait. Delayed requests are begun
    on a thread of this back end's own, one after the other.
    """

    def __init__(self, image: Backend, rules: FaultRules, names: Iterable[str]) -> None:
        """`names` are those that a rule's `drive` may have."""
        self.image = image
        self.block_size: Callable[[], int] = lambda: SECTOR
        """Tells the bytes of the blocks that a rule's `lbas` count."""
        self._names = frozenset(names)
        self._rules = rules
        self._delays = Delays(f"fault-{min(self._names, default='')}")
        rules.on_removed(self._delays.hasten)

    def submit(self, request: Request) -> None:
        """Do `request`, or what a rule wants instead."""
        if not self._rules.any:
            self.image.submit(request)
            return
        hit = self._rules.take(request, self._names, self.block_size())
        if hit is None:
            self.image.submit(request)
            return
        id, rule = hit
        if not rule.delay:
            request.done(rule.errno)
            return
        self._delays.add(rule.delay / 1e6, id, lambda: self._late(request, rule.errno))
        if id not in self._rules:  # removed in between: nobody else will hasten it
            self._delays.hasten(id)

    def _late(self, request: Request, errno: int) -> None:
        if errno:
            request.done(errno)
        else:
            self.image.submit(request)

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """Lend the image as it is while there are no rules, as `LendsFile`."""
        if not isinstance(self.image, LendsFile) or not self._rules.bypass(revoke):
            return None
        file = self.image.lend(revoke)
        if file is None:
            self._rules.stop_bypass(revoke)
            return None

        def release() -> None:
            file.release()
            self._rules.stop_bypass(revoke)

        return Loan(
            file.fd,
            release,
            writable=file.writable,
            syncs=file.syncs,
            durable=file.durable,
            space=file.space,
            zeroes=file.zeroes,
            alignment=file.alignment,
            export=file.export,
        )

    def sync_failed(self, code: int) -> None:
        """As `LendsFile`."""
        if isinstance(self.image, LendsFile):
            self.image.sync_failed(code)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.image.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.image.read_only

    @property
    def supports_discard(self) -> bool:
        """Whether DISCARD does something."""
        return self.image.supports_discard

    @property
    def request_alignment(self) -> int:
        """As Backend's."""
        return self.image.request_alignment

    def refresh_size(self) -> int:
        """Look at the size again and return it."""
        return self.image.refresh_size()

    def recover(self) -> None:
        """As Backend's. A fault made on purpose is no lost connection: only its rule's end mends it."""
        self.image.recover()

    def close(self) -> None:
        """Begin what is delayed at once, then close the image."""
        self._delays.close()
        self.image.close()
