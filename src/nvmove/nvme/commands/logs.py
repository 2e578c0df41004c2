"""Get Log Page (Base 5.16)."""

from __future__ import annotations

from collections.abc import Callable

from nvmove.nvme.commands import effects
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.errors import CommandError
from nvmove.nvme.namespace import check_nsid
from nvmove.nvme.spec import (
    ALL_NAMESPACES,
    CHANGED_NAMESPACES_MAX,
    FIRMWARE_SLOT_SIZE,
    LOG_OFFSET_IS_INDEX,
    LOG_RETAIN_EVENT,
    LOG_SUPPORTED,
    Log,
    Status,
)

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
    csi = command.cdw14 >> 24
    if csi not in effects.IO_EFFECTS:
        raise CommandError(Status.INVALID_FIELD)
    return effects.commands_page(csi, controller.doorbells.offered)


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
