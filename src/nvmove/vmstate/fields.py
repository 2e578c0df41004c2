"""The kinds of fields, as QEMU's migration stream has them.

Numbers are big-endian; a pointer is a marker, '1' or '0', and what it points to; a list is a 1 before each element
and a 0 after the last one. `Counted`, `Blob` and `Text` are ours: compositions that QEMU's readers understand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec

from nvmove.vmstate.flat import Flat, Unfit, Writer, array, encoded, value_of
from nvmove.vmstate.schema import Reader, StateError, VMStateDescription
from nvmove.vmstate.tree import Json, Tree

_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}
"""Module struct's, of signed numbers by their size; capitals are unsigned."""


def _be(value: int, size: int, path: str) -> bytes:
    try:
        return value.to_bytes(size, "big")
    except OverflowError:
        raise ValueError(f"{path}: {value} does not fit {size} bytes") from None


@dataclass(frozen=True)
class Int:
    """A number of `size` bytes."""

    name: str
    size: int
    signed: bool = False
    label: str = ""
    """What QEMU's description calls the type, when it is not `uint32` and the like."""

    @property
    def layout(self) -> Flat:
        """See Field."""
        code = _CODES[self.size]
        json = {"name": self.name, "type": self.type, "size": self.size}
        return Flat(code if self.signed else code.upper(), json, self._check)

    def _check(self, value: Any, path: str) -> None:
        if not isinstance(value, int):
            raise ValueError(f"{path}: {value!r} is not a number")
        try:
            value.to_bytes(self.size, "big", signed=self.signed)
        except OverflowError:
            raise ValueError(f"{path}: {value} is not a {self.type}") from None

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = self.unpack(reader.take(self.size, path))

    @property
    def type(self) -> str:
        """QEMU's name of the type."""
        return self.label or f"{'' if self.signed else 'u'}int{8 * self.size}"

    def unpack(self, data: bytes) -> int:
        """Return the number in `data`."""
        return int.from_bytes(data, "big", signed=self.signed)


@dataclass(frozen=True)
class Bool:
    """A byte that is 0 or 1."""

    name: str

    @property
    def layout(self) -> Flat:
        """See Field."""
        return Flat("?", {"name": self.name, "type": "bool", "size": 1}, lambda _value, _path: None)

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        value = reader.number(1, path)
        if value > 1:
            raise StateError(f"{path}: {value} is neither 0 nor 1")
        tree[self.name] = value == 1


@dataclass(frozen=True)
class Buffer:
    """Bytes, as many as `size` says (a number, or a function of what was read so far)."""

    name: str
    size: int | Callable[[Tree], int]
    type: str = "buffer"

    @property
    def layout(self) -> Flat | Writer:
        """See Field."""
        size = self.size
        if not isinstance(size, int):
            return self._write

        def values(value: bytes) -> Iterable[Any]:
            if len(value) != size:
                raise Unfit
            return (value,)

        return Flat(f"{size}s", self._json(size), lambda value, path: self._check(value, size, path), values)

    def _write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        value, size = value_of(tree, self.name, path), self._size(root)
        self._check(value, size, f"{path}.{self.name}")
        out += value
        return [self._json(size)]

    def _check(self, value: bytes, size: int, path: str) -> None:
        if len(value) != size:
            raise ValueError(f"{path}: {len(value)} bytes instead of {size}")

    def _json(self, size: int) -> Json:
        if self.type == "uint8":
            return {"name": self.name, "array_len": size, "type": "uint8", "size": 1}
        return {"name": self.name, "type": self.type, "size": size}

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = reader.take(self._size(root), path)

    def _size(self, root: Tree) -> int:
        return self.size if isinstance(self.size, int) else self.size(root)


def reserved(name: str, size: int) -> Buffer:
    """`size` bytes, an array of uint8 to QEMU."""
    return Buffer(name, size, "uint8")


@dataclass(frozen=True)
class Array:
    """A fixed number of equal elements: numbers (Int) or structures of fixed size."""

    name: str
    element: Int | VMStateDescription
    count: int

    @property
    def layout(self) -> Flat:
        """See Field."""
        json: Json = {"name": self.name, "array_len": self.count}
        if isinstance(self.element, Int):
            flat = self.element.layout
            return array(flat, self.count, {**json, "type": self.element.type, "size": flat.size})
        flat = _fixed(self.name, self.element.flat)
        return array(flat, self.count, {**json, "type": "struct", "struct": flat.json, "size": flat.size})

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = [self._read_one(reader, root, f"{path}[{index}]") for index in range(self.count)]

    def _read_one(self, reader: Reader, root: Tree, path: str) -> int | Tree:
        if isinstance(self.element, Int):
            return self.element.unpack(reader.take(self.element.size, path))
        return self.element.read(reader, self.element.version, root, path)


def _fixed(name: str, flat: Flat | Writer | None) -> Flat:
    if not isinstance(flat, Flat):
        raise TypeError(f"{name} is of no fixed size")
    return flat


@dataclass(frozen=True)
class Struct:
    """A structure in place. `inline` is how QEMU describes one that exists only to be saved (VMSTATE_WITH_TMP)."""

    name: str
    description: VMStateDescription
    inline: bool = False

    @property
    def layout(self) -> Flat | Writer:
        """See Field."""
        flat = self.description.flat
        return self._write if flat is None else replace(flat, json=self._json(flat.json, flat.size))

    def _write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        start = len(out)
        json = self.description.write(out, value_of(tree, self.name, path), root, f"{path}.{self.name}")
        return [self._json(json, len(out) - start)]

    def _json(self, json: Json, size: int) -> Json:
        if self.inline:
            return {"name": self.name, "type": "tmp", **json, "size": size}
        return {"name": self.name, "type": "struct", "struct": json, "size": size}

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = self.description.read(reader, self.description.version, root, path)


@dataclass(frozen=True)
class Pointers:
    """An array of pointers to structures, some of them null (None in the tree); its length is told by other fields."""

    name: str
    description: VMStateDescription
    count: Callable[[Tree], int]

    NULL: ClassVar[bytes] = b"0"
    VALID: ClassVar[bytes] = b"1"

    @property
    def layout(self) -> Writer:
        """See Field."""
        marker = encoded({"name": self.name, "type": "ptr-marker", "size": 1})
        element = _fixed(self.name, Struct(self.name, self.description).layout)

        def write(out: bytearray, tree: Tree, root: Tree, path: str) -> list[msgspec.Raw]:
            values, path = value_of(tree, self.name, path), f"{path}.{self.name}"
            if len(values) != self.count(root):
                raise ValueError(f"{path}: {len(values)} elements instead of {self.count(root)}")
            json: list[msgspec.Raw] = []
            for index, value in enumerate(values):
                json.append(marker)
                if value is None:
                    out += self.NULL
                else:
                    out += self.VALID
                    out += element.pack(value, f"{path}[{index}]")
                    json.append(element.raw)
            return json

        return write

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        values: list[Tree | None] = []
        for index in range(self.count(root)):
            where = f"{path}[{index}]"
            marker = reader.take(1, where)
            if marker == self.VALID:
                values.append(self.description.read(reader, self.description.version, root, where))
            elif marker == self.NULL:
                values.append(None)
            else:
                raise StateError(f"{where}: {marker!r} is not a pointer's marker")
        tree[self.name] = values


@dataclass(frozen=True)
class Queue:
    """A linked list of structures (QTAILQ). `always_empty` is one in which nvmove never has anything."""

    name: str
    description: VMStateDescription
    always_empty: bool = False

    @property
    def layout(self) -> Flat | Writer:
        """See Field."""
        return Flat("x", self._json({}, 1), self._check_empty, self._nothing) if self.always_empty else self._write

    def _write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        start = len(out)
        json: Json = {}
        values, path = value_of(tree, self.name, path), f"{path}.{self.name}"
        for index, value in enumerate(values):
            out.append(1)
            json = self.description.write(out, value, root, f"{path}[{index}]")
        out.append(0)
        return [self._json(json, len(out) - start)]

    def _json(self, json: Json, size: int) -> Json:
        return {"name": self.name, "type": "qtailq", **json, "size": size}

    def _check_empty(self, values: Sequence[Tree], path: str) -> None:
        if values:
            raise ValueError(f"{path}: {len(values)} elements, none is possible")

    def _nothing(self, values: Sequence[Tree]) -> tuple[()]:
        if values:
            raise Unfit
        return ()

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        values: list[Tree] = []
        while True:
            where = f"{path}[{len(values)}]"
            marker = reader.number(1, where)
            if marker == 0:
                break
            if marker != 1:
                raise StateError(f"{where}: {marker} is not a list's marker")
            values.append(self.description.read(reader, self.description.version, root, where))
        tree[self.name] = values


@dataclass(frozen=True)
class Counted:
    """Structures of ours: their number (uint32), then each. At most `maximum`."""

    name: str
    description: VMStateDescription
    maximum: int

    @property
    def layout(self) -> Writer:
        """See Field."""
        return self._write

    def _write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        values, path = value_of(tree, self.name, path), f"{path}.{self.name}"
        if len(values) > self.maximum:
            raise ValueError(f"{path}: {len(values)} elements, at most {self.maximum} are possible")
        out += _be(len(values), 4, path)
        json: list[Json] = [{"name": f"{self.name}_count", "type": "uint32", "size": 4}]
        flat = self.description.flat
        for index, value in enumerate(values):
            start, where = len(out), f"{path}[{index}]"
            struct: Json | msgspec.Raw
            if flat is None:
                struct = self.description.write(out, value, root, where)
            else:
                out += flat.pack(value, where)
                struct = flat.raw
            size = len(out) - start
            json.append({"name": self.name, "index": index, "type": "struct", "struct": struct, "size": size})
        return json

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        count = reader.number(4, path)
        if count > self.maximum:
            raise StateError(f"{path}: {count} elements, at most {self.maximum} are possible")
        tree[self.name] = [
            self.description.read(reader, self.description.version, root, f"{path}[{index}]") for index in range(count)
        ]


@dataclass(frozen=True)
class Blob:
    """Bytes of ours: their number (uint32), then themselves. At most `maximum`."""

    name: str
    maximum: int

    @property
    def layout(self) -> Writer:
        """See Field."""
        return self._write

    def _write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        return self.put(out, value_of(tree, self.name, path), f"{path}.{self.name}")

    def put(self, out: bytearray, value: bytes, path: str) -> list[Json]:
        """Append `value` and return its description."""
        if len(value) > self.maximum:
            raise ValueError(f"{path}: {len(value)} bytes, at most {self.maximum} are possible")
        out += _be(len(value), 4, path) + value
        json: list[Json] = [{"name": f"{self.name}_len", "type": "uint32", "size": 4}]
        if value:
            json.append({"name": self.name, "type": "buffer", "size": len(value)})
        return json

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = self.get(reader, path)

    def get(self, reader: Reader, path: str) -> bytes:
        """Return the bytes at the reader's position."""
        size = reader.number(4, path)
        if size > self.maximum:
            raise StateError(f"{path}: {size} bytes, at most {self.maximum} are possible")
        return reader.take(size, path)


@dataclass(frozen=True)
class Text:
    """A string in UTF-8, laid out as a Blob."""

    name: str
    maximum: int

    @property
    def layout(self) -> Writer:
        """See Field."""
        return self._write

    def _write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        text = value_of(tree, self.name, path).encode()
        return Blob(self.name, self.maximum).put(out, text, f"{path}.{self.name}")

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        raw = Blob(self.name, self.maximum).get(reader, path)
        try:
            tree[self.name] = raw.decode()
        except UnicodeDecodeError:
            raise StateError(f"{path}: not UTF-8") from None
