"""Draws the curves of one training run.

python benchmarks/plot_run.py runs/sample out.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {
    "Supervised terms": {"x": "cross-entropy", "x_corr": "of propagated logits"},
    "Unsupervised terms": {"s": "strong", "kl": "KL", "fp": "perturbed", "corr": "propagated"},
    "Shares": {
        "reliable": "reliable before propagation",
        "reliable_after": "reliable after",
        "mask_area": "area of a region mask",
        "threshold": "threshold",
    },
}


def draw(run: Path, out: Path) -> None:
    """Losses, shares of pixels and the mean IoU against the step."""
    lines = [json.loads(line) for line in (run / "scalars.jsonl").read_text().splitlines()]
    train, val = ([line for line in lines if line["kind"] == kind] for kind in ("train", "val"))
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(PANELS) + 1)
    for ax, (title, curves) in zip(axes, PANELS.items(), strict=False):
        for name, label in curves.items():
            ax.plot([line["step"] for line in train], [line[name] for line in train], label=label)
        ax.set_title(title)
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    axes[-1].plot([line["step"] for line in val], [100 * line["miou"] for line in val], marker="o")
    axes[-1].set_title("Validation, mean IoU, %")
    for ax in axes:
        ax.set_xlabel("step")
        ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
