"""werror and rerror: a pure decision."""

from __future__ import annotations

import errno

import pytest

from nvmove.block.policy import Action, DriveErrors, ErrorPolicy, ErrorReport, decide


@pytest.mark.parametrize(
    ("policy", "full", "broken"),
    [
        (ErrorPolicy.REPORT, Action.REPORT, Action.REPORT),
        (ErrorPolicy.IGNORE, Action.IGNORE, Action.IGNORE),
        (ErrorPolicy.ENOSPC, Action.STOP, Action.REPORT),
        (ErrorPolicy.STOP, Action.STOP, Action.STOP),
    ],
)
def test_a_policy_decides_by_errno(policy: ErrorPolicy, full: Action, broken: Action) -> None:
    assert decide(policy, errno.ENOSPC) is full
    assert decide(policy, errno.EDQUOT) is full
    for error in (errno.EIO, errno.ENOTCONN, errno.EPERM, errno.EFBIG):
        assert decide(policy, error) is broken


def test_the_defaults_are_those_of_qemu() -> None:
    assert DriveErrors() == DriveErrors(ErrorPolicy.ENOSPC, ErrorPolicy.REPORT)


def test_reads_follow_rerror_and_all_else_werror() -> None:
    errors = DriveErrors(werror=ErrorPolicy.IGNORE, rerror=ErrorPolicy.STOP)
    assert errors.decide(is_read=True, errno=errno.EIO) is Action.STOP
    assert errors.decide(is_read=False, errno=errno.EIO) is Action.IGNORE


def test_a_policy_changes_while_it_is_used() -> None:
    errors = DriveErrors()
    assert errors.decide(is_read=False, errno=errno.EIO) is Action.REPORT
    errors.werror = ErrorPolicy.STOP
    assert errors.decide(is_read=False, errno=errno.EIO) is Action.STOP


@pytest.mark.parametrize(("error", "no_space"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_report_says_whether_room_is_missing(error: int, no_space: bool) -> None:
    assert ErrorReport("d0", is_read=False, action=Action.STOP, errno=error).is_no_space is no_space
