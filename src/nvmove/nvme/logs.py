"""What the log pages hold (Base 5.16): failures, counters, changes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.features import Features
from nvmove.nvme.spec import (
    COMPOSITE_TEMPERATURE,
    ERROR_ENTRIES,
    ERROR_ENTRY,
    ERROR_ENTRY_SIZE,
    LOCATION_NONE,
    SMART_SIZE,
    SMART_UNIT,
    WARNING_TEMPERATURE,
)
from nvmove.nvme.state import saved as state


class Failed(Protocol):
    """A command that failed, as an entry of the error log names it."""

    cid: int
    nsid: int
    opcode: int

    @property
    def sqid(self) -> int:
        """Its submission queue."""


class ErrorLog:
    """The newest `ERROR_ENTRIES` failures, and how many there were since power-on."""

    def __init__(self) -> None:
        self.entries: deque[state.ErrorEntryState] = deque(maxlen=ERROR_ENTRIES)
        """Newest first."""
        self.count = 0

    def add(self, command: Failed, status: int, *, location: int = LOCATION_NONE, lba: int = 0) -> None:
        """Record that `command` fails with `status` (SCT << 8 | SC, with More and DNR)."""
        self.count += 1
        self.entries.appendleft(
            state.ErrorEntryState(
                count=self.count,
                sqid=command.sqid,
                cid=command.cid,
                status=status,
                location=location,
                lba=lba,
                nsid=command.nsid,
                opcode=command.opcode,
            )
        )

    def page(self) -> bytes:
        """Return the log page; entries that are not used are zero."""
        used = b"".join(
            ERROR_ENTRY.pack(
                entry.count, entry.sqid, entry.cid, entry.status << 1, entry.location, entry.lba, entry.nsid,
                0, 0, 0, 0, 0,
            )
            for entry in self.entries
        )  # fmt: skip
        return used.ljust(ERROR_ENTRIES * ERROR_ENTRY_SIZE, b"\0")


class Smart:
    """The counters of the SMART log, over all namespaces. `clock` gives seconds that only grow.

    A counter that its page shows in other units is kept in its own: bytes, nanoseconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._since = clock()
        self.bytes_read = 0
        self.bytes_written = 0
        self.read_commands = 0
        self.write_commands = 0
        self.busy_ns = 0
        self.power_cycles = 1
        self.power_on_before_ms = 0
        """Before this process took over."""
        self.unsafe_shutdowns = 0
        self.media_errors = 0
        self.temperature = COMPOSITE_TEMPERATURE
        self.critical_warning = 0
        """Warnings that are there whatever is measured (the property `smart_critical_warning`)."""

    @property
    def power_on_ms(self) -> int:
        """Milliseconds the device was powered."""
        return self.power_on_before_ms + int((self.clock() - self._since) * 1000)

    def count_read(self, length: int) -> None:
        """The host has read `length` bytes with one command."""
        self.read_commands += 1
        self.bytes_read += length

    def count_written(self, length: int) -> None:
        """The host has written `length` bytes with one command."""
        self.write_commands += 1
        self.bytes_written += length

    def power_cycle(self, clean: bool) -> None:
        """The device was without power; `clean`: after a shutdown notification."""
        self.power_cycles += 1
        self.unsafe_shutdowns += not clean

    def warnings(self, features: Features) -> int:
        """Return the critical warning bits that hold now."""
        outside = self.temperature >= features.temperature_over or self.temperature <= features.temperature_under
        return self.critical_warning | (WARNING_TEMPERATURE if outside else 0)

    def page(self, features: Features, error_entries: int) -> bytes:
        """Return the SMART / Health Information log page (Base 5.16.1.3)."""
        page = bytearray(SMART_SIZE)
        page[0] = self.warnings(features)
        page[1:3] = self.temperature.to_bytes(2, "little")
        counters = (
            math.ceil(self.bytes_read / SMART_UNIT),
            math.ceil(self.bytes_written / SMART_UNIT),
            self.read_commands,
            self.write_commands,
            self.busy_ns // (60 * 10**9),
            self.power_cycles,
            self.power_on_ms // (3600 * 1000),
            self.unsafe_shutdowns,
            self.media_errors,
            error_entries,
        )
        for index, value in enumerate(counters):
            page[32 + 16 * index : 48 + 16 * index] = value.to_bytes(16, "little")
        return bytes(page)


class Logs:
    """What the log pages hold. All of it wants the controller's lock."""

    def __init__(self, config: ControllerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.smart = Smart(clock)
        self.smart.critical_warning = config.smart_critical_warning
        self.errors = ErrorLog()
        self.changed: set[int] = set()
        """Namespace ids changed since the guest last read the Changed Namespace List."""

    def save(self) -> tuple[state.SmartState, list[state.ErrorEntryState], list[int]]:
        """Return SMART, the error log and the changed namespaces as plain data."""
        smart = self.smart
        return (
            state.SmartState(
                bytes_read=smart.bytes_read,
                bytes_written=smart.bytes_written,
                read_commands=smart.read_commands,
                write_commands=smart.write_commands,
                busy_ns=smart.busy_ns,
                power_cycles=smart.power_cycles,
                power_on_ms=smart.power_on_ms,
                unsafe_shutdowns=smart.unsafe_shutdowns,
                media_errors=smart.media_errors,
                error_entries=self.errors.count,
                temperature=smart.temperature,
                critical_warning=smart.critical_warning,
            ),
            list(self.errors.entries),
            sorted(self.changed),
        )

    def load(self, saved: state.SmartState, errors: list[state.ErrorEntryState], changed: list[int]) -> None:
        """Replace everything by what was saved (and checked)."""
        smart = self.smart = Smart(self.smart.clock)
        smart.bytes_read, smart.bytes_written = saved.bytes_read, saved.bytes_written
        smart.read_commands, smart.write_commands = saved.read_commands, saved.write_commands
        smart.busy_ns = saved.busy_ns
        smart.power_cycles = saved.power_cycles
        smart.power_on_before_ms = saved.power_on_ms
        smart.unsafe_shutdowns = saved.unsafe_shutdowns
        smart.media_errors = saved.media_errors
        smart.temperature = saved.temperature
        smart.critical_warning = saved.critical_warning
        self.errors.entries = deque(errors, maxlen=ERROR_ENTRIES)
        self.errors.count = saved.error_entries
        self.changed = set(changed)
