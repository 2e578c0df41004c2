"""Log pages (Base 5.16): what they hold, and Get Log Page."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from nvmove.nvme.commands import effects
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.errors import CommandError
from nvmove.nvme.namespace import check_nsid
from nvmove.nvme.spec import (
    ALL_NAMESPACES,
    CHANGED_NAMESPACES_MAX,
    COMPOSITE_TEMPERATURE,
    ERROR_ENTRIES,
    ERROR_ENTRY,
    ERROR_ENTRY_SIZE,
    FIRMWARE_SLOT_SIZE,
    LOCATION_NONE,
    LOG_OFFSET_IS_INDEX,
    LOG_RETAIN_EVENT,
    LOG_SUPPORTED,
    SMART_SIZE,
    SMART_UNIT,
    WARNING_TEMPERATURE,
    Log,
    Status,
)
from nvmove.nvme.state import saved as state

if TYPE_CHECKING:
    from nvmove.nvme.commands.command import Command
    from nvmove.nvme.commands.features import Features
    from nvmove.nvme.controller import Controller


class ErrorLog:
    """The newest `ERROR_ENTRIES` failures, and how many there were since power-on."""

    def __init__(self) -> None:
        self.entries: deque[state.ErrorEntryState] = deque(maxlen=ERROR_ENTRIES)
        """Newest first."""
        self.count = 0

    def add(self, command: Command, status: int, *, location: int = LOCATION_NONE, lba: int = 0) -> None:
        """Record that `command` fails with `status` (SCT << 8 | SC, with More and DNR)."""
        self.count += 1
        self.entries.appendleft(
            state.ErrorEntryState(
                count=self.count,
                sqid=command.sq.sqid,
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


# --- the pages by identifier: each returns all of its bytes ----------------------------------------------------------


def _supported(_controller: Controller, _command: Command) -> bytes:
    """Base 5.16.1.1."""
    return b"".join((LOG_SUPPORTED if lid in PAGES else 0).to_bytes(4, "little") for lid in range(256))


def _errors(controller: Controller, _command: Command) -> bytes:
    return controller.logs.errors.page()


def _smart(controller: Controller, command: Command) -> bytes:
    if command.nsid not in {0, ALL_NAMESPACES}:
        check_nsid(command.nsid)
        raise CommandError(Status.INVALID_FIELD)  # Identify's LPA says that there is none for each namespace
    controller.leases.refresh()
    return controller.logs.smart.page(controller.features, controller.logs.errors.count)


def _firmware_slot(controller: Controller, _command: Command) -> bytes:
    """Base 5.16.1.4: slot 1 is active and holds the only revision."""
    page = bytearray(FIRMWARE_SLOT_SIZE)
    page[0] = 1
    page[8:16] = controller.config.firmware_version.encode("ascii").ljust(8)
    return bytes(page)


def _changed_namespaces(controller: Controller, _command: Command) -> bytes:
    """Base 5.16.1.5. At most 256 namespaces exist, so the list never overflows."""
    changed = sorted(controller.logs.changed)
    return b"".join(nsid.to_bytes(4, "little") for nsid in changed).ljust(4 * CHANGED_NAMESPACES_MAX, b"\0")


def _commands_supported(controller: Controller, command: Command) -> bytes:
    if command.cdw14 >> 24 not in effects.COMMAND_SETS:
        raise CommandError(Status.INVALID_FIELD)
    return effects.commands_page(controller.doorbells.offered)


PAGES: dict[int, Callable[[Controller, Command], bytes]] = {
    Log.SUPPORTED: _supported,
    Log.ERROR_INFORMATION: _errors,
    Log.SMART: _smart,
    Log.FIRMWARE_SLOT: _firmware_slot,
    Log.CHANGED_NAMESPACES: _changed_namespaces,
    Log.COMMANDS_SUPPORTED: _commands_supported,
    Log.FEATURES_SUPPORTED: lambda _controller, _command: effects.features_page(),
    Log.MI_COMMANDS_SUPPORTED: lambda _controller, _command: effects.mi_commands_page(),
}
"""Called with the controller's lock held."""


def get_log_page(controller: Controller, command: Command) -> None:
    """Get Log Page (Base 5.16). Bytes beyond the page's end are not transferred; RAE clear acknowledges its events."""
    lid = command.cdw10 & 0xFF
    length = ((command.cdw11 & 0xFFFF) << 16 | command.cdw10 >> 16) + 1 << 2
    offset = command.cdw13 << 32 | command.cdw12
    if lid not in PAGES:
        raise CommandError(Status.INVALID_LOG_PAGE)
    if offset & 3 or command.cdw14 & LOG_OFFSET_IS_INDEX or length > controller.max_transfer:
        raise CommandError(Status.INVALID_FIELD)
    with controller.lock:
        page = PAGES[lid](controller, command)
        if offset >= len(page):
            raise CommandError(Status.INVALID_FIELD)
        reported = _take_changed(controller, command)
    try:
        command.write_data(page[offset : offset + length])
    except CommandError:
        with controller.lock:
            controller.logs.changed |= reported
        raise
    if not command.cdw10 & LOG_RETAIN_EVENT:
        with controller.lock:
            wake = controller.events.acknowledge(lid)
        if wake:
            controller.engine.kick(0)
    command.complete()


def _take_changed(controller: Controller, command: Command) -> set[int]:
    """Start a new Changed Namespace List if this reads it without RAE; return what was on the old one."""
    if command.cdw10 & (0xFF | LOG_RETAIN_EVENT) != Log.CHANGED_NAMESPACES:
        return set()
    reported, controller.logs.changed = controller.logs.changed, set()
    return reported
