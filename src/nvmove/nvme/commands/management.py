"""What changes namespaces: Namespace Attachment (Base 5.19), Format NVM (Base 5.14), and a disk that was resized."""

from __future__ import annotations

from collections.abc import Iterator

from nvmove.block.backend import Operation
from nvmove.nvme.commands import failures, notices
from nvmove.nvme.commands.batch import Batch, Failure, Part
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.errors import CommandError
from nvmove.nvme.namespace import Namespace, check_nsid, selected
from nvmove.nvme.spec import (
    ATTACH,
    CONTROLLER_LIST,
    DETACH,
    FORMAT_SES_USER_DATA_ERASE,
    Status,
)

ERASE_CHUNK = 256 << 20
"""A format erases in requests of so many bytes: the most that a Write Zeroes of the guest could ask for."""


def namespace_attachment(controller: Controller, command: Command) -> None:
    """Attach a namespace to this controller or detach it from it; there is no other controller."""
    check_nsid(command.nsid)
    namespace = controller.namespaces.get(command.nsid)
    select = command.cdw10 & 0xF
    if namespace is None or select not in {ATTACH, DETACH}:
        raise CommandError(Status.INVALID_FIELD)
    count, *cntlids = CONTROLLER_LIST.unpack(command.read_data(CONTROLLER_LIST.size))
    if not 1 <= count <= len(cntlids) or any(cntlid != controller.config.cntlid for cntlid in cntlids[:count]):
        raise CommandError(Status.CONTROLLER_LIST_INVALID)
    with controller.leases.suspended(), controller.lock:
        if select == ATTACH and namespace.attached:
            raise CommandError(Status.NAMESPACE_ALREADY_ATTACHED)
        if select == DETACH and not namespace.attached:
            raise CommandError(Status.NAMESPACE_NOT_ATTACHED)
        namespace.attached = select == ATTACH
    notices.namespace_changed(controller, namespace.nsid)
    command.complete()


def format_nvm(controller: Controller, command: Command) -> None:
    """Erase namespaces and give them another LBA format; until that is done their I/O is refused.

    The erased blocks read as zeroes, whether user data erase was asked for or not.
    """
    cdw10 = command.cdw10
    index = cdw10 & 0xF | (cdw10 >> 12 & 3) << 4
    chosen = selected(controller.namespaces, command.nsid)
    if (cdw10 >> 9 & 7) > FORMAT_SES_USER_DATA_ERASE:
        raise CommandError(Status.INVALID_FIELD)
    with_protection_or_metadata = cdw10 & 0x1F0
    for namespace in chosen:
        if with_protection_or_metadata or index >= len(namespace.formats) or not namespace.formats[index].shift:
            raise CommandError(Status.INVALID_FORMAT)
        if namespace.read_only:
            raise CommandError(Status.WRITE_PROTECTED)
    with controller.leases.suspended(), controller.lock:
        if any(namespace.formatting for namespace in chosen):
            raise CommandError(Status.FORMAT_IN_PROGRESS, dnr=False)
        for namespace in chosen:
            namespace.formatting = True

    def done(failure: Failure | None) -> None:
        changed = []
        with controller.lock:
            was_whole = failure is None and not command.stale
            for namespace in chosen:
                namespace.formatting = False
                if was_whole and namespace.format_index != index:
                    namespace.format_index = index
                    changed.append(namespace.nsid)
        for nsid in changed:
            notices.namespace_changed(controller, nsid)
        if failure is None:
            command.complete()
        else:
            failures.backend_failed(controller, command, failure)

    Batch(
        (part for namespace in chosen for part in _erasing(namespace)),
        done,
        depth=1,
        is_stale=lambda: command.stale,
        ignores=lambda failure: failures.ignores(controller, failure),
    ).start()


def _erasing(namespace: Namespace) -> Iterator[Part]:
    size = namespace.backend.size & ~511
    for offset in range(0, size, ERASE_CHUNK):
        yield Part(
            namespace.backend,
            Operation.WRITE_ZEROES,
            offset,
            min(ERASE_CHUNK, size - offset),
            may_unmap=True,
        )


def resized(controller: Controller, nsid: int) -> bool:
    """Look at a disk's size again after it was resized; return whether it changed. May wait for the back end."""
    namespace = controller.namespaces.get(nsid)
    if namespace is None:
        return False
    before = namespace.blocks
    namespace.backend.refresh_size()
    if namespace.blocks == before:
        return False
    notices.namespace_changed(controller, nsid)
    return True
