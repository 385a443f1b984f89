r"""Scores trained networks with corrected logits, without training.

    python benchmarks/correction_study.py CHECKPOINT... [--tau 0 0.5 1] [--views one several] --out FILE.json

The label of a pixel is the argmax of log p_c - tau log f_c, where f holds the frequencies of the classes in the
labelled images. tau = 0 is the network's own answer. p is the softmax of one view, or its mean over the views
`several`: the image at the scales 0.75, 1, 1.25 and 1.5, each also reflected. The correction needs no unlabelled image.
A method that trains on unlabelled images and gains no more than the correction has not learnt from them. The key
`train.logit_adjustment` trains networks that are corrected already.

Source of the correction: logit adjustment (ICLR 2021, arXiv 2007.07314).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from harness.machine import environment

from corrmatch.data.classes import log_frequencies
from corrmatch.data.datasets import IGNORE, Data, find_data
from corrmatch.data.whole import Labelled
from corrmatch.methods.parts.whole_labels import Views
from corrmatch.models.network import Network
from corrmatch.training.evaluate import Scores
from corrmatch.training.predict import load_model

TINY = torch.finfo(torch.float32).tiny
VIEWS = {"one": Views(), "several": Views((0.75, 1.0, 1.25, 1.5), reflect=True)}


@torch.inference_mode()
def score(network: Network, data: Data, taus: Sequence[float], views: str) -> dict[float, Scores]:
    """The scores on the validation images for each tau."""
    classes = len(data.classes)
    shift = log_frequencies(data)[:, None, None]
    confusion = {tau: torch.zeros(classes, classes, dtype=torch.int64) for tau in taus}
    for image, mask in Labelled(data.val, data.table, None):
        log_probability = VIEWS[views].probability(network, image).clamp(min=TINY).log()
        known = mask != IGNORE
        for tau in taus:
            labels = (log_probability - tau * shift).argmax(0)
            cells = mask[known].long() * classes + labels[known]
            confusion[tau] += torch.bincount(cells, minlength=classes**2).view(classes, classes)
    return {tau: Scores.of(cells, data.classes, len(data.val)) for tau, cells in confusion.items()}


def main(arguments: list[str] | None = None) -> None:
    """Scores all checkpoints, prints the scores and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--tau", type=float, nargs="+", default=[0.0, 0.5, 0.75, 1.0])
    parser.add_argument("--views", choices=VIEWS, nargs="+", default=["one"])
    parser.add_argument("--out", type=Path)
    options, found = parser.parse_args(arguments), []
    for path in options.checkpoints:
        network, config, _ = load_model(path)
        data, name = find_data(config.data), f"{path.parent.name}/{path.name}"
        for views in options.views:
            for tau, scores in score(network, data, options.tau, views).items():
                iou = {c: round(100 * x, 2) for c, x in zip(scores.classes, scores.iou, strict=True)}
                shown = " ".join(f"{c} {x:.0f}" for c, x in iou.items())
                print(f"{name}, {views}, tau {tau}: mean IoU {100 * scores.miou:.2f} ({shown})", flush=True)
                miou, accuracy = round(100 * scores.miou, 2), round(100 * scores.accuracy, 2)
                row = {"checkpoint": name, "views": views, "tau": tau, "miou": miou, "accuracy": accuracy, "iou": iou}
                found.append(row)
    if options.out is not None:
        options.out.write_text(json.dumps({"environment": environment("cpu"), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
