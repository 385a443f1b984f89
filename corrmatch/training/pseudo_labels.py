"""The section of the page about the quality of pseudo-labels. `diagnostics.rates` explains the scalars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from corrmatch.training.compare import Line, Row
from corrmatch.training.markup import chart_grid, figure, legend, named, number, percent, section, table

SHARES = {
    "coverage": "coverage",
    "precision": "precision",
    "after_coverage": "coverage after regions",
    "after_precision": "precision after regions",
    "added": "added by regions",
    "added_precision": "added: right",
    "added_precision_own": "added: right as labelled before",
    "changed": "changed by regions",
    "changed_precision": "changed: right",
    "changed_precision_own": "changed: right before",
    "purity": "purity of region masks",
    "area": "area of region masks",
    "support_share": "effective support of a correlation row",
}
OF_A_CLASS = {
    "coverage": "coverage",
    "recall": "rightly labelled",
    "precision": "precision",
    "after_coverage": "coverage after",
    "after_recall": "rightly labelled after",
    "after_precision": "precision after",
}
RARE = 0.1  # of the pixels of a class; with fewer correct labels the class is not learnt


def pseudo_labels(rows: Sequence[Row]) -> str:
    """The section for runs with `eval.pseudo_labels`: sentences, a table, charts over steps, and a table of classes."""
    measured = [row for row in rows if all(run.lines.get("pseudo") for run in row.runs)]
    if not measured:
        return ""
    words = [
        f"<h3>{named(row)}</h3><ul>{''.join(f'<li>{text}</li>' for text in reading(row))}</ul>" for row in measured
    ]
    note = (
        '<p class="note">Held against masks of unlabelled images that training never sees, in percent, at the last '
        "evaluation. <em>Coverage</em>: reliable pixels among all whose class is known. <em>Precision</em>: right ones "
        "among the reliable; of a class, among those labelled so.</p>"
    )
    lines = [
        (title, {row.letter: percent(row.last(name, "pseudo")) for row in measured})
        for name, title in SHARES.items()
        if any(name in row.names("pseudo") for row in measured)
    ]
    figures = [figure(name, measured, "pseudo", percent=True, title=title) for name, title in SHARES.items()]
    tables = [f"<h3>{named(row)}: by class</h3>{_classes(row)}" for row in measured]
    return section(
        "Pseudo-labels",
        note + "".join(words) + table("", lines) + legend(measured) + chart_grid(figures) + "".join(tables),
    )


def reading(row: Row) -> Iterator[str]:
    """The meaning of the numbers as sentences in HTML."""
    coverage, precision = (number(row.last(name, "pseudo").mean) for name in ("coverage", "precision"))
    yield f"Reliable labels cover {coverage} % of the pixels; {precision} % of them are right."
    recalls = {name: row.last(f"recall_{name}", "pseudo").mean for name in _names(row)}
    rare = [f"{escape(name)} ({number(recall)} %)" for name, recall in recalls.items() if recall < RARE]
    if rare:
        yield f"Less than a tenth rightly labelled, so hardly taught: {', '.join(rare)}."
    if "added" not in row.names("pseudo"):
        return
    shares = [_rewritten(run.lines["pseudo"][-1]) for run in row.runs]
    touched, right, before = (sum(values) for values in zip(*shares, strict=True))
    if touched == 0:
        yield "Region propagation gives no pixel another label."
        return
    verdict = "It helps" if right > before else "It harms" if right < before else "It makes no difference"
    yield (
        f"Region propagation adds or changes the labels of {number(touched / len(row.runs))} % of the pixels. "
        f"{number(right / touched)} % of these are right; as labelled before, {number(before / touched)} % were. "
        f"<strong>{verdict}.</strong>"
    )


def _rewritten(line: Line) -> tuple[float, float, float]:
    """Pixels that propagation added and changed: how many, how many are right, and how many were right before."""
    parts = [name for name in ("added", "changed") if line[name] > 0]  # the precision of no pixels is undefined
    right, before = (sum(line[name] * line[name + kind] for name in parts) for kind in ("_precision", "_precision_own"))
    return sum(line[name] for name in parts), right, before


def _classes(row: Row) -> str:
    names, logged = _names(row), set(row.names("pseudo"))
    kinds = {kind: title for kind, title in OF_A_CLASS.items() if f"{kind}_{names[0]}" in logged}
    return table("class", [
        (escape(name), {title: percent(row.last(f"{kind}_{name}", "pseudo")) for kind, title in kinds.items()})
        for name in names
    ])  # fmt: skip


def _names(row: Row) -> list[str]:
    """The table of classes."""
    return [name.removeprefix("iou_") for name in row.names("val") if name.startswith("iou_")]
