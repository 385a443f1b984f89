"""Elements of the page in HTML."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from corrmatch.training import charts
from corrmatch.training.charts import Curve
from corrmatch.training.compare import Row, Spread, short
from corrmatch.training.snapshot import media_type
from corrmatch.training.visualization import palette

POINTS = 120  # the most that a curve has; longer logs are averaged over neighbouring steps


def legend(rows: Sequence[Row]) -> str:
    """Letter, line and name of each row."""
    return f'<ul class="legend">{"".join(f"<li>{named(row)}</li>" for row in rows)}</ul>'


def table(first: str, rows: Sequence[tuple[str, dict[str, str]]], *, text: bool = False) -> str:
    """Rows of named cells, numbers or `text`. On a narrow screen each row becomes a card."""
    kind = ' class="text"' if text else ""
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name in rows[0][1])
    lines = []
    for name, cells in rows:
        filled = "".join(f'<td{kind} data-label="{escape(label)}">{cell}</td>' for label, cell in cells.items())
        lines.append(f"<tr><th>{name}</th>{filled}</tr>\n")
    opening = f'<div class="wide"><table><thead><tr><th>{first}</th>{head}</tr></thead><tbody>'
    return f"{opening}\n{''.join(lines)}</tbody></table></div>"


def named(row: Row, *, short_name: bool = False) -> str:
    """The legend of one row: line, letter and name."""
    name = "" if short_name else escape(row.name)
    return f'<span class="row">{charts.swatch(row.index)}<b>{row.letter}</b>{name}</span>'


def section(title: str, content: str) -> str:
    """A section of the page."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def chart_grid(figures: Sequence[str]) -> str:
    """Charts of 360 units, as many side by side as fit."""
    return '<div class="charts">\n' + "\n".join(figures) + "\n</div>"


def image_grid(figures: Sequence[str]) -> str:
    """Images, as many side by side as fit."""
    return '<div class="images">\n' + "\n".join(figures) + "\n</div>"


def figure(name: str, rows: Sequence[Row], kind: str, *, percent: bool = False, title: str = "") -> str:
    """The chart of a scalar over steps; empty if no row has it."""
    curves = [curve for row in rows if (curve := _curve(row, kind, name)) is not None]
    if not curves:
        return ""
    title = title or _title(name)
    chart = charts.lines(f"{title} over steps", curves, percent=percent)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def _title(name: str) -> str:
    first, *more = name.split("_")
    return " ".join(["mean IoU" if first == "miou" else first, *more])


def _curve(row: Row, kind: str, name: str) -> Curve | None:
    over = row.over_steps(kind, name)
    if not over:
        return None
    steps, values = np.array(list(over)), np.array(list(over.values()))
    size = math.ceil(len(steps) / POINTS)
    starts = np.arange(0, len(steps), size)
    lengths = np.diff([*starts, len(steps)])
    steps, values = np.add.reduceat(steps, starts) / lengths, np.add.reduceat(values, starts) / lengths[:, None]
    return Curve(row.index, row.letter, *(x.tolist() for x in (steps, values.mean(1), values.min(1), values.max(1))))


def image(caption: str, encoded: bytes) -> str:
    """An encoded image with HTML below it."""
    source = f"data:{media_type(encoded)};base64,{base64.b64encode(encoded).decode()}"
    return f'<figure><img src="{source}" alt=""><figcaption>{caption}</figcaption></figure>'


def color_legend(names: list[str]) -> str:
    """The legend of label maps: classes and their colours."""
    colors = palette(names)
    chips = (
        f'<li><span class="chip" style="background:rgb({r} {g} {b})"></span>{escape(name)}</li>'
        for name, (r, g, b) in zip(names, colors.tolist(), strict=False)
    )
    return f'<ul class="legend">{"".join(chips)}</ul>'


def percent(spread: Spread) -> str:
    """Mean and standard deviation in per cent."""
    more = "" if math.isnan(spread.deviation) else f' <span class="deviation">± {100 * spread.deviation:.2f}</span>'
    return number(spread.mean) + more


def number(share: float) -> str:
    """A share in per cent."""
    return "n/a" if math.isnan(share) else f"{100 * share:.2f}"


def difference(value: float) -> str:
    """A number with its sign."""
    return "n/a" if math.isnan(value) else f"{value:+.2f}".replace("-", "&minus;")


def setting(value: object) -> str:
    """The value of a key."""
    return escape(short(value))


def counted(number: int, noun: str) -> str:
    """A count with its noun, in singular or plural."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
