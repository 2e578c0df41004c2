"""Which engine a device gets, and what the user is told."""

from __future__ import annotations

import importlib.util

import pytest

from nvmove.engine import choice
from nvmove.engine.plain import PlainEngine
from nvmove.errors import UserError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)


def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def test_what_was_built_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if choice.chosen() == choice.COMPILED:
        assert type(choice.new_engine("x")).__name__ == "CompiledEngine"
        assert choice.notice() == ""
    monkeypatch.setenv(choice.VARIABLE, "plain")
    assert type(choice.new_engine("x")) is PlainEngine
    assert choice.notice() == ""


def test_without_a_compiler_the_plain_one_is_used_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    not_built(monkeypatch)
    assert type(choice.new_engine("x")) is PlainEngine
    assert "was not built" in choice.notice()
    assert "\n" not in choice.notice()


@pytest.mark.parametrize("value", ["fast", "compiled"])
def test_what_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    not_built(monkeypatch)
    monkeypatch.setenv(choice.VARIABLE, value)
    with pytest.raises(UserError, match=f"^NVMOVE_ENGINE={value}"):
        choice.new_engine("x")
