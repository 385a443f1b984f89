"""Charts of a page as inline SVG. They are 360 units wide, about as wide as a phone, so that their text is never small.

Colours are classes that the page's style sheet defines for light, dark and paper; a letter and a dash pattern say the
same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH = 360
COLORS = 8  # that the style sheet has
DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 2")
LETTER_GAP = 12  # between the baselines of letters next to a chart
MARKED = 24  # points that a curve may have to be marked one by one

Place = Callable[[float], float]  # of a value in the chart


class Curve(NamedTuple):
    """A line and the band around it, by step; of the row that number and letter name."""

    row: int
    letter: str
    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Bar(NamedTuple):
    """A share of 0 to 1, or NaN, and its deviation, or NaN."""

    row: int
    letter: str
    value: float
    deviation: float


def swatch(row: int) -> str:
    """A piece of the row's line, for legends."""
    line = f'<line x1="0" y1="5" x2="22" y2="5" class="line c{row % COLORS}"{_dash(row)}/>'
    return f'<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true">{line}</svg>'


def lines(title: str, curves: Sequence[Curve], *, percent: bool = False) -> str:
    """Curves over steps."""
    height, left, right, top, bottom = 212, 44, 22, 10, 26
    ys = [y for curve in curves for y in (*curve.low, *curve.high)]
    xs = [x for curve in curves for x in curve.steps]
    y_ticks, x_ticks = ticks(min(ys), max(ys)), ticks(min(xs), max(xs), 4)
    low, high = y_ticks[0], y_ticks[-1]
    start, end = min(xs), max(max(xs), min(xs) + 1)

    def x(step: float) -> float:
        return left + (step - start) / (end - start) * (WIDTH - left - right)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        text = number(100 * tick if percent else tick, y_ticks[1] - y_ticks[0], percent)
        parts.append(f'<text class="tick" x="{left - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{text}</text>')
    for i, tick in enumerate(tick for tick in x_ticks if start <= tick <= end):
        text = ("step " if i == 0 else "") + number(tick, x_ticks[1] - x_ticks[0])
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for curve in curves:
        parts += _curve(curve, x, y)
    places = spread([y(curve.mean[-1]) for curve in curves], top + 4, height - bottom)
    for curve, place in zip(curves, places, strict=True):
        color = f"letter f{curve.row % COLORS}"
        parts.append(f'<text class="{color}" x="{WIDTH - right + 6}" y="{place + 4:.1f}">{escape(curve.letter)}</text>')
    return _svg(title, height, parts)


def _curve(curve: Curve, x: Place, y: Place) -> list[str]:
    color, dash = curve.row % COLORS, _dash(curve.row)
    mean = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(curve.steps, curve.mean, strict=True)]
    upper = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(curve.steps, curve.high, strict=True)]
    lower = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(curve.steps, curve.low, strict=True)]
    parts = []
    if upper != lower:
        parts.append(f'<polygon class="band f{color}" points="{" ".join(upper + lower[::-1])}"/>')
    if len(mean) > 1:
        parts.append(f'<polyline class="line c{color}"{dash} points="{" ".join(mean)}"/>')
    if len(mean) <= MARKED:
        centres = (point.split(",") for point in mean)
        parts += [f'<circle class="f{color}" cx="{cx}" cy="{cy}" r="2.4"/>' for cx, cy in centres]
    return parts


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars of shares, a line a row, with the percentage behind each."""
    left, right, step = 20, 92, 19
    scale, parts = WIDTH - left - right, []
    for i, bar in enumerate(rows):
        middle = i * step + 10
        parts.append(
            f'<text class="letter f{bar.row % COLORS}" x="0" y="{middle + 4}">{escape(bar.letter)}</text>'
            f'<rect class="track" x="{left}" y="{middle - 6}" width="{scale}" height="12" rx="2"/>'
        )
        text = "n/a"
        if not math.isnan(bar.value):
            text = f"{100 * bar.value:.2f}"
            width = f"{scale * bar.value:.1f}"
            parts.append(
                f'<rect class="f{bar.row % COLORS}" x="{left}" y="{middle - 6}" width="{width}" height="12" rx="2"/>'
            )
            if not math.isnan(bar.deviation):
                ends = [left + scale * min(1, max(0, bar.value + sign * bar.deviation)) for sign in (-1, 1)]
                place = f'x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle}" y2="{middle}"'
                parts.append(f'<line class="halo" {place}/><line class="whisker" {place}/>')
                text += f'<tspan class="deviation"> ± {100 * bar.deviation:.2f}</tspan>'
        parts.append(f'<text class="value" x="{left + scale + 8}" y="{middle + 4}">{text}</text>')
    return _svg(title, len(rows) * step + 2, parts)


def heatmap(title: str, shares: np.ndarray, names: Sequence[str]) -> str:
    """A square matrix of shares, NaN left empty: truth in rows, prediction in columns. Numbers where there is room."""
    count = len(names)
    left, top = 86, 74
    cell = (WIDTH - left - 2) / count
    size = min(10.5, 0.9 * cell)
    parts = []
    for i, name in enumerate(names):
        short, middle = escape(name if len(name) <= 14 else f"{name[:13]}…"), (i + 0.5) * cell
        style = f'class="tick" style="font-size:{size:.1f}px"'
        parts.append(
            f'<text {style} x="{left - 5}" y="{top + middle + 0.35 * size:.1f}" text-anchor="end">{short}</text>'
        )
        place = f"translate({left + middle + 0.35 * size:.1f} {top - 5}) rotate(-90)"
        parts.append(f'<text {style} transform="{place}">{short}</text>')
        for j, other in enumerate(names):
            share = shares[i, j]
            if math.isnan(share):
                continue
            x, y = left + j * cell, top + i * cell
            hint = f"{escape(name)} → {escape(other)}: {100 * share:.1f} %"
            parts.append(
                f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'fill-opacity="{0.04 + 0.96 * share:.3f}"><title>{hint}</title></rect>'
            )
            if cell >= 17 and share >= 0.005:
                kind = "on" if share > 0.55 else "value"
                text = f'<text class="{kind}" style="font-size:{min(10, 0.45 * cell):.1f}px" text-anchor="middle" '
                parts.append(f'{text}x="{x + cell / 2 - 0.5:.1f}" y="{y + cell / 2 + 3:.1f}">{100 * share:.0f}</text>')
    return _svg(title, math.ceil(top + count * cell + 2), parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * x for x in (1, 2, 5, 10) if power * x >= span / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def number(value: float, step: float, percent: bool = False) -> str:
    """As many digits as steps of this size need."""
    step = 100 * step if percent else step
    if value != 0 and abs(step) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(step) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.{max(0, -math.floor(math.log10(step)))}f}"


def spread(places: Sequence[float], low: float, high: float) -> list[float]:
    """The places moved apart to `LETTER_GAP`, in their order, between low and high where they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    floor = low
    for i in order:
        moved[i] = floor = max(places[i], floor)
        floor += LETTER_GAP
    ceiling = max(high, low + LETTER_GAP * (len(places) - 1))
    for i in reversed(order):
        moved[i] = ceiling = min(moved[i], ceiling)
        ceiling -= LETTER_GAP
    return moved


def _dash(row: int) -> str:
    dash = DASHES[row % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return f"{opening}{''.join(parts)}</svg>"
