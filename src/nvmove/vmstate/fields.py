"""The kinds of fields, as QEMU's migration stream has them.

Numbers are big-endian; a pointer is a marker, '1' or '0', and what it points to; a list is a 1 before each element
and a 0 after the last one. `Counted`, `Blob` and `Text` are ours: compositions that QEMU's readers understand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from nvmove.vmstate.schema import Json, Reader, StateError, Tree, VMStateDescription


def _value(tree: Tree, name: str, path: str) -> Any:
    if name not in tree:
        raise ValueError(f"{path}: missing")
    return tree[name]


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

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        value = _value(tree, self.name, path)
        if not isinstance(value, int):
            raise ValueError(f"{path}: {value!r} is not a number")
        out += self.pack(value, path)
        return [{"name": self.name, "type": self.type, "size": self.size}]

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = self.unpack(reader.take(self.size, path))

    @property
    def type(self) -> str:
        """QEMU's name of the type."""
        return self.label or f"{'' if self.signed else 'u'}int{8 * self.size}"

    def pack(self, value: int, path: str) -> bytes:
        """Return the bytes of `value`; raise ValueError when it does not fit."""
        try:
            return value.to_bytes(self.size, "big", signed=self.signed)
        except OverflowError:
            raise ValueError(f"{path}: {value} is not a {self.type}") from None

    def unpack(self, data: bytes) -> int:
        """Return the number in `data`."""
        return int.from_bytes(data, "big", signed=self.signed)


@dataclass(frozen=True)
class Bool:
    """A byte that is 0 or 1."""

    name: str

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        out.append(1 if _value(tree, self.name, path) else 0)
        return [{"name": self.name, "type": "bool", "size": 1}]

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

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        value, size = _value(tree, self.name, path), self._size(root)
        if len(value) != size:
            raise ValueError(f"{path}: {len(value)} bytes instead of {size}")
        out += value
        if self.type == "uint8":
            return [{"name": self.name, "array_len": size, "type": "uint8", "size": 1}]
        return [{"name": self.name, "type": self.type, "size": size}]

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
    """A fixed number of equal elements: numbers (Int) or structures."""

    name: str
    element: Int | VMStateDescription
    count: int

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        values = _value(tree, self.name, path)
        if len(values) != self.count:
            raise ValueError(f"{path}: {len(values)} elements instead of {self.count}")
        start = len(out)
        json: Json = {"name": self.name, "array_len": self.count}
        for index, value in enumerate(values):
            if isinstance(self.element, Int):
                out += self.element.pack(value, f"{path}[{index}]")
                json["type"] = self.element.type
            else:
                json["type"] = "struct"
                json["struct"] = self.element.write(out, value, root, f"{path}[{index}]")
        return [{**json, "size": (len(out) - start) // self.count}]

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        tree[self.name] = [self._read_one(reader, root, f"{path}[{index}]") for index in range(self.count)]

    def _read_one(self, reader: Reader, root: Tree, path: str) -> int | Tree:
        if isinstance(self.element, Int):
            return self.element.unpack(reader.take(self.element.size, path))
        return self.element.read(reader, self.element.version, root, path)


@dataclass(frozen=True)
class Struct:
    """A structure in place. `inline` is how QEMU describes one that exists only to be saved (VMSTATE_WITH_TMP)."""

    name: str
    description: VMStateDescription
    inline: bool = False

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        start = len(out)
        json = self.description.write(out, _value(tree, self.name, path), root, path)
        size = len(out) - start
        if self.inline:
            return [{"name": self.name, "type": "tmp", **json, "size": size}]
        return [{"name": self.name, "type": "struct", "struct": json, "size": size}]

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

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        values = _value(tree, self.name, path)
        if len(values) != self.count(root):
            raise ValueError(f"{path}: {len(values)} elements instead of {self.count(root)}")
        json: list[Json] = []
        for index, value in enumerate(values):
            out += self.NULL if value is None else self.VALID
            json.append({"name": self.name, "type": "ptr-marker", "size": 1})
            if value is not None:
                start = len(out)
                struct = self.description.write(out, value, root, f"{path}[{index}]")
                json.append({"name": self.name, "type": "struct", "struct": struct, "size": len(out) - start})
        return json

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
    """A linked list of structures (QTAILQ)."""

    name: str
    description: VMStateDescription

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        start = len(out)
        json: Json = {}
        for index, value in enumerate(_value(tree, self.name, path)):
            out.append(1)
            json = self.description.write(out, value, root, f"{path}[{index}]")
        out.append(0)
        return [{"name": self.name, "type": "qtailq", **json, "size": len(out) - start}]

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

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        values = _value(tree, self.name, path)
        if len(values) > self.maximum:
            raise ValueError(f"{path}: {len(values)} elements, at most {self.maximum} are possible")
        out += _be(len(values), 4, path)
        json: list[Json] = [{"name": f"{self.name}_count", "type": "uint32", "size": 4}]
        for index, value in enumerate(values):
            start = len(out)
            struct = self.description.write(out, value, root, f"{path}[{index}]")
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

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        return self.put(out, _value(tree, self.name, path), path)

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

    def write(self, out: bytearray, tree: Tree, root: Tree, path: str) -> list[Json]:
        """See Field."""
        return Blob(self.name, self.maximum).put(out, _value(tree, self.name, path).encode(), path)

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """See Field."""
        raw = Blob(self.name, self.maximum).get(reader, path)
        try:
            tree[self.name] = raw.decode()
        except UnicodeDecodeError:
            raise StateError(f"{path}: not UTF-8") from None
