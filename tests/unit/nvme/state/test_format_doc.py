"""docs/reference/state-format.md names every subsection and every field of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvmove.nvme.state.vmsd_ours import NUMBER, SUBSECTIONS
from nvmove.vmstate.fields import Counted
from nvmove.vmstate.schema import VMStateDescription

DOC = Path(__file__).parents[4] / "docs" / "reference" / "state-format.md"


def names(description: VMStateDescription) -> Iterator[str]:
    for field in description.fields:
        if not isinstance(field, Counted):
            yield field.name
        elif field.description is not NUMBER:
            yield from names(field.description)


@pytest.mark.parametrize("subsection", SUBSECTIONS, ids=lambda s: s.name)
def test_the_reference_names_every_field_of_a_subsection(subsection: VMStateDescription) -> None:
    lines = [line for line in DOC.read_text().splitlines() if line.startswith(f"| `{subsection.name}` |")]
    assert len(lines) == 1
    fields = set(names(subsection)) - {"high"}
    assert {name for name in fields if f"`{name}`" not in lines[0]} == set()
