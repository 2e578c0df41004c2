"""VMStateDescription in Python: a device's saved state as named, typed and versioned fields.

A description says how a *tree* (plain dicts, lists, ints, bytes) lies in QEMU's migration stream. QEMU's rules hold:

- the data has no names, no types and no padding: only the description tells what a byte means (fields.py);
- subsections follow the fields of their section, each with a name (`section/sub`) and a version of its own, and only
  when it is needed: an older reader can load what does not use the new thing;
- the JSON text that QEMU puts at a stream's end names all of it (see stream.py).

(QEMU's docs/devel/migration/main.rst and what QEMU 11.1 writes are the sources.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from nvmove.vmstate.flat import Flat, Writer, refuse_surplus, runs, structure
from nvmove.vmstate.tree import Json, Tree

SUBSECTION = 0x05
"""QEMU_VM_SUBSECTION."""


class StateError(Exception):
    """A saved state that cannot be loaded: one line that says what is wrong with it."""


class Reader:
    """A position in saved bytes, which never goes past their end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = bytes(data)
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.position

    def take(self, size: int, path: str) -> bytes:
        """Return the next `size` bytes; raise StateError that names `path` when there are fewer."""
        if size > self.left:
            raise StateError(f"{path}: truncated: {size} bytes expected, {self.left} left")
        start = self.position
        self.position += size
        return self.data[start : self.position]

    def number(self, size: int, path: str) -> int:
        """Return the next `size` bytes as an unsigned number."""
        return int.from_bytes(self.take(size, path), "big")

    def name(self, path: str) -> str:
        """Return a name: a length byte and as many characters."""
        raw = self.take(self.number(1, path), path)
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            raise StateError(f"{path}: {raw!r} is not a name") from None


class Field(Protocol):
    """One field of a description. `root` is the tree of the whole section, for sizes that other fields tell."""

    @property
    def name(self) -> str:
        """The field's name, QEMU's where QEMU has the field."""

    @property
    def layout(self) -> Flat | Writer:
        """How it is written: as so many bytes always, or by a function of its own."""

    def read(self, reader: Reader, tree: Tree, root: Tree, path: str) -> None:
        """Set the field in `tree`; raise StateError."""


@dataclass(frozen=True)
class VMStateDescription:
    """A section, a subsection or a structure in one."""

    name: str
    version: int = 1
    minimum_version: int = 1
    """The oldest version that can still be loaded."""
    fields: tuple[Field, ...] = ()
    subsections: tuple[VMStateDescription, ...] = ()
    needed: Callable[[Tree], bool] = field(default=lambda _: True)
    """Subsections: whether this tree must be written; one that is at its defaults need not be."""

    def check_version(self, version: int) -> None:
        """Raise StateError unless `version` can be loaded."""
        if not self.minimum_version <= version <= self.version:
            known = f"{self.minimum_version} to {self.version}" if self.minimum_version < self.version else self.version
            raise StateError(f"{self.name}: version {version} is not known here (known: {known})")

    def write(self, out: bytearray, tree: Tree, root: Tree | None = None, path: str = "") -> Json:
        """Append `tree` to `out` and return its JSON description; raise ValueError when the tree has another shape."""
        root = tree if root is None else root
        path = path or self.name
        if not tree.keys() <= self._names:
            refuse_surplus(tree, self._names, path)
        fields = [entry for write in self._writers for entry in write(out, tree, root, path)]
        json: Json = {"vmsd_name": self.name, "version": self.version, "fields": fields}
        subsections = []
        for sub in self.subsections:
            if sub.name in tree and sub.needed(tree[sub.name]):
                name = sub.name.encode("ascii")
                out += bytes([SUBSECTION, len(name)]) + name + sub.version.to_bytes(4, "big")
                subsections.append(sub.write(out, tree[sub.name], tree[sub.name], sub.name))
        if subsections:
            json["subsections"] = subsections
        return json

    def prepare(self) -> None:
        """Make what the first `write` would have to: that one is to be as quick as the others."""
        _ = self._names, self._writers
        for sub in self.subsections:
            sub.prepare()

    @cached_property
    def flat(self) -> Flat | None:
        """All of it as one field that is described by the JSON of `write`; None: it is not of fixed size."""
        flats = {f.name: layout for f in self.fields if isinstance(layout := f.layout, Flat)}
        if self.subsections or len(flats) < len(self.fields):
            return None
        fields = [flat.json for flat in flats.values()]
        return structure(flats, {"vmsd_name": self.name, "version": self.version, "fields": fields})

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(f.name for f in self.fields) | {s.name for s in self.subsections}

    @cached_property
    def _writers(self) -> list[Writer]:
        return runs({f.name: f.layout for f in self.fields})

    def read(self, reader: Reader, version: int, root: Tree | None = None, path: str = "") -> Tree:
        """Return the tree at the reader's position; raise StateError. Subsections that are absent are absent in it."""
        self.check_version(version)
        tree: Tree = {}
        root = tree if root is None else root
        path = path or self.name
        for f in self.fields:
            f.read(reader, tree, root, f"{path}.{f.name}")
        if self.subsections:
            self._read_subsections(reader, tree)
        return tree

    def _read_subsections(self, reader: Reader, tree: Tree) -> None:
        known = {sub.name: sub for sub in self.subsections}
        while reader.left and reader.data[reader.position] == SUBSECTION:
            reader.take(1, self.name)
            name = reader.name(f"{self.name}: a subsection's name")
            version = reader.number(4, name)
            if name not in known:
                raise StateError(f"{self.name}: subsection {name!r} is not known here")
            if name in tree:
                raise StateError(f"{self.name}: subsection {name!r} is there twice")
            tree[name] = known[name].read(reader, version, None, name)
