"""QEMU's JSON reader: each expectation is what QEMU 11.1.3 answered to the same bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmove.vm.monitor.qmpjson import ParseError, Reader, Value, encode


def read(data: bytes, reader: Reader | None = None) -> list[Value | ParseError]:
    return list((reader or Reader()).feed(data))


def error(position: str, text: str) -> ParseError:
    return ParseError(f"{position}: JSON parse error, {text}")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"foo\n", [error("1:1", "invalid keyword 'foo'")]),
        (b"}", [error("1:1", "expecting value")]),
        (b'{"a":}', [error("1:6", "expecting value")]),
        (b"{,}", [error("1:2", "expecting key")]),
        (b'{"a" 1}', [error("1:6", "expecting ':'")]),
        (b'{"a":1 "b":2}', [error("1:8", "expected ',' or '}'")]),
        (b"{1:2}", [error("1:2", "expecting key")]),
        (b"[1 2]", [error("1:4", "expected ',' or ']'")]),
        (b"[1,]", [error("1:4", "expecting value")]),
        (b"\xff", [error("1:1", "stray '\ufffd'")]),
        (b'{"a":"\xff"}\n', [error("1:6", "stray '\"\ufffd'"), error("1:10", "expecting value")]),
        (b'{"a":"\x01"}\n', [error("1:6", "stray '\"\x01'"), error("1:10", "expecting value")]),
        (b'{"a":\x00}\n', [error("1:6", "stray ''"), error("1:8", "expecting value")]),
        (b'{"a":"\\q"}\n', [error("1:6", "invalid escape sequence in string")]),
        (b'{"a":"\\u12"}', [error("1:6", '\\u12" is not a valid Unicode character')]),
        (b'{"a":"\\ud800"}\n', [error("1:6", "\\ud800 is not a valid Unicode character")]),
        (b'{"a":"\xed\xa0\x80"}\n', [error("1:6", "invalid UTF-8 sequence in string")]),
        (b'{"a":1,"a":2}', [error("1:12", "duplicate key")]),
        (b"%d\n", [error("1:1", "stray '%'")]),
        (b'{"a":"x\n{"b":1}', [error("1:6", "stray '\"x\n'"), Value({"b": 1})]),
        (b'{"a":tru}\n[]', [error("1:6", "invalid keyword 'tru'"), Value([])]),
        (b"-\n[]", [error("1:1", "stray '-\n'"), Value([])]),
        (b'{"a":01}', [error("1:6", "stray '01'"), error("1:9", "expecting value")]),
    ],
)
def test_what_qemu_says_to_garbage(data: bytes, expected: list[Value | ParseError]) -> None:
    assert expected == read(data)
    reader = Reader()
    assert expected == [item for byte in data for item in reader.feed(bytes([byte]))]


def test_an_unclosed_array_swallows_the_values_after_it() -> None:
    reader = Reader()
    assert [error("1:16", "expected ',' or ']'")] == read(b'{"a":{"b":[1,2}}\n', reader)
    assert read(b'{"execute":"stop"}\n', reader) == []
    assert [Value(1)] == read(b"]1\n", reader)


def test_a_value_is_taken_as_soon_as_its_brackets_balance() -> None:
    reader = Reader()
    assert read(b'{"execute": "query-name"', reader) == []
    assert [Value({"execute": "query-name"}), Value({})] == read(b"}{}", reader)


def test_a_number_waits_for_what_follows_it() -> None:
    reader = Reader()
    assert read(b"1", reader) == []
    assert [Value(1)] == read(b" ", reader)


def test_strings_in_single_quotes() -> None:
    assert [Value({"a": 'é€😀"'})] == read(b"{'a':'\xc3\xa9\\u20ac\\ud83d\\ude00\"'}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ("18446744073709551616", float(2**64)),
        ("-0", 0),
        ("1e3", 1000.0),
        ("1.5", 1.5),
    ],
)
@pytest.mark.parametrize("end", ["\n", " "])
def test_numbers_are_64_bits_or_doubles(text: str, value: float, end: str) -> None:
    [item] = read(f'{{"a": {text}}}{end}'.encode())
    assert isinstance(item, Value)
    assert (value, type(value)) == (item.value["a"], type(item.value["a"]))


def test_a_number_too_large_for_a_double_is_refused() -> None:
    assert [error("1:2", "number out of range '1e999'")] == read(b"[1e999]\n")


def test_nesting_has_a_limit_and_the_rest_of_the_value_is_skipped() -> None:
    reader = Reader()
    expected: list[Value | ParseError] = [ParseError("JSON nesting depth limit exceeded")]
    assert expected == read(b"[" * 1100 + b"]" * 1100 + b"\n", reader)
    assert [Value({"a": 1})] == read(b'{"a":1}\n', reader)


def test_a_token_has_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvmove.vm.monitor.qmpjson.MAX_TOKEN_BYTES", 1000)
    reader = Reader()
    assert [ParseError("JSON token size limit exceeded")] == read(b'"' + b"x" * 1001, reader)
    assert [Value({})] == read(b"\n{}", reader)


def test_a_huge_line_in_small_pieces_is_one_value() -> None:
    text = "x" * 1_000_000
    data = json.dumps({"a": text}).encode()
    reader = Reader()
    items = [item for start in range(0, len(data), 65536) for item in reader.feed(data[start : start + 65536])]
    assert [Value({"a": text})] == items


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values, st.booleans(), st.integers(1, 9))
def test_what_is_written_is_read(value: object, pretty: bool, step: int) -> None:
    data = encode({"a": value}, pretty)
    reader = Reader()
    items = [item for start in range(0, len(data), step) for item in reader.feed(data[start : start + step])]
    assert [Value({"a": value})] == items


@given(st.binary())
def test_no_input_breaks_the_reader(data: bytes) -> None:
    read(data)


def test_the_pretty_form_is_qemus() -> None:
    assert (
        encode({"return": {}, "id": [1, []]}, pretty=True)
        == b'{\r\n    "return": {\r\n    },\r\n    "id": [\r\n        1,\r\n        [\r\n        ]\r\n    ]\r\n}\r\n'
    )
