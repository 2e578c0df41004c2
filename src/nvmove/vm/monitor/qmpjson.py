"""JSON as QEMU's monitor reads and writes it: a stream of values without separators, errors with their position.

QEMU takes a value as soon as its brackets balance, knows strings in single quotes, and answers what it cannot read
with "LINE:COLUMN: JSON parse error, …". After a byte that starts no token it skips to the next structural or control
character; after a token in the wrong place it skips to the end of the value. All of it was compared with QEMU 11.1.3.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_TOKEN_BYTES = 64 << 20
MAX_NESTING = 1024
# Above this the recursive reader of Python's json module is not used.
FAST_NESTING = 200

_WHITESPACE = b" \t\r\n"
_PUNCTUATION = b"{}[]:,"
_PLAIN_STRING = {quote: re.compile(rb"[^\x00-\x1f\xfe\xff\\" + quote + rb"]+") for quote in (b'"', b"'")}
_NUMBER_PREFIX = re.compile(rb"-?(?:(?:0|[1-9][0-9]*)(?:(?:\.[0-9]+)?[eE][+-]?[0-9]*|\.[0-9]*)?)?")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "/": "/"}
_ESCAPE = re.compile(r"\\(u(?P<hex>.{0,4})|.)", re.DOTALL)
_UNICODE = re.compile(r"\\\\|\\u([0-9a-f]{4})")
_KEYWORDS = {b"true": True, b"false": False, b"null": None}


@dataclass(frozen=True, slots=True)
class Value:
    """A whole JSON value."""

    value: Any


@dataclass(frozen=True, slots=True)
class ParseError:
    """What is answered to input that is no JSON; `message` is QEMU's description."""

    message: str


class _Malformed(Exception):
    """A token that the grammar does not take, or whose contents are wrong."""


def _number(text: str) -> int | float:
    """Return the number as QEMU keeps it: 64 bits, signed or unsigned, else a double."""
    if not any(character in text for character in ".eE") and len(text) < 32:
        value = int(text)
        if -(2**63) <= value < 2**64:
            return value
    number = float(text)
    if not math.isfinite(number):
        raise _Malformed(f"number out of range '{text[:32]}'")
    return number


def _unescape(token: bytes) -> str:
    """Return the contents of a quoted string; raise _Malformed."""
    try:
        text = token[1:-1].decode()
    except UnicodeDecodeError:
        raise _Malformed("invalid UTF-8 sequence in string") from None
    if "\\" not in text:
        return text
    parts: list[str] = []
    position = 0
    high = ""
    quote = token[:1].decode()
    for match in _ESCAPE.finditer(text):
        if high and (match.start() != position or match["hex"] is None):
            raise _Malformed(f"{high} is not a valid Unicode character")
        parts.append(text[position : match.start()])
        position = match.end()
        digits = match["hex"]
        if digits is None:
            if match[1] not in _ESCAPES:
                raise _Malformed("invalid escape sequence in string")
            parts.append(_ESCAPES[match[1]])
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{4}", digits):
            raise _Malformed(f"{(match[0] + quote)[:6]} is not a valid Unicode character")
        code = int(digits, 16)
        if high:
            if not 0xDC00 <= code < 0xE000:
                raise _Malformed(f"{high} is not a valid Unicode character")
            lead = int(high[2:], 16)
            parts.append(chr(0x10000 + ((lead - 0xD800) << 10) + (code - 0xDC00)))
            high = ""
        elif 0xD800 <= code < 0xDC00:
            high = match[0]
        elif 0xDC00 <= code < 0xE000:
            raise _Malformed(f"{match[0]} is not a valid Unicode character")
        else:
            parts.append(chr(code))
    if high:
        raise _Malformed(f"{high} is not a valid Unicode character")
    parts.append(text[position:])
    return "".join(parts)


# What the grammar waits for → what it says about a token that is something else.
_EXPECTED = {
    "value": "expecting value",
    "value or ]": "expecting value",
    "key": "expecting key",
    "key or }": "expecting key",
    ":": "expecting ':'",
    ", or }": "expected ',' or '}'",
    ", or ]": "expected ',' or ']'",
}


class _Grammar:
    """A push parser: tokens in, one value out. No recursion, so nesting costs no stack."""

    def __init__(self) -> None:
        self._expect = "value"
        self._containers: list[tuple[Any, str | None]] = []
        self._container: Any = None
        self._key: str | None = None

    def push(self, kind: str, token: bytes) -> Value | None:
        """Take a token; return the value that it completes. Raises _Malformed."""
        expect = self._expect
        if kind == "keyword" and token not in _KEYWORDS and expect.startswith("value"):
            raise _Malformed(f"invalid keyword '{token.decode()}'")
        if expect.startswith("key") and kind == "string":
            self._key, self._expect = _unescape(token), ":"
        elif expect == ":" and token == b":":
            self._expect = "value"
        elif expect == ", or }" and token == b",":
            self._expect = "key"
        elif expect == ", or ]" and token == b",":
            self._expect = "value"
        elif (expect in {"key or }", ", or }"} and token == b"}") or (
            expect in {"value or ]", ", or ]"} and token == b"]"
        ):
            closed = self._container
            self._container, self._key = self._containers.pop()
            return self._add(closed)
        elif expect.startswith("value") and token == b"{":
            self._open({}, "key or }")
        elif expect.startswith("value") and token == b"[":
            self._open([], "value or ]")
        elif expect.startswith("value") and kind != "punctuation":
            return self._add(self._scalar(kind, token))
        else:
            raise _Malformed(_EXPECTED[expect])
        return None

    def _open(self, container: Any, expect: str) -> None:
        self._containers.append((self._container, self._key))
        self._container, self._key, self._expect = container, None, expect

    def _scalar(self, kind: str, token: bytes) -> Any:
        if kind == "string":
            return _unescape(token)
        return _KEYWORDS[token] if kind == "keyword" else _number(token.decode())

    def _add(self, value: Any) -> Value | None:
        container = self._container
        if container is None:
            return Value(value)
        if isinstance(container, list):
            container.append(value)
            self._expect = ", or ]"
            return None
        if self._key in container:
            raise _Malformed("duplicate key")
        container[self._key] = value
        self._expect = ", or }"
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError
    return result


def _refuse(_text: str) -> Any:
    raise ValueError


class Reader:
    """Bytes in, values and errors out; keeps what is not whole yet."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._line, self._column = 1, 0
        self._grammar = _Grammar()
        self._depth = {b"{": 0, b"[": 0}
        self._failed = False
        self._recovering = False
        # Whether the next character has ended a number, keyword or recovery: QEMU then counts a column too many for it.
        self._looked_at = False

    def feed(self, data: bytes) -> Iterator[Value | ParseError]:
        """Yield what `data` completes, in order."""
        if not self._pending and self._between_values():
            for line in data.splitlines(keepends=True) if data.count(b"\n") else [data]:
                quick = None if self._pending or not self._between_values() else self._quick(line)
                if quick is not None:
                    yield quick
                else:
                    yield from self._scan(line)
            return
        yield from self._scan(data)

    def _between_values(self) -> bool:
        return not (self._recovering or self._failed or any(self._depth.values()))

    def _quick(self, line: bytes) -> Value | None:
        """Read a line that is one ordinary object, with Python's own reader; None when it is anything else."""
        if not line.endswith(b"}\n") or b"\\u" in line or line.count(b"{") + line.count(b"[") > FAST_NESTING:
            return None
        try:
            value = json.loads(
                line.decode(),
                object_pairs_hook=_unique,
                parse_constant=_refuse,
                parse_int=_number,
                parse_float=_number,
            )
        except (ValueError, _Malformed):
            return None
        self._line, self._column, self._looked_at = self._line + 1, 0, False
        return Value(value)

    def _scan(self, data: bytes) -> Iterator[Value | ParseError]:
        self._pending += data
        start = 0
        while start < len(self._pending):
            if self._recovering:
                start = self._recover(start)
                continue
            first = self._pending[start : start + 1]
            if first in _WHITESPACE:
                self._advance(start, start + 1)
                self._looked_at = False
                start += 1
                continue
            end, kind = self._token(start)
            if end is None:
                if len(self._pending) - start > MAX_TOKEN_BYTES:
                    yield self._limit("JSON token size limit exceeded")
                    start = len(self._pending)
                break
            token = bytes(self._pending[start:end])
            if kind == "stray":
                shown = token.partition(b"\0")[0].decode(errors="replace")
                yield self._error(f"stray '{shown}'")
                self._advance(start, end)
                self._reset()
                self._recovering = True
                self._looked_at = False
            else:
                result = self._push(kind, token)
                self._advance(start, end)
                self._looked_at = kind in {"number", "keyword"}
                if result is not None:
                    yield result
            start = end
        del self._pending[:start]

    def _recover(self, start: int) -> int:
        """Skip to where a token may start again; return where."""
        match = re.compile(rb"[\x00-\x1f\xfe\xff{}\[\]:,]").search(self._pending, start)
        end = match.start() if match else len(self._pending)
        self._advance(start, end)
        if match:
            self._recovering = False
            self._looked_at = True
        return end

    def _advance(self, start: int, end: int) -> None:
        newline = self._pending.rfind(b"\n", start, end)
        if newline >= 0:
            self._line += self._pending.count(b"\n", start, end)
            self._column = end - newline - 1
        else:
            self._column += end - start

    def _token(self, start: int) -> tuple[int | None, str]:
        """Return the end and the kind of the token at `start`; None as its end when there is more to come."""
        pending = self._pending
        first = pending[start : start + 1]
        if first in _PUNCTUATION:
            return start + 1, "punctuation"
        if first in b"\"'":
            return self._string(start, bytes(first))
        if first in b"-0123456789":
            return self._digits(start)
        if first.isalpha() and first.islower():
            match = re.compile(rb"[a-z]+").match(pending, start)
            assert match is not None
            return (None if match.end() == len(pending) else match.end()), "keyword"
        return start + 1, "stray"

    def _string(self, start: int, quote: bytes) -> tuple[int | None, str]:
        pending, position = self._pending, start + 1
        while position < len(pending):
            match = _PLAIN_STRING[quote].match(pending, position)
            if match:
                position = match.end()
                continue
            byte = pending[position : position + 1]
            if byte == quote:
                return position + 1, "string"
            if byte != b"\\":
                return position + 1, "stray"
            if position + 1 == len(pending):
                break
            if pending[position + 1] < 0x20 or pending[position + 1] > 0xFD:
                return position + 2, "stray"
            position += 2
        return None, "string"

    def _digits(self, start: int) -> tuple[int | None, str]:
        pending = self._pending
        match = _NUMBER_PREFIX.match(pending, start)
        assert match is not None
        end = match.end()
        if end == len(pending):
            return None, "number"
        whole = _NUMBER.fullmatch(match[0])
        if whole is None or pending[end : end + 1].isdigit():
            return end + 1, "stray"
        return end, "number"

    def _push(self, kind: str, token: bytes) -> Value | ParseError | None:
        depth = self._depth
        if kind == "punctuation" and token in b"{[":
            depth[token] += 1
        elif token == b"}":
            depth[b"{"] -= 1
        elif token == b"]":
            depth[b"["] -= 1
        result: Value | ParseError | None = None
        if not self._failed:
            if sum(depth.values()) > MAX_NESTING:
                result = ParseError("JSON nesting depth limit exceeded")
                self._failed = True
            else:
                try:
                    result = self._grammar.push(kind, token)
                except _Malformed as malformed:
                    result = self._error(str(malformed))
                    self._failed = True
        if min(depth.values()) < 0 or not any(depth.values()):
            self._reset()
        return result

    def _error(self, what: str) -> ParseError:
        return ParseError(f"{self._line}:{self._column + 1 + self._looked_at}: JSON parse error, {what}")

    def _limit(self, message: str) -> ParseError:
        self._reset()
        self._recovering = True
        return ParseError(message)

    def _reset(self) -> None:
        self._grammar = _Grammar()
        self._depth = {b"{": 0, b"[": 0}
        self._failed = False


def encode(message: Any, pretty: bool = False) -> bytes:
    """Return `message` as a monitor sends it: one line, or QEMU's indented form; both end in CR LF."""
    text = _pretty(message, 0) if pretty else json.dumps(message)
    if "\\u" in text:  # QEMU writes these in upper case
        text = _UNICODE.sub(lambda found: found[0] if found[1] is None else f"\\u{found[1].upper()}", text)
    return text.encode().replace(b"\n", b"\r\n") + b"\r\n"


def _pretty(value: Any, depth: int) -> str:
    """Indent by four; QEMU puts the closing bracket of an empty container on its own line too."""
    inner, outer = "    " * (depth + 1), "    " * depth
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(key)}: {_pretty(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + ("\n" if items else "") + outer + "}"
    if isinstance(value, list):
        items = [inner + _pretty(item, depth + 1) for item in value]
        return "[\n" + ",\n".join(items) + ("\n" if items else "") + outer + "]"
    return json.dumps(value)
