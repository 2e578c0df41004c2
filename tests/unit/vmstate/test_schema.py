"""Descriptions: what they write is what QEMU would, what they read is checked to the last byte."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.json import decode, encode

from nvmove.vmstate.fields import Array, Blob, Bool, Buffer, Counted, Int, Pointers, Queue, Struct, Text, reserved
from nvmove.vmstate.schema import Field, Reader, StateError, VMStateDescription
from nvmove.vmstate.tree import Tree

POINT = VMStateDescription("point", fields=(Int("x", 2), Int("y", 2, signed=True)))


def described(*fields: Field, **more: Any) -> VMStateDescription:
    return VMStateDescription("thing", fields=fields, **more)


def written(description: VMStateDescription, tree: Tree) -> bytes:
    out = bytearray()
    description.write(out, tree)
    return bytes(out)


def read(description: VMStateDescription, data: bytes, version: int = 1) -> Tree:
    reader = Reader(data)
    tree = description.read(reader, version)
    assert reader.left == 0
    return tree


EVERYTHING = described(
    Int("n", 4),
    Bool("b"),
    Buffer("raw", lambda root: int(root["n"])),
    reserved("rsvd", 3),
    Struct("s", POINT),
    Struct("t", POINT, inline=True),
    Array("points", POINT, 2),
    Array("numbers", Int("numbers", 2), 3),
    Pointers("pointers", POINT, lambda root: int(root["n"])),
    Queue("queue", POINT),
    Counted("counted", POINT, 4),
    Blob("blob", 5),
    Text("text", 9),
)
P = st.fixed_dictionaries({"x": st.integers(0, 0xFFFF), "y": st.integers(-0x8000, 0x7FFF)})


@st.composite
def everything(draw: st.DrawFn) -> Tree:
    n = draw(st.integers(0, 4))
    return {
        "n": n,
        "b": draw(st.booleans()),
        "raw": draw(st.binary(min_size=n, max_size=n)),
        "rsvd": draw(st.binary(min_size=3, max_size=3)),
        "s": draw(P),
        "t": draw(P),
        "points": draw(st.lists(P, min_size=2, max_size=2)),
        "numbers": draw(st.lists(st.integers(0, 0xFFFF), min_size=3, max_size=3)),
        "pointers": draw(st.lists(st.none() | P, min_size=n, max_size=n)),
        "queue": draw(st.lists(P, max_size=3)),
        "counted": draw(st.lists(P, max_size=4)),
        "blob": draw(st.binary(max_size=5)),
        "text": draw(st.text(max_size=2)),
    }


@given(everything())
def test_what_is_written_is_read_again(tree: Tree) -> None:
    assert tree == read(EVERYTHING, written(EVERYTHING, tree))


def size_in_json(fields: list[dict[str, Any]]) -> int:
    return sum(f["size"] * f.get("array_len", 1) for f in fields)


@given(everything())
def test_the_json_accounts_for_every_byte(tree: Tree) -> None:
    out = bytearray()
    json = decode(encode(EVERYTHING.write(out, tree)))
    assert len(out) == size_in_json(json["fields"])


@given(everything(), st.data())
def test_a_truncated_tree_is_a_state_error(tree: Tree, data: st.DataObject) -> None:
    whole = written(EVERYTHING, tree)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(StateError):
        read(EVERYTHING, whole[:cut])


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_a_state_error(data: bytes) -> None:
    try:
        EVERYTHING.read(Reader(data), 1)
    except StateError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("field", "value", "data"),
    [
        (Int("f", 2), 0x1234, "1234"),
        (Int("f", 4, signed=True), -2, "fffffffe"),
        (Bool("f"), True, "01"),
        (Buffer("f", 2), b"ab", "6162"),
        (Struct("f", POINT), {"x": 1, "y": -1}, "0001ffff"),
        (Pointers("f", POINT, lambda _: 2), [None, {"x": 1, "y": 2}], "303100010002"),
        (Queue("f", POINT), [{"x": 1, "y": 2}], "010001000200"),
        (Queue("f", POINT, always_empty=True), [], "00"),
        (Counted("f", POINT, 1), [{"x": 1, "y": 2}], "0000000100010002"),
        (Blob("f", 2), b"a", "0000000161"),
        (Text("f", 2), "é", "00000002c3a9"),
    ],
)
def test_a_field_lies_in_the_stream_as_qemu_has_it(field: Field, value: Any, data: str) -> None:
    assert data == written(described(field), {"f": value}).hex()


@pytest.mark.parametrize(
    ("field", "data", "says"),
    [
        (Int("f", 2), "12", "thing.f: truncated: 2 bytes expected, 1 left"),
        (Bool("f"), "02", "thing.f: 2 is neither 0 nor 1"),
        (Pointers("f", POINT, lambda _: 1), "32", "thing.f[0]: b'2' is not a pointer's marker"),
        (Pointers("f", POINT, lambda _: 1), "31000100", "thing.f[0].y: truncated"),
        (Queue("f", POINT), "02", "thing.f[0]: 2 is not a list's marker"),
        (Counted("f", POINT, 1), "00000002", "thing.f: 2 elements, at most 1 are possible"),
        (Blob("f", 1), "00000002", "thing.f: 2 bytes, at most 1 are possible"),
        (Text("f", 1), "00000001ff", "thing.f: not UTF-8"),
    ],
)
def test_bad_data_is_refused_by_the_name_of_its_field(field: Field, data: str, says: str) -> None:
    with pytest.raises(StateError) as caught:
        read(described(field), bytes.fromhex(data))
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (Int("f", 1), 256, "thing.f: 256 is not a uint8"),
        (Int("f", 1), "1", "thing.f: '1' is not a number"),
        (Buffer("f", 2), b"a", "thing.f: 1 bytes instead of 2"),
        (Array("f", POINT, 2), [], "thing.f: 0 elements instead of 2"),
        (Array("f", Int("f", 1), 1), [256], "thing.f[0]: 256 is not a uint8"),
        (Pointers("f", POINT, lambda _: 2), [], "thing.f: 0 elements instead of 2"),
        (Counted("f", POINT, 0), [{}], "thing.f: 1 elements, at most 0 are possible"),
        (Blob("f", 1), b"ab", "thing.f: 2 bytes, at most 1 are possible"),
        (Queue("f", POINT, always_empty=True), [{}], "thing.f: 1 elements, none is possible"),
        (Struct("f", POINT), {"x": 1}, "thing.f.y: missing"),
        (Struct("f", POINT), {"x": 1, "y": 2, "z": 3}, "thing.f: no such field: z"),
    ],
)
def test_a_tree_of_another_shape_is_not_written(field: Field, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match="thing") as caught:
        written(described(field), {"f": value})
    assert says == str(caught.value)


SUB = VMStateDescription("thing/sub", version=2, minimum_version=2, fields=(Int("a", 1),), needed=lambda t: t["a"] != 0)
WITH_SUB = described(Int("f", 1), subsections=(SUB,))


def test_a_subsection_follows_the_fields_with_its_name_and_version() -> None:
    data = written(WITH_SUB, {"f": 7, "thing/sub": {"a": 9}})
    assert data == b"\x07\x05\x09thing/sub\x00\x00\x00\x02\x09"
    assert read(WITH_SUB, data) == {"f": 7, "thing/sub": {"a": 9}}


def test_a_subsection_that_is_not_needed_is_not_written() -> None:
    assert b"\x07" == written(WITH_SUB, {"f": 7, "thing/sub": {"a": 0}}) == written(WITH_SUB, {"f": 7})
    assert read(WITH_SUB, b"\x07") == {"f": 7}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x07\x05\x09thing/new\x00\x00\x00\x01", "thing: subsection 'thing/new' is not known here"),
        (b"\x07\x05\x09thing/sub\x00\x00\x00\x03\x09", "thing/sub: version 3 is not known here (known: 2)"),
        (b"\x07\x05\x09thing/sub\x00\x00\x00\x02", "thing/sub.a: truncated: 1 bytes expected, 0 left"),
        (b"\x07" + 2 * b"\x05\x09thing/sub\x00\x00\x00\x02\x09", "thing: subsection 'thing/sub' is there twice"),
        (b"\x07\x05\x01\xff", "thing: a subsection's name: b'\\xff' is not a name"),
    ],
)
def test_a_bad_subsection_is_refused_by_its_name(data: bytes, says: str) -> None:
    with pytest.raises(StateError) as caught:
        read(WITH_SUB, data)
    assert says == str(caught.value)


def test_versions_from_the_minimum_to_the_newest_are_loaded() -> None:
    description = VMStateDescription("thing", version=3, minimum_version=2)
    for version in (2, 3):
        assert read(description, b"", version) == {}
    for version in (1, 4):
        with pytest.raises(StateError, match=rf"thing: version {version} is not known here \(known: 2 to 3\)"):
            read(description, b"", version)
