"""QEMU's option syntax: `key=value,flag` with `,,` escapes, JSON, and how it reads booleans, integers and sizes.

Messages are QEMU 11.1's own wherever QEMU would refuse the same words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvmove.errors import UserError

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)([bBkKmMgGtTpPeE]?)\Z")
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SWITCH = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}


class OptionError(UserError):
    """Words that nvmove or QEMU cannot take: one line, which names the option and says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option's argument, read: where it came from and its values. Later values replace earlier ones, as in QEMU."""

    where: str
    """The option as the user typed it, for messages: `-device nvme,serial=1`."""
    values: Mapping[str, Any]
    """Strings, or what the JSON says when `is_json`."""
    is_json: bool = False
    flags: tuple[str, ...] = ()
    """Names that were given bare, as `name` or `noname`: QEMU calls this deprecated."""

    def error(self, message: str) -> OptionError:
        """Return the error to raise, in the form in which QEMU prints it."""
        return OptionError(f"{self.where}: {message}")

    def get(self, name: str, default: str = "") -> str:
        """Return a string value; raises OptionError when the JSON has another type there."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.error(f"Invalid parameter type for '{name}', expected: string")
        return value

    def without(self, *names: str) -> Option:
        """Return the option less some of its keys."""
        return replace(self, values={key: value for key, value in self.values.items() if key not in names})

    def unknown(self, known: frozenset[str], message: str) -> None:
        """Raise OptionError for the first key that is not `known`; `message` has a {} for its name."""
        for name in self.values:
            if name not in known:
                raise self.error(message.format(name))


def split(argument: str) -> list[str]:
    """Split at commas; a doubled comma is one comma of a value.

    >>> split("a,b=1,,2")
    ['a', 'b=1,2']
    """
    parts = [""]
    position = 0
    while position < len(argument):
        if argument[position] != ",":
            parts[-1] += argument[position]
        elif argument[position : position + 2] == ",,":
            parts[-1] += ","
            position += 1
        else:
            parts.append("")
        position += 1
    return parts


def escape(value: str) -> str:
    """Return a value as it must stand in a key=value option."""
    return value.replace(",", ",,")


def parse(name: str, argument: str, implied: str = "", json_allowed: bool = False) -> Option:
    """Read the argument of option `name` (with its dash); `implied` is the key of a first word without `=`.

    Raises OptionError for JSON that is none.
    """
    where = f"{name} {argument}"
    if json_allowed and argument.lstrip().startswith("{"):
        return Option(where, _json(where, argument), is_json=True)
    values: dict[str, str] = {}
    flags = []
    for index, part in enumerate(split(argument)):
        key, equals, value = part.partition("=")
        if "," in key:  # an escaped comma in a bare word that has an equals sign behind it
            equals = ""
        if equals:
            values[key] = value
        elif index == 0 and implied:
            values[implied] = part
        elif part:
            flags.append(part)
            values[part.removeprefix("no")] = "off" if part.startswith("no") else "on"
    option = Option(where, values, flags=tuple(flags))
    if "id" in values and not _IDENTIFIER.match(values["id"]):
        raise option.error(
            "Parameter 'id' expects an identifier (letters, digits, '-', '.', '_', starting with a letter)"
        )
    return option


def _json(where: str, argument: str) -> Mapping[str, Any]:
    try:
        values = json.loads(argument)
    except json.JSONDecodeError as error:
        raise OptionError(f"{where}: {error.lineno}:{error.colno}: JSON parse error, {error.msg}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{where}: Invalid parameter type for '', expected: object")
    return values


def unparse(values: Mapping[str, str], implied: str = "") -> str:
    """Return the key=value form of `values`; the key `implied` goes first, without its name."""
    words = [escape(values[implied])] if implied in values else []
    words += [f"{key}={escape(value)}" for key, value in values.items() if key != implied]
    return ",".join(words)


def to_json(values: Mapping[str, Any]) -> str:
    """Return the JSON form of an option."""
    return json.dumps(values, separators=(",", ":"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested JSON objects and arrays as QEMU's dotted keys: `{"file": {"driver": "x"}}` → `file.driver`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def boolean(option: Option, name: str, default: bool) -> bool:
    """Read a bool; raises OptionError."""
    value = option.values.get(name, default)
    if isinstance(value, bool):
        return value
    if option.is_json:
        raise option.error(f"Invalid parameter type for '{name}', expected: boolean")
    if value not in _SWITCH:
        raise option.error(f"Parameter '{name}' expects 'on' or 'off'")
    return _SWITCH[value]


def integer(option: Option, name: str, default: int, bits: int) -> int:
    """Read an unsigned integer of so many bits, decimal, octal (0…) or hexadecimal (0x…); raises OptionError."""
    value = option.values.get(name, default)
    if option.is_json:
        if not isinstance(value, int) or isinstance(value, bool):
            raise option.error(f"Parameter '{name}' expects uint64")
    else:
        value = _number(option, name, str(value))
    if not 0 <= value < 1 << bits:
        raise option.error(f"Parameter '{name}' expects uint{bits}_t")
    return value


def signed(option: Option, name: str, default: int, bits: int = 32) -> int:
    """Read a signed integer of so many bits; raises OptionError."""
    value = option.values.get(name, default)
    if option.is_json:
        if not isinstance(value, int) or isinstance(value, bool):
            raise option.error(f"Invalid parameter type for '{name}', expected: integer")
    else:
        value = _number(option, name, str(value))
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise option.error(f"Parameter '{name}' expects int{bits}_t")
    return value


def on_off_auto(option: Option, name: str) -> str:
    """Read an OnOffAuto; raises OptionError."""
    value = option.get(name, "auto")
    if value not in ("on", "off", "auto"):
        raise option.error(f"Parameter '{name}' does not accept value '{value}'")
    return value


def _number(option: Option, name: str, text: str) -> int:
    match = re.match(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\Z", text)
    if not match:
        raise option.error(f"Parameter '{name}' expects integer")
    digits = match[2]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    return int(match[1] + digits, base)


def size(option: Option, name: str, default: int, bits: int = 64, unit: str = "b") -> int:
    """Read a size in bytes, with an optional suffix b, k, M, G, T, P or E (`unit` without one); raises OptionError."""
    value = option.values.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        if option.is_json:
            raise option.error(f"Parameter '{name}' expects uint64")
        parsed = parse_size(str(value), unit)
        if parsed is None:
            raise option.error(f"Parameter '{name}' expects size")
        number = parsed
    if not 0 <= number < 1 << bits:
        raise option.error(f"Parameter '{name}' expects uint{bits}_t")
    return number


def parse_size(text: str, unit: str = "b") -> int | None:
    """Return the bytes that QEMU reads in `text`, or None when it is no size."""
    match = _SIZE.match(text)
    if not match:
        return None
    number, suffix = match.groups()
    if number[:2] in ("0x", "0X"):
        # hexadecimal digits swallow the suffixes b and e, as in QEMU
        return int(number, 16) * _UNITS[(suffix or unit).lower()]
    scale = _UNITS[(suffix or unit).lower()]
    whole, _, fraction = number.partition(".")
    return int(whole or "0") * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)
