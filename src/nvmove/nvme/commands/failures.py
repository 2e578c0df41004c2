"""What becomes of a command that the back end failed: told to the guest, ignored, or held (design: error-policy.md).

A held command is tried again as a whole. That is right for every command: what a first try did, the second does again,
and the guest was told of neither. The one exception is a Copy whose source overlaps its destination: it may have
changed what it would read; its write is not held but reported.
"""

from __future__ import annotations

import errno as errnos

from nvmove.block.backend import Operation
from nvmove.block.policy import NO_SPACE, Action, DriveErrors, ErrorPolicy, ErrorReport
from nvmove.nvme import events
from nvmove.nvme.commands import notices
from nvmove.nvme.commands.batch import Failure
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.namespace import Namespace
from nvmove.nvme.spec import STATUS_DNR, STATUS_MORE, Status

_MEDIA = {
    errnos.EIO, errnos.ENXIO, errnos.ENODEV, errnos.ENODATA, errnos.EILSEQ, errnos.EBADMSG, errnos.EREMOTEIO,
    errnos.ENOMEDIUM, errnos.ETIMEDOUT, errnos.ENOLINK,
}  # fmt: skip
"""The medium failed, or the way to it."""
_FULL = NO_SPACE | {errnos.EFBIG}
_HANDED_OVER = {errnos.EPERM, errnos.EROFS}
"""What a back end answers when the image was inactivated, to be used on another host from then on."""
_REPORT = DriveErrors(ErrorPolicy.REPORT, ErrorPolicy.REPORT)
"""The policies of a drive that has none."""


def status_of(operation: Operation, errno: int) -> Status:
    """Return the status that tells the guest of `errno`."""
    if errno in _FULL and not operation.is_read:
        return Status.CAPACITY_EXCEEDED
    if errno == errnos.EROFS and not operation.is_read:
        return Status.WRITE_PROTECTED
    if errno in _MEDIA:
        return Status.UNRECOVERED_READ_ERROR if operation.is_read else Status.WRITE_FAULT
    return Status.INTERNAL_ERROR


def ignores(controller: Controller, failure: Failure) -> bool:
    """Return whether the drive's policy ignores `failure`, which is announced then: the command goes on without it."""
    if _is_handed_over(controller, failure) or _action(controller, failure) is not Action.IGNORE:
        return False
    _announce(controller, failure, Action.IGNORE)
    return True


def backend_failed(controller: Controller, command: Command, failure: Failure, *, may_hold: bool = True) -> None:
    """End `command`, of which a request failed, or hold it; nothing of it is under way, and it holds no memory.

    A request that was in flight when the device was paused, and found its image handed over, met no error: whatever the
    policy, its command is held for the side that runs next. `may_hold` is off for what must not be tried twice.
    """
    if may_hold and _is_handed_over(controller, failure):
        controller.hold(command, lambda: None)
        return
    action = _action(controller, failure)
    if action is Action.STOP and may_hold:
        controller.hold(command, lambda: _announce(controller, failure, Action.STOP))
    elif action is Action.IGNORE:
        _announce(controller, failure, action)
        command.complete()
    else:
        _announce(controller, failure, Action.REPORT)
        _report(controller, command, failure)


def _is_handed_over(controller: Controller, failure: Failure) -> bool:
    return failure.errno in _HANDED_OVER and controller.paused


def _action(controller: Controller, failure: Failure) -> Action:
    policies = controller.errors.get(_namespace(controller, failure).config.drive, _REPORT)
    return policies.decide(failure.operation.is_read, failure.errno)


def _announce(controller: Controller, failure: Failure, action: Action) -> None:
    drive = _namespace(controller, failure).config.drive
    controller.on_error(ErrorReport(drive, failure.operation.is_read, action, failure.errno))


def _namespace(controller: Controller, failure: Failure) -> Namespace:
    return controller.namespaces.of(failure.backend)


def _report(controller: Controller, command: Command, failure: Failure) -> None:
    """Tell the guest, and leave the reason in the Error Information log (More); it may retry what can get better."""
    status = status_of(failure.operation, failure.errno)
    dnr = status is Status.WRITE_PROTECTED
    lba = failure.offset >> _namespace(controller, failure).block_shift
    with controller.lock:
        controller.logs.errors.add(command, status | STATUS_MORE | STATUS_DNR * dnr, lba=lba)
        if status in {Status.UNRECOVERED_READ_ERROR, Status.WRITE_FAULT}:
            controller.logs.smart.media_errors += 1
    if status == Status.INTERNAL_ERROR:
        notices.notify(controller, events.TRANSIENT_INTERNAL_ERROR)
    command.complete(status, dnr=dnr, more=True)
