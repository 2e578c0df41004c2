"""`--fault`, and the same by QMP."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from nvmove.block.backend import Operation
from nvmove.block.fault import ActiveFault, FaultRule
from nvmove.options.faults import parse_fault, read_fault, show_fault
from nvmove.options.syntax import Option, OptionError

DRIVES = ["d0", "d1"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("errno=EIO", FaultRule(errno=errno.EIO)),
        ("op=any,delay=50ms", FaultRule(delay=50_000)),
        (
            "op=write,lba=1000-2000,errno=ENOSPC,count=3,delay=1.5s,drive=d0",
            FaultRule(Operation.WRITE, (1000, 2000), "d0", errno.ENOSPC, 1_500_000, 3),
        ),
        ("op=read,lba=0x10,errno=ETIMEDOUT", FaultRule(Operation.READ, (16, 16), errno=errno.ETIMEDOUT)),
        ("op=flush,errno=ENOTCONN", FaultRule(Operation.FLUSH, errno=errno.ENOTCONN)),
        ("op=write-zeroes,delay=7us", FaultRule(Operation.WRITE_ZEROES, delay=7)),
        ("op=discard,lba=0-0xff,errno=EDQUOT", FaultRule(Operation.DISCARD, (0, 255), errno=errno.EDQUOT)),
    ],
)
def test_what_can_be_said(text: str, rule: FaultRule) -> None:
    assert parse_fault(text, DRIVES) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("op=write", "needs errno= (what fails) or delay= (what comes late)"),
        ("op=trim,errno=EIO", "op=trim is not one of read, write, flush, write-zeroes, discard, any"),
        ("op=flush,lba=1,errno=EIO", "a flush has no blocks: op=flush goes without lba="),
        ("lba=x,errno=EIO", "lba=x is neither a block (lba=1000) nor a range of blocks (lba=1000-2000)"),
        ("lba=2-1,errno=EIO", "lba=2-1 is no range of blocks: the last is before the first, or beyond 64 bits"),
        ("lba=0x10000000000000000,errno=EIO", "lba=0x10000000000000000 is no range of blocks: the last is before"),
        ("errno=5", "errno=5 is no error's name (ENOSPC, EIO, EDQUOT, ETIMEDOUT, ENOTCONN, EPERM, …)"),
        ("errno=ENOTHING", "errno=ENOTHING is no error's name"),
        ("errno=EIO,count=0", "count=0 is no number of requests from 1"),
        ("delay=50", "delay=50 is no time up to a day with a unit, such as 50ms, 1.5s or 200us"),
        ("delay=0ms", "delay=0ms is no time"),
        ("delay=86401s", "delay=86401s is no time up to a day"),
        ("errno=EIO,drive=d9", "no nvme device uses a drive 'd9'; there is d0, d1"),
        ("errno=EIO,drive=", "no nvme device uses a drive ''; there is d0, d1"),
        ("errno=EIO,chance=3", "Invalid parameter 'chance'"),
        ("errno", "errno=on is no error's name"),
    ],
)
def test_what_cannot_be_said_is_one_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_fault(text, DRIVES)
    assert str(raised.value).startswith(f"--fault {text}: {message}")
    assert "\n" not in str(raised.value)


def by_qmp(**values: Any) -> FaultRule:
    return read_fault(Option("nvmove-fault-add", values, is_json=True), DRIVES)


def test_in_qmp_numbers_may_be_integers() -> None:
    assert by_qmp(op="read", lba=7, errno="EIO", count=2) == FaultRule(Operation.READ, (7, 7), "", errno.EIO, 0, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"errno": 5}, "errno=5 is no error's name"),
        ({"errno": "EIO", "lba": [1]}, "Invalid parameter type for 'lba', expected: string"),
        ({"errno": "EIO", "lba": -1}, "lba=-1 is neither a block"),
        ({"errno": "EIO", "count": True}, "Invalid parameter type for 'count', expected: string"),
        ({"errno": None}, "Invalid parameter type for 'errno', expected: string"),
        ({"errno": "EIO", "chance": 3}, "Parameter 'chance' is unexpected"),
    ],
)
def test_in_qmp_wrong_types_are_refused_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        by_qmp(**values)
    assert str(raised.value).startswith(f"nvmove-fault-add: {message}")


@pytest.mark.parametrize(
    "text", ["op=any,errno=EIO", "op=write,lba=5-5,errno=ENOSPC,delay=1500us,count=3,drive=d1", "op=flush,delay=2s"]
)
def test_a_rule_is_shown_as_it_could_be_given(text: str) -> None:
    rule = parse_fault(text, DRIVES)
    shown = show_fault(ActiveFault(4, rule, 2))
    assert (shown.pop("id"), shown.pop("hits")) == (4, 2)
    assert ",".join(f"{key}={value}" for key, value in shown.items()) == text
    assert by_qmp(**shown) == rule
