"""The stream: QEMU's format around the sections, and nothing loads that is not exactly one of ours."""

from __future__ import annotations

import contextlib
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmove.vmstate.fields import Blob, Int
from nvmove.vmstate.schema import StateError, VMStateDescription
from nvmove.vmstate.stream import Section, dump, load

SUB = VMStateDescription("one/sub", fields=(Int("a", 2),))
ONE = VMStateDescription("one", version=3, fields=(Int("x", 4), Blob("data", 40)), subsections=(SUB,))
TWO = VMStateDescription("two", fields=(Int("y", 1),))
KNOWN = {"one": ONE, "two": TWO}
SECTIONS = [Section("one", {"x": 5, "data": b"abc", "one/sub": {"a": 1}}), Section("two", {"y": 6})]
WHOLE = dump([(SECTIONS[0], ONE), (SECTIONS[1], TWO)])
END = WHOLE.index(b"\x00\x06") + 1
"""Where the sections end and the description begins."""


def with_sections(data: bytes, **json_keys: Any) -> bytes:
    """The stream with other bytes before the description, and a checksum that fits them."""
    described = json.loads(WHOLE[END + 5 :]) | {"checksum": zlib.crc32(data)} | json_keys
    text = json.dumps(described).encode()
    return data + b"\x06" + len(text).to_bytes(4, "big") + text


def test_a_stream_is_laid_out_as_qemus() -> None:
    head = b"QEVM\0\0\0\3" + b"\4\0\0\0\0\3one\0\0\0\0\0\0\0\3" + b"\0\0\0\5\0\0\0\3abc"
    sub = b"\5\7one/sub\0\0\0\1\0\1"
    tail = b"\x7e\0\0\0\0" + b"\4\0\0\0\1\3two\0\0\0\0\0\0\0\1\6\x7e\0\0\0\1" + b"\0"
    assert head + sub + tail == WHOLE[:END]


def test_the_description_is_at_the_end_and_names_all() -> None:
    assert len(WHOLE) - END - 5 == int.from_bytes(WHOLE[END + 1 : END + 5], "big")
    described = json.loads(WHOLE[END + 5 :])
    assert described["page_size"] == 4096
    assert [(d["name"], d["vmsd_name"], d["version"]) for d in described["devices"]] == [
        ("one", "one", 3),
        ("two", "two", 1),
    ]
    assert described["devices"][0]["subsections"][0]["vmsd_name"] == "one/sub"


def test_analyze_migration_finds_the_brace_where_the_description_begins() -> None:
    # It takes the first one after the last zero byte: the description's length, 31488 to 31743 here, must not have one.
    for count in range(200, 260):
        wide = VMStateDescription("wide", fields=tuple(Int(f"{index:0100}", 1) for index in range(count)))
        data = dump([(Section("wide", {f.name: 0 for f in wide.fields}), wide)])
        assert data[data.index(b"{", data.rindex(b"\0")) :].startswith(b'{"page_size"')
        assert load(data, {"wide": wide})


def test_a_stream_is_loaded_as_it_was_written() -> None:
    assert load(WHOLE, KNOWN) == SECTIONS


@given(st.integers(0, len(WHOLE) - 1))
def test_every_truncation_is_refused(cut: int) -> None:
    with pytest.raises(StateError):
        load(WHOLE[:cut], KNOWN)


@given(st.integers(0, END - 1), st.integers(1, 255))
def test_every_damaged_byte_is_refused(position: int, flip: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] ^= flip
    with pytest.raises(StateError):
        load(bytes(damaged), KNOWN)


@given(st.integers(0, END - 1), st.integers(1, 255))
def test_a_forged_byte_loads_or_is_refused_and_nothing_else(position: int, flip: int) -> None:
    forged = bytearray(WHOLE[:END])
    forged[position] ^= flip
    try:
        sections = load(with_sections(bytes(forged)), KNOWN)
    except StateError as error:
        assert "\n" not in str(error)
    else:
        assert [s.name for s in SECTIONS] == [s.name for s in sections]


@given(st.integers(END, len(WHOLE) - 1), st.integers(1, 255))
def test_a_damaged_description_never_changes_the_state(position: int, flip: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] ^= flip
    with contextlib.suppress(StateError):
        assert load(bytes(damaged), KNOWN) == SECTIONS


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a saved state: it begins with b'', not b'QEVM'"),
        (b"\x1f\x8b\x08\x00", "not a saved state: it begins with b'\\x1f\\x8b\\x08\\x00'"),
        (b"QEVM\0\0\0\4", "the stream's version is 4, not 3"),
        (WHOLE[:8], "the next section: truncated"),
        (WHOLE[:8] + b"\4\0\0\0\1", "section 0 has the number 1"),
        (WHOLE[:8] + b"\1", "surplus data after the header: a byte 0x01"),
        (WHOLE.replace(b"\3one", b"\3new"), "section 'new' is not known here"),
        (WHOLE.replace(b"\0\0\0\3\0\0\0\5", b"\0\0\0\4\0\0\0\5"), "one: version 4 is not known here"),
        (WHOLE.replace(b"\6\x7e", b"\6\x00\x7e"), "two: surplus data: a byte 0x00 where its end should be"),
        (WHOLE.replace(b"\x7e\0\0\0\1", b"\x7e\0\0\0\2"), "two: its footer has the number 2, not 1"),
        (WHOLE[:END], "the description: truncated"),
        (WHOLE[:END] + b"\7", "a byte 0x07 where the description should begin"),
        (WHOLE + b"x", "surplus data: 1 bytes after the description"),
        (WHOLE[:END] + b"\6\0\0\0\1x", "the description is not JSON"),
        (WHOLE[:END] + b"\6\0\0\0\1" + b"1", "the description is not a JSON object"),
        (WHOLE.replace(b"abc", b"abd"), "the state is damaged: its checksum is"),
        (with_sections(WHOLE[:END], devices=[]), "the description names other sections than there are"),
        (with_sections(WHOLE[:END], devices=7), "the description names other sections than there are"),
        (dump([(SECTIONS[1], TWO)] * 2), "section 'two' is there twice"),
    ],
)
def test_what_is_no_state_of_ours_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(StateError) as caught:
        load(data, KNOWN)
    assert str(caught.value).startswith(says)
