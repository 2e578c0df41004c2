"""The layout that docs/design.md promises."""

from __future__ import annotations

import graphlib
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
CSRC = SOURCE / "nvmove" / "engine" / "csrc"
Graph = dict[str, set[str]]


def c_modules() -> Graph:
    """A C file and its header are one module."""
    graph: Graph = {path.stem: set() for path in CSRC.glob("*.[ch]")}
    for path in CSRC.glob("*.[ch]"):
        graph[path.stem] |= set(re.findall(r'^#include "(\w+)\.h"', path.read_text(), re.MULTILINE)) - {path.stem}
    return graph


@pytest.mark.parametrize("modules", [c_modules])
def test_there_is_no_import_circle(modules: object) -> None:
    assert callable(modules)
    graph = modules()
    assert len(graph) > 15
    graphlib.TopologicalSorter(graph).prepare()
