"""The page of `corrmatch compare`: one self-contained HTML file."""

from __future__ import annotations

import importlib.resources
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from corrmatch.training import charts
from corrmatch.training.charts import Bar
from corrmatch.training.compare import Row, differing, read_rows
from corrmatch.training.markup import (
    POINTS,
    chart_grid,
    color_legend,
    counted,
    difference,
    figure,
    image,
    image_grid,
    legend,
    named,
    number,
    percent,
    section,
    setting,
    table,
)
from corrmatch.training.pseudo_labels import pseudo_labels
from corrmatch.training.snapshot import Views

LARGEST_MATRIX = 40  # classes; the cells of a larger matrix are too small to see
CONFUSIONS = 6  # the number of pairs listed below a matrix
FIRST = ("image", "truth", "prediction")  # the views that all runs have


def compare(folders: Sequence[Path], out: Path) -> list[Row]:
    """Reads runs and writes the page atomically. An existing file is replaced."""
    rows = read_rows(folders)
    draft = out.with_name(f"{out.name}.partial")
    draft.write_text(page(rows), encoding="utf-8")
    os.replace(draft, out)
    return rows


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    style = importlib.resources.files("corrmatch.training").joinpath("page.css").read_text(encoding="utf-8")
    runs = sum(len(row.runs) for row in rows)
    title = f"{counted(runs, 'run')} in {counted(len(rows), 'row')}"
    sections = [results, validation, classes, confusions, pseudo_labels, images, training, settings, all_runs]
    body = "\n".join(section(rows) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>corrmatch: {title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="note">Runs in one row differ in seed, split and folder only. Letters, colours and dashes mean the same row all
over the page.</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def results(rows: Sequence[Row]) -> str:
    """The table of means and deviations."""
    first = rows[0].last("miou").mean
    body = []
    for row in rows:
        last = row.last("miou")
        cells = {
            "runs": str(len(row.runs)),
            "last step": _steps(row),
            "mean IoU, last": percent(last),
            f"against {rows[0].letter}": "&ndash;" if row is rows[0] else difference(100 * (last.mean - first)),
            "mean IoU, best": percent(row.spread(lambda run: run.best["miou"])),
            "accuracy, last": percent(row.last("accuracy")),
        }
        body.append((named(row), cells))
    note = (
        "In percent. Mean ± sample standard deviation over the runs of a row; of a single run there is no deviation. "
        "<em>Last</em> is the last evaluation. <em>Best</em> is each run's highest, chosen on the images that it is "
        "measured on."
    )
    unequal = [row.letter for row in rows if len({run.last["step"] for run in row.runs}) > 1]
    if unequal:
        note += f" The runs of {', '.join(unequal)} have come to different steps."
    return section("Results", f'<p class="note">{note}</p>{table("row", body)}')


def validation(rows: Sequence[Row]) -> str:
    """Charts of mean IoU and accuracy over steps, also of further networks."""
    names = dict.fromkeys(name for row in rows for name in row.names("val") if not name.startswith("iou_"))
    figures = [figure(name, rows, "val", percent=True) for name in names]
    note = '<p class="note">In percent. Bands reach from the lowest to the highest run of a row.</p>'
    return section("Validation over training", legend(rows) + note + chart_grid(figures))


def classes(rows: Sequence[Row]) -> str:
    """A bar chart for each class, with a bar for each row."""
    names = dict.fromkeys(name for row in rows for name in row.names("val") if name.startswith("iou_"))
    share = _pixel_shares(rows)
    figures = []
    for scalar in names:
        name = scalar.removeprefix("iou_")
        found = [Bar(row.index, row.letter, *row.last(scalar)) for row in rows if scalar in row.names("val")]
        hint = f" <small>{100 * share[name]:.1f} % of the pixels</small>" if name in share else ""
        figures.append(
            f"<figure><figcaption>{escape(name)}{hint}</figcaption>{charts.bars(f'IoU of {name}', found)}</figure>"
        )
    note = "Intersection over union in percent at the last evaluation. Lines reach one standard deviation to each side."
    return section("Classes", legend(rows) + f'<p class="note">{note}</p>' + chart_grid(figures))


def confusions(rows: Sequence[Row]) -> str:
    """The confusion matrix of each row, and its largest entries off the diagonal."""
    figures = []
    for row in rows:
        counts, kept = row.confusion, [run.snapshot for run in row.runs if run.snapshot is not None]
        if counts is None:
            continue
        names, total = kept[0].classes, counts.sum(1, keepdims=True)
        shares = np.where(total > 0, counts / np.maximum(total, 1), math.nan)
        wrong = [(shares[i, j], i, j) for i, j in np.argwhere(shares > 0) if i != j]
        worst = [
            f"<li>{escape(names[i])} taken for {escape(names[j])}: {100 * share:.1f} %</li>"
            for share, i, j in sorted(wrong, reverse=True)[:CONFUSIONS]
        ]
        matrix = ""
        if len(names) <= LARGEST_MATRIX:
            matrix = charts.heatmap(f"Confusion matrix of {row.name}", shares, names)
        listed = f"<ol>{''.join(worst)}</ol>"
        figures.append(f"<figure><figcaption>{named(row)}</figcaption>{matrix}{listed}</figure>")
    if not figures:
        return ""
    note = "Of the pixels of a class (left), the percentage labelled as each class (above), at the last evaluation."
    return section("Confusion", f'<p class="note">{note}</p>' + chart_grid(figures))


def images(rows: Sequence[Row]) -> str:
    """The same validation images for all rows. Each row shows the first of its runs that kept images."""
    shown: dict[tuple[str, bytes], list[tuple[Row, Views]]] = {}  # by name and image
    lists: list[list[str]] = []
    for row in rows:
        kept = next((run.snapshot for run in row.runs if run.snapshot is not None and run.snapshot.panels), None)
        if kept is None:
            continue
        lists += [kept.classes] if kept.classes not in lists else []
        for panel in kept.panels:
            shown.setdefault((panel.name, panel.views["image"]), []).append((row, panel.views))
    blocks = []
    for (name, _), found in shown.items():
        common = found[0][1]
        figures = [image(view, common[view]) for view in FIRST[:2] if view in common]
        for view in ("prediction", *dict.fromkeys(name for _, views in found for name in views if name not in FIRST)):
            figures += [
                image(f"{named(row, short_name=True)} {escape(view)}", views[view])
                for row, views in found
                if view in views
            ]
        blocks.append(f"<h3>{escape(name)}</h3>{image_grid(figures)}")
    if not blocks:
        return ""
    colors = "".join(color_legend(names) for names in lists)
    note = '<p class="note">Validation images at the last evaluation of the first run of each row.</p>'
    return section("Images", legend(rows) + note + colors + "".join(blocks))


def training(rows: Sequence[Row]) -> str:
    """All scalars of the training log; learning rates last."""
    names = dict.fromkeys(name for row in rows for name in row.names("train"))
    ordered = sorted(names, key=lambda name: name.startswith("lr_"))
    figures = [figure(name, rows, "train") for name in ordered]
    note = f'<p class="note">As logged in training; means of neighbours where there are more than {POINTS} values.</p>'
    return section("Training", legend(rows) + note + chart_grid(figures))


def settings(rows: Sequence[Row]) -> str:
    """The keys that differ between rows, and those that all rows share."""
    found = [row.setting for row in rows]
    keys, parts = differing(found), []
    if keys:
        lines = [
            (
                f"<code>{escape(key)}</code>",
                {row.letter: f"<code>{setting(row.setting.get(key, ''))}</code>" for row in rows},
            )
            for key in keys
        ]
        parts.append(table("key", lines, text=True))
    shared = {key: value for key, value in found[0].items() if key not in keys}
    text = ", ".join(f"{escape(key)}={setting(value)}" for key, value in shared.items())
    parts.append(f'<p class="note">{"The same in all rows" if len(rows) > 1 else "All keys"}: <code>{text}</code></p>')
    return section("Settings", "".join(parts))


def all_runs(rows: Sequence[Row]) -> str:
    """A table of single runs."""
    body = []
    for row in rows:
        for run in row.runs:
            split = run.config["data.labeled"]
            cells = {
                "seed": str(run.config["train.seed"]),
                "labelled": "" if run.snapshot is None else str(run.snapshot.labeled),
                "list": "" if split is None else escape(split),
                "last step": str(run.last["step"]),
                "mean IoU, last": number(run.last["miou"]),
                "mean IoU, best": f'{number(run.best["miou"])} <span class="deviation">at {run.best["step"]}</span>',
                "accuracy, last": number(run.last["accuracy"]),
            }
            body.append((f'<span class="row"><b>{row.letter}</b><code>{escape(str(run.folder))}</code></span>', cells))
    return section("Runs", table("run", body))


def _pixel_shares(rows: Sequence[Row]) -> dict[str, float]:
    """The share of each class among the labelled pixels, from the first row that kept them."""
    for row in rows:
        counts, kept = row.confusion, [run.snapshot for run in row.runs if run.snapshot is not None]
        if counts is not None and counts.sum() > 0:
            return dict(zip(kept[0].classes, (counts.sum(1) / counts.sum()).tolist(), strict=True))
    return {}


def _steps(row: Row) -> str:
    steps = sorted({run.last["step"] for run in row.runs})
    return f"{steps[0]}&ndash;{steps[-1]}" if len(steps) > 1 else str(steps[0])
