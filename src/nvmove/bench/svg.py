"""Plots as SVG: lines over a linear or logarithmic axis, without a library that is larger than all of nvmove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nvmove.bench.report import Plot, text

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 48, 56
_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
_STYLE = "font-family:Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:13px;fill:#24292f"


class _Axis:
    """From values to pixels, with ticks at round values: powers of `base` on a logarithmic axis, which has one."""

    def __init__(self, values: Sequence[float], low_pixel: float, high_pixel: float, base: int = 0) -> None:
        self._base = base
        self.ticks = _log_ticks(values, base) if base else _linear_ticks(values)
        self._low, self._high = self._scale(self.ticks[0]), self._scale(self.ticks[-1])
        self._low_pixel, self._high_pixel = low_pixel, high_pixel

    def _scale(self, value: float) -> float:
        return math.log(value) if self._base else value

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        part = (self._scale(value) - self._low) / (self._high - self._low)
        return self._low_pixel + part * (self._high_pixel - self._low_pixel)


def _log_ticks(values: Sequence[float], base: int) -> list[float]:
    """Return powers of `base` around positive values, at most nine of them."""
    low, high = math.floor(math.log(min(values), base) + 1e-9), math.ceil(math.log(max(values), base) - 1e-9)
    high = max(high, low + 1)
    step = -(-(high - low) // 8)
    high = low + -(-(high - low) // step) * step
    return [float(base) ** power for power in range(low, high + 1, step)]


def _linear_ticks(values: Sequence[float]) -> list[float]:
    """Return five to ten round values from 0 beyond the largest."""
    high = max(*values, 0.0) or 1.0
    unit = 10 ** math.floor(math.log10(high))
    step = next(unit * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if high / (unit * part) <= 8)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def draw(plot: Plot) -> str:
    """Return the plot as an SVG document; raises ValueError for one without points. A log axis wants values above 0."""
    points = [point for series in plot.series.values() for point in series]
    if not points:
        raise ValueError(f"{plot.name}: there is nothing to plot")
    x = _Axis([point[0] for point in points], _LEFT, _WIDTH - _RIGHT, base=2 if plot.log_x else 0)
    y = _Axis([point[1] for point in points], _HEIGHT - _BOTTOM, _TOP, base=10 if plot.log_y else 0)
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {size}>',
        f'<rect {size} fill="#ffffff"/>',
        _text(_WIDTH / 2, 22, plot.title, weight="600"),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, plot.x),
        f'<g transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)">{_text(0, 0, plot.y)}</g>',
    ]
    for tick in x.ticks:
        at = x.at(tick)
        parts += [_line(at, _TOP, at, _HEIGHT - _BOTTOM), _text(at, _HEIGHT - _BOTTOM + 20, _tick(tick))]
    for tick in y.ticks:
        at = y.at(tick)
        parts += [_line(_LEFT, at, _WIDTH - _RIGHT, at), _text(_LEFT - 8, at + 4, _tick(tick), anchor="end")]
    for number, (name, series) in enumerate(plot.series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x.at(a), y.at(b)) for a, b in sorted(series)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
        if len(plot.series) > 1:
            row = _TOP + 14 + 18 * number
            parts.append(f'<rect x="{_LEFT + 12}" y="{row - 10}" width="12" height="12" fill="{colour}"/>')
            parts.append(_text(_LEFT + 30, row, name, anchor="start"))
    return "\n".join([*parts, "</svg>", ""])


def _tick(value: float) -> str:
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit and value % (limit / 10) == 0:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}" if abs(value) < 1e5 else text(value)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d8dee4"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" style="{_STYLE}">{escape(words)}</text>'
