"""What a benchmark found: rows, ratios to what it is compared with, and its place in tables and in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console as Screen
from rich.markup import escape
from rich.table import Table

from nvmove.bench.measure import median

FORMAT = 1
"""Of the JSON: grows when a reader of the old one would be wrong."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of ours by another's, or by another of ours, and what it should be."""

    name: str
    value: float
    goal: float | None = None
    at_most: bool = False
    """The goal is an upper bound."""
    best: float | None = None
    """The same of either side's best round: what a busy machine has spoiled least."""

    @property
    def held(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over one axis."""

    name: str
    """Of its file, without the ending."""
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = True
    log_y: bool = False


@dataclass(slots=True)
class Section:
    """One benchmark."""

    name: str
    title: str
    columns: Mapping[str, str]
    """Keys of `rows` that a table shows, and their headings."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know, such as why something was not measured."""

    def ratio(self, name: str, ours: float, theirs: float, goal: float | None = None, *, at_most: bool = False) -> None:
        """Add `ours` / `theirs`; nothing when there is nothing to divide by."""
        if theirs:
            self.ratios.append(Ratio(name, ours / theirs, goal, at_most))

    def ratio_of_rounds(
        self,
        name: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        goal: float | None = None,
        *,
        at_most: bool = False,
    ) -> None:
        """Add the ratio of the medians, and of the best; nothing when one side was not measured."""
        if ours and theirs and median(theirs):
            best = (min if at_most else max)(theirs)
            of_best = (min if at_most else max)(ours) / best if best else None
            self.ratios.append(Ratio(name, median(ours) / median(theirs), goal, at_most, of_best))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "title": self.title,
            "rows": self.rows,
            "ratios": [
                {
                    "name": one.name,
                    "value": one.value,
                    "best": one.best,
                    "goal": one.goal,
                    "at_most": one.at_most,
                    "held": one.held,
                }
                for one in self.ratios
            ],
            "notes": self.notes,
        }


def to_json(conditions: Mapping[str, Any], sections: Sequence[Section]) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "format": FORMAT,
        "conditions": dict(conditions),
        "sections": {section.name: section.to_json() for section in sections},
    }


def text(value: object) -> str:
    """Return a value as a table shows it: three digits that count."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and abs(value) < 100:
            return f"{value:.3g}"
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def show(screen: Screen, section: Section) -> None:
    """Print a benchmark's tables."""
    table = Table(title=section.title)
    for key, heading in section.columns.items():
        numeric = any(isinstance(row.get(key), int | float) for row in section.rows)
        table.add_column(heading, justify="right" if numeric else "left")
    for row in section.rows:
        table.add_row(*(escape(text(row.get(key))) for key in section.columns))
    screen.print(table)
    if section.ratios:
        ratios = Table(title="Ratios")
        has_best = any(ratio.best is not None for ratio in section.ratios)
        for heading in ("what", "ratio", *["of the best rounds"] * has_best, "goal", ""):
            ratios.add_column(heading, justify="left" if heading in ("what", "") else "right")
        for ratio in section.ratios:
            goal = "" if ratio.goal is None else f"{'≤' if ratio.at_most else '≥'} {ratio.goal:g}"
            held = {None: "", True: "[green]held[/]", False: "[red]missed[/]"}[ratio.held]
            best = "" if ratio.best is None else f"{ratio.best:.2f}"
            ratios.add_row(escape(ratio.name), f"{ratio.value:.2f}", *[best] * has_best, goal, held)
        screen.print(ratios)
    for note in section.notes:
        screen.print(f"[dim]{escape(note)}[/]", highlight=False)


def show_conditions(screen: Screen, conditions: Mapping[str, Any]) -> None:
    """Print the conditions as one paragraph."""
    words = [f"{name} {text(value) if isinstance(value, bool) else value}" for name, value in conditions.items()]
    screen.print(f"[dim]{escape(', '.join(words))}[/]", highlight=False)
