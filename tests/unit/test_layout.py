"""The layout that docs/design.md promises: no circles, and no file that one cannot see at a glance."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
CSRC = SOURCE / "nvmove" / "engine" / "csrc"
LONGEST = 400
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
Graph = dict[str, set[str]]


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, also where only a type checker sees it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def python_modules() -> Graph:
    return {name: imports(path) - {name} for name, path in MODULES.items()}


def c_modules() -> Graph:
    """A C file and its header are one module."""
    graph: Graph = {path.stem: set() for path in CSRC.glob("*.[ch]")}
    for path in CSRC.glob("*.[ch]"):
        graph[path.stem] |= set(re.findall(r'^#include "(\w+)\.h"', path.read_text(), re.MULTILINE)) - {path.stem}
    return graph


@pytest.mark.parametrize("modules", [python_modules, c_modules])
def test_there_is_no_import_circle(modules: object) -> None:
    assert callable(modules)
    graph = modules()
    assert len(graph) > 20
    graphlib.TopologicalSorter(graph).prepare()


def test_a_long_module_says_why() -> None:
    for path in MODULES.values():
        text = path.read_text()
        if text.count("\n") > LONGEST:
            assert "long" in (ast.get_docstring(ast.parse(text)) or ""), path
