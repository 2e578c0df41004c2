"""Fields of fixed size, and runs of them: all their values are written in one go, which is what makes saving quick."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import msgspec

from nvmove.vmstate.tree import Json, Tree

Writer = Callable[[bytearray, Tree, Tree, str], Sequence[Json | msgspec.Raw]]
"""Appends what is in a tree to the bytes and returns the JSON that describes it; raises ValueError: a tree of another
shape. The second tree is the whole section's, for sizes that other fields tell; then the path of the first one."""

Values = Callable[[Any], Iterable[Any]]
"""Takes a field's value and returns one for each code, or raises Unfit."""


class Unfit(Exception):
    """A value has not the shape that it should have: `check` knows what is wrong with it."""


@dataclass(frozen=True)
class Flat:
    """How a field of fixed size lies in the stream."""

    codes: str
    """Module struct's, big-endian."""
    json: Json
    check: Callable[[Any, str], None]
    """Takes the field's value and its path; raises ValueError when that value cannot be written."""
    values: Values | None = None
    """None: the field's value is that of the only code."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self._struct.size

    @cached_property
    def raw(self) -> msgspec.Raw:
        """The JSON, encoded."""
        return encoded(self.json)

    @cached_property
    def _struct(self) -> struct.Struct:
        return struct.Struct(f">{self.codes}")

    def pack(self, value: Any, path: str) -> bytes:
        """Return the bytes of `value`; raise ValueError when it cannot be written."""
        try:
            return self._struct.pack(*(self.values(value) if self.values else (value,)))
        except (Unfit, KeyError, TypeError, struct.error):
            self.check(value, path)
            raise


def encoded(json: Json) -> msgspec.Raw:
    """Return `json` as text, to be encoded no more."""
    return msgspec.Raw(msgspec.json.encode(json))


def value_of(tree: Tree, name: str, path: str) -> Any:
    """Return a field's value; raise ValueError."""
    if name not in tree:
        raise ValueError(f"{path}.{name}: missing")
    return tree[name]


def refuse_surplus(tree: Tree, names: Iterable[str], path: str) -> None:
    """Raise ValueError when `tree` has anything but `names`."""
    if surplus := sorted(tree.keys() - set(names)):
        raise ValueError(f"{path}: no such field: {surplus[0]}")


def collector(fields: Mapping[str, Flat]) -> Callable[[Tree], Iterable[Any]]:
    """Return what takes a tree and returns the values of all its `fields`, or raises Unfit or KeyError."""
    ways: list[Callable[[Tree], Iterable[Any]]] = []
    for is_alone, group in groupby(fields.items(), lambda item: item[1].values is None):
        names = [name for name, _ in group]
        ways += [_several(*names)] if is_alone else [_one(name, fields[name].values) for name in names]
    return ways[0] if len(ways) == 1 else lambda tree: chain.from_iterable([way(tree) for way in ways])


def _several(first: str, *others: str) -> Callable[[Tree], Iterable[Any]]:
    return itemgetter(first, *others) if others else lambda tree: (tree[first],)


def _one(name: str, values: Values | None) -> Callable[[Tree], Iterable[Any]]:
    assert values is not None
    return lambda tree: values(tree[name])


def structure(fields: Mapping[str, Flat], json: Json) -> Flat:
    """Return a structure of `fields`, and nothing else, as one field that is described by `json`."""
    inside, count = collector(fields), len(fields)

    def values(tree: Tree) -> Iterable[Any]:
        if len(tree) != count:
            raise Unfit
        return inside(tree)

    def check(tree: Tree, path: str) -> None:
        refuse_surplus(tree, fields, path)
        _check_each(fields, tree, path)

    return Flat(_codes(fields), json, check, values)


def _codes(fields: Mapping[str, Flat]) -> str:
    return "".join(flat.codes for flat in fields.values())


def _check_each(fields: Mapping[str, Flat], tree: Tree, path: str) -> None:
    for name, flat in fields.items():
        flat.check(value_of(tree, name, path), f"{path}.{name}")


def array(element: Flat, count: int, json: Json) -> Flat:
    """Return `count` of `element` as one field that is described by `json`."""

    def values(elements: Sequence[Any]) -> Iterable[Any]:
        if len(elements) != count:
            raise Unfit
        return elements if element.values is None else chain.from_iterable(map(element.values, elements))

    def check(elements: Sequence[Any], path: str) -> None:
        if len(elements) != count:
            raise ValueError(f"{path}: {len(elements)} elements instead of {count}")
        for index, value in enumerate(elements):
            element.check(value, f"{path}[{index}]")

    return Flat(element.codes * count, json, check, values)


def runs(layouts: Mapping[str, Flat | Writer]) -> list[Writer]:
    """Return what writes fields, by their names, one after the other; those of fixed size in runs."""
    writers: list[Writer] = []
    pending: dict[str, Flat] = {}
    for name, layout in layouts.items():
        if isinstance(layout, Flat):
            pending[name] = layout
            continue
        if pending:
            writers.append(_run(pending))
            pending = {}
        writers.append(layout)
    return [*writers, _run(pending)] if pending else writers


def _run(fields: Mapping[str, Flat]) -> Writer:
    together = Flat(_codes(fields), {}, lambda tree, path: _check_each(fields, tree, path), collector(fields))
    json = [flat.raw for flat in fields.values()]

    def write(out: bytearray, tree: Tree, _root: Tree, path: str) -> Sequence[msgspec.Raw]:
        out += together.pack(tree, path)
        return json

    return write
