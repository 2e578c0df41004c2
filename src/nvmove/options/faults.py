"""`--fault` and the arguments of QMP's `nvmove-fault-add`: the same names and values."""

from __future__ import annotations

import argparse
import errno
import re
from collections.abc import Collection
from typing import Any

from nvmove.block.backend import Operation
from nvmove.block.fault import ActiveFault, FaultRule
from nvmove.options.syntax import Option, parse

_KEYS = frozenset({"op", "lba", "errno", "count", "delay", "drive"})
_OPERATIONS = {operation.value: operation for operation in Operation} | {"any": None}
_LBAS = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)(?:-(0[xX][0-9a-fA-F]+|[0-9]+))?\Z")
_DELAY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)\Z")
_MICROSECONDS = {"us": 1, "ms": 1_000, "s": 1_000_000}
_LONGEST_DELAY = 24 * 3600 * 1_000_000


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--fault`."""
    parser.add_argument(
        "--fault",
        metavar="RULE",
        action="append",
        default=[],
        help="let requests fail or come late: op=write,lba=1000-2000,errno=ENOSPC,count=3,delay=50ms,drive=d0",
    )


def parse_fault(text: str, drives: Collection[str]) -> FaultRule:
    """Read the argument of a `--fault`; `drives` are the names that may be in it. Raises OptionError."""
    return read_fault(parse("--fault", text), drives)


def read_fault(option: Option, drives: Collection[str]) -> FaultRule:
    """Return the rule that `option` describes; raises OptionError."""
    option.unknown(_KEYS, "Parameter '{}' is unexpected" if option.is_json else "Invalid parameter '{}'")
    rule = FaultRule(
        operation=_operation(option),
        lbas=_lbas(option),
        drive=_drive(option, drives),
        errno=_errno(option),
        delay=_delay(option),
        count=_count(option),
    )
    if not rule.errno and not rule.delay:
        raise option.error("needs errno= (what fails) or delay= (what comes late)")
    if rule.operation is Operation.FLUSH and rule.lbas is not None:
        raise option.error("a flush has no blocks: op=flush goes without lba=")
    return rule


def show_fault(fault: ActiveFault) -> dict[str, Any]:
    """Return a rule in use as `nvmove-fault-list` shows it: as it could be given, its id, and its hits."""
    rule = fault.rule
    shown: dict[str, Any] = {"id": fault.id, "op": rule.operation.value if rule.operation is not None else "any"}
    if rule.lbas is not None:
        shown["lba"] = f"{rule.lbas[0]}-{rule.lbas[1]}"
    if rule.errno:
        shown["errno"] = errno.errorcode[rule.errno]
    if rule.delay:
        unit = next(unit for unit in ("s", "ms", "us") if rule.delay % _MICROSECONDS[unit] == 0)
        shown["delay"] = f"{rule.delay // _MICROSECONDS[unit]}{unit}"
    if rule.count is not None:
        shown["count"] = rule.count
    if rule.drive:
        shown["drive"] = rule.drive
    return {**shown, "hits": fault.hits}


def _text(option: Option, name: str) -> str | None:
    """Return a value as text; JSON may say it as an integer."""
    value = option.values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None and name not in option.values else option.get(name)


def _operation(option: Option) -> Operation | None:
    text = _text(option, "op")
    if text is None:
        return None
    if text not in _OPERATIONS:
        raise option.error(f"op={text} is not one of {', '.join(_OPERATIONS)}")
    return _OPERATIONS[text]


def _lbas(option: Option) -> tuple[int, int] | None:
    text = _text(option, "lba")
    if text is None:
        return None
    match = _LBAS.match(text)
    if not match:
        raise option.error(f"lba={text} is neither a block (lba=1000) nor a range of blocks (lba=1000-2000)")
    first, last = (_number(part) for part in (match[1], match[2] or match[1]))
    if last < first or last >= 1 << 64:
        raise option.error(f"lba={text} is no range of blocks: the last is before the first, or beyond 64 bits")
    return first, last


def _number(text: str) -> int:
    return int(text, 16) if text[:2] in ("0x", "0X") else int(text)


def _errno(option: Option) -> int:
    name = _text(option, "errno")
    if name is None:
        return 0
    number = getattr(errno, name, None) if re.match(r"E[A-Z0-9]+\Z", name) else None
    if not isinstance(number, int):
        raise option.error(f"errno={name} is no error's name (ENOSPC, EIO, EDQUOT, ETIMEDOUT, ENOTCONN, EPERM, …)")
    return number


def _count(option: Option) -> int | None:
    text = _text(option, "count")
    if text is None:
        return None
    if not re.match(r"0*[1-9][0-9]{0,17}\Z", text):
        raise option.error(f"count={text} is no number of requests from 1")
    return int(text)


def _delay(option: Option) -> int:
    text = _text(option, "delay")
    if text is None:
        return 0
    match = _DELAY.match(text)
    delay = round(float(match[1]) * _MICROSECONDS[match[2]]) if match else 0
    if not 0 < delay <= _LONGEST_DELAY:
        raise option.error(f"delay={text} is no time up to a day with a unit, such as 50ms, 1.5s or 200us")
    return delay


def _drive(option: Option, drives: Collection[str]) -> str:
    name = _text(option, "drive") or ""
    if "drive" in option.values and name not in drives:
        raise option.error(f"no nvme device uses a drive '{name}'; there is {', '.join(sorted(drives)) or 'none'}")
    return name
