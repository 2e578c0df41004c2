"""The NVM command set (NVM 3): what the guest asks becomes requests to the back end.

A handler checks everything before it starts anything, so an error the guest made never reaches the disk. It runs
without the controller's lock and takes it only to count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nvmove.block.backend import Operation
from nvmove.nvme.commands import failures
from nvmove.nvme.commands.batch import Batch, Failure, Part
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.errors import CommandError
from nvmove.nvme.namespace import Namespace
from nvmove.nvme.seams import DmaError, Transfer
from nvmove.nvme.spec import (
    COPY_RANGE,
    DEAC,
    DSM_DEALLOCATE,
    DSM_RANGE,
    FUA,
    PAGE,
    Nvm,
    Status,
)

log = logging.getLogger(__name__)

VERIFY_CHUNK = 1 << 20
"""Verify reads into one buffer of so many bytes, whatever the length."""

# --- running -------------------------------------------------------------------------------------------------------


def _start(
    controller: Controller,
    command: Command,
    parts: list[Part],
    succeeded: Callable[[], None],
    transfer: Transfer | None = None,
    commit: bool = False,
    may_hold: bool = True,
) -> None:
    """Run `parts`; then give `transfer` back and call `succeeded`, or do what the error policy says.

    When an error was ignored the command succeeds as far as the guest can tell, and nothing more is done for it.
    """
    ignored: list[Failure] = []

    def ignores(failure: Failure) -> bool:
        if command.stale or not failures.ignores(controller, failure):
            return False
        ignored.append(failure)
        return True

    def done(failure: Failure | None) -> None:
        try:
            if transfer is not None:
                transfer.finish(commit=commit and failure is None)
            if command.stale:
                command.complete()
            elif failure is not None:
                failures.backend_failed(controller, command, failure, may_hold=may_hold)
            elif ignored:
                command.complete()
            else:
                succeeded()
        except DmaError:
            command.complete(Status.DATA_TRANSFER_ERROR)
        except Exception:
            log.exception("%r failed inside nvmove", command)
            command.complete(Status.INTERNAL_ERROR, dnr=False)

    def count(part: Part, errno: int) -> None:
        with controller.lock:
            counters = controller.namespaces.of(part.backend).counters
            if errno:
                counters.fail(part.operation)
            else:
                counters.add(part.operation, 1, part.length)

    Batch(parts, done, is_stale=lambda: command.stale, ignores=ignores, count=count).start()


def _start_lba(command: Command) -> int:
    return int(command.cdw11) << 32 | int(command.cdw10)


def _block_range(namespace: Namespace, command: Command) -> tuple[int, int]:
    """Offset and length in bytes of a command with SLBA in dwords 10 and 11, 0's based NLB in dword 12."""
    return namespace.byte_range(_start_lba(command), (command.cdw12 & 0xFFFF) + 1)


def _check_length(controller: Controller, namespace: Namespace, command: Command) -> None:
    """MDTS comes before the range: a host that exceeds both is told of what it can mend."""
    if (command.cdw12 & 0xFFFF) + 1 << namespace.block_shift > controller.max_transfer:
        raise CommandError(Status.INVALID_FIELD)


def _check_writable(namespace: Namespace) -> None:
    if namespace.read_only:
        raise CommandError(Status.WRITE_PROTECTED)


def _is_durable(controller: Controller, command: Command) -> bool:
    """Whether a write must be on stable storage before it completes: FUA, or the write cache is off."""
    return bool(command.cdw12 & FUA) or not controller.features.volatile_write_cache


def _count(controller: Controller, read: int | None = None, written: int | None = None) -> None:
    with controller.lock:
        if read is not None:
            controller.logs.smart.count_read(read)
        if written is not None:
            controller.logs.smart.count_written(written)


# --- the commands ----------------------------------------------------------------------------------------------------


def _read(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.4."""
    _check_length(controller, namespace, command)
    offset, length = _block_range(namespace, command)
    transfer = command.transfer(length, to_guest=True)

    def succeeded() -> None:
        _count(controller, read=length)
        command.complete()

    part = Part(namespace.backend, Operation.READ, offset, length, tuple(transfer.buffers))
    _start(controller, command, [part], succeeded, transfer, commit=True)


def _write(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.6."""
    _check_length(controller, namespace, command)
    offset, length = _block_range(namespace, command)
    _check_writable(namespace)
    transfer = command.transfer(length, to_guest=False)

    def succeeded() -> None:
        _count(controller, written=length)
        command.complete()

    fua = _is_durable(controller, command)
    part = Part(namespace.backend, Operation.WRITE, offset, length, tuple(transfer.buffers), fua=fua)
    _start(controller, command, [part], succeeded, transfer)


def _flush_one(controller: Controller, namespace: Namespace, command: Command) -> None:
    flush(controller, [namespace], command)


def flush(controller: Controller, namespaces: list[Namespace], command: Command) -> None:
    """Base 7.1. A disk that cannot be written has nothing to flush."""
    parts = [Part(namespace.backend, Operation.FLUSH) for namespace in namespaces if not namespace.read_only]
    _start(controller, command, parts, command.complete)


def _write_zeroes(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.8. Nothing is transferred, so MDTS does not count."""
    offset, length = _block_range(namespace, command)
    _check_writable(namespace)
    part = Part(
        namespace.backend,
        Operation.WRITE_ZEROES,
        offset,
        length,
        fua=_is_durable(controller, command),
        may_unmap=bool(command.cdw12 & DEAC),
    )
    _start(controller, command, [part], command.complete)


def _dataset_management(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.3. Every range is checked before the first is deallocated; the other attributes are hints."""
    count = (command.cdw10 & 0xFF) + 1
    ranges = DSM_RANGE.iter_unpack(command.read_data(count * DSM_RANGE.size))
    if not command.cdw11 & DSM_DEALLOCATE:
        command.complete()
        return
    _check_writable(namespace)
    parts = [
        Part(namespace.backend, Operation.DISCARD, *namespace.byte_range(lba, blocks)) for _, blocks, lba in ranges
    ]
    _start(controller, command, [part for part in parts if part.length], command.complete)


def _compare(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.1: the blocks are read, then held against the host's."""
    _check_length(controller, namespace, command)
    offset, length = _block_range(namespace, command)
    expected = command.read_data(length)
    found = bytearray(length)

    def succeeded() -> None:
        _count(controller, read=length)
        command.complete(Status.SUCCESS if found == expected else Status.COMPARE_FAILURE)

    part = Part(namespace.backend, Operation.READ, offset, length, (memoryview(found),))
    _start(controller, command, [part], succeeded)


def _verify(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.5: the blocks are read, and forgotten."""
    offset, length = _block_range(namespace, command)
    if controller.config.vsl and length > PAGE << controller.config.vsl:
        raise CommandError(Status.INVALID_FIELD)
    scratch = memoryview(bytearray(min(length, VERIFY_CHUNK)))
    parts = []
    for position in range(0, length, VERIFY_CHUNK):
        size = min(VERIFY_CHUNK, length - position)
        parts.append(Part(namespace.backend, Operation.READ, offset + position, size, (scratch[:size],)))

    def succeeded() -> None:
        with controller.lock:
            controller.logs.smart.bytes_read += length
        command.complete()

    _start(controller, command, parts, succeeded)


def _copy(controller: Controller, namespace: Namespace, command: Command) -> None:
    """NVM 3.2.2, descriptor format 0: all sources are read before the destination is written."""
    count = (command.cdw12 & 0xFF) + 1
    if command.cdw12 >> 8 & 0xF:
        raise CommandError(Status.INVALID_FIELD)
    config = namespace.config
    if count > config.msrc + 1:
        raise CommandError(Status.COMMAND_SIZE_LIMIT_EXCEEDED)
    _check_writable(namespace)
    sources = [(lba, last + 1) for lba, last in COPY_RANGE.iter_unpack(command.read_data(count * COPY_RANGE.size))]
    total = sum(blocks for _, blocks in sources)
    if max(blocks for _, blocks in sources) > config.mssrl or total > config.mcl:
        raise CommandError(Status.COMMAND_SIZE_LIMIT_EXCEEDED)
    target, length = namespace.byte_range(_start_lba(command), total)
    data = memoryview(bytearray(length))
    parts = []
    position = 0
    for lba, blocks in sources:
        offset, size = namespace.byte_range(lba, blocks)
        parts.append(Part(namespace.backend, Operation.READ, offset, size, (data[position : position + size],)))
        position += size
    fua = _is_durable(controller, command)
    overlaps = any(part.offset < target + length and target < part.offset + part.length for part in parts)

    def write() -> None:
        part = Part(namespace.backend, Operation.WRITE, target, length, (data,), fua=fua)
        _start(controller, command, [part], command.complete, may_hold=not overlaps)

    _start(controller, command, parts, write)


HANDLERS: dict[int, Callable[[Controller, Namespace, Command], None]] = {
    Nvm.FLUSH: _flush_one,
    Nvm.WRITE: _write,
    Nvm.READ: _read,
    Nvm.COMPARE: _compare,
    Nvm.WRITE_ZEROES: _write_zeroes,
    Nvm.DATASET_MANAGEMENT: _dataset_management,
    Nvm.VERIFY: _verify,
    Nvm.COPY: _copy,
}
