"""`-echr`: the mux character is nvmove's too."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.options.syntax import OptionError
from nvmove.vm.line import monitors
from nvmove.vm.line.argv import Item


def lifted(*arguments: tuple[str, str]) -> monitors.Monitors:
    return monitors.lift([Item.make(name, value) for name, value in arguments], Path("/run"))


@pytest.mark.parametrize(("value", "escape"), [("0x1d", 0x1D), ("29", 29), ("035", 29), ("1x", 1), ("0x101", 1)])
def test_echr_is_the_mux_character_and_stays_qemus_too(value: str, escape: int) -> None:
    result = lifted(("echr", value), ("serial", "mon:stdio"))
    assert [endpoint.escape for endpoint in result.endpoints] == [escape]
    assert "echr" in [item.name for item in result.items]


def test_without_echr_it_is_ctrl_a() -> None:
    assert [endpoint.escape for endpoint in lifted(("serial", "mon:stdio")).endpoints] == [0x01]


def test_a_bad_echr_is_refused_in_qemus_words() -> None:
    with pytest.raises(OptionError, match="Bad argument to echr"):
        lifted(("echr", "foo"))
