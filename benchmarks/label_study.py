"""Measures pseudo-labels of a trained network by class, under combinations of correction, propagation and share.

    python benchmarks/label_study.py CHECKPOINT [--tau 0 0.5] [--temperature 0.05] [--share 0.5] --out FILE.json

labels whole unlabelled images whose masks are available, and prints for each combination the share of right labels and,
for each class, precision, recall and the share of its pixels that are labelled as another class. Values are `none` or
those of the keys `propagation.label_temperature` and `class_share`. A share keeps the most confident pixels of
each label, over all images. tau is that of `train.logit_adjustment`, for a network that was trained without it: tau
log(class frequency) is subtracted from its logits. Labels are compared at the stride of the logits. Nothing is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from harness.machine import environment
from torch import Tensor

from corrmatch.config import PropagationConfig
from corrmatch.data.classes import log_frequencies
from corrmatch.data.datasets import IGNORE, Data, find_data
from corrmatch.data.whole import Labelled
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.models.network import Network, Prediction
from corrmatch.training.predict import load_model

Setting = tuple[float, float | None, float | None]  # tau, temperature, share


@dataclass
class Labelling:
    """Predictions on unlabelled images, and their true labels at the stride of the logits."""

    predictions: list[Prediction]
    truth: Tensor
    log_frequencies: Tensor  # of the classes in the labels

    @classmethod
    @torch.inference_mode()
    def of(cls, network: Network, data: Data, images: int) -> Labelling:
        """Predictions on so many images, which are spread evenly over the list."""
        items = data.withheld[:: max(1, len(data.withheld) // images)]
        predictions, truth = [], []
        for image, mask in Labelled(items, data.table, None):
            out = network(image[None], features=True)
            predictions.append(out)
            truth.append(F.interpolate(mask[None, None].float(), out.logits.shape[2:])[0, 0].long())
        return cls(predictions, torch.stack(truth), log_frequencies(data))

    def measure(self, tau: float, temperature: float | None, share: float | None) -> dict[str, float | Tensor]:
        """Shares of right and of kept labels; precision, recall and share of wrong labels of each class."""
        classes = len(self.log_frequencies)
        shift = tau * self.log_frequencies[:, None, None]
        part = Propagation(PropagationConfig(label_temperature=temperature))
        logits = [part.spread(x._replace(logits=x.logits - shift)) for x in self.predictions]
        confidence, labels = torch.cat(logits).softmax(1).max(1)
        kept = torch.ones_like(labels, dtype=torch.bool)
        for label in range(classes):
            of_label = labels == label
            if share is not None and of_label.any():
                kept &= ~of_label | (confidence >= confidence[of_label].quantile(1 - share))
        known = self.truth != IGNORE
        kept &= known
        cells = self.truth[kept] * classes + labels[kept]
        confusion = torch.bincount(cells, minlength=classes**2).view(classes, classes).double()
        right, total = confusion.diag(), torch.bincount(self.truth[known], minlength=classes)
        return {
            "right": (right.sum() / confusion.sum()).item(),
            "kept": (confusion.sum() / known.sum()).item(),
            "precision": right / confusion.sum(0),
            "recall": right / total,
            "wrong": (confusion.sum(1) - right) / total,
        }


def optional(text: str) -> float | None:
    """A number, or None for `none`."""
    return None if text == "none" else float(text)


def main(arguments: list[str] | None = None) -> None:
    """Measures all combinations, prints them and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.0])
    parser.add_argument("--temperature", type=optional, nargs="+", default=[None])
    parser.add_argument("--share", type=optional, nargs="+", default=[0.5])
    parser.add_argument("--images", type=int, default=172)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    network, config, classes = load_model(options.checkpoint)
    labelling, found = Labelling.of(network, find_data(config.data), options.images), []
    for setting in itertools.product(options.tau, options.temperature, options.share):
        names = dict(zip(("tau", "temperature", "share"), setting, strict=True))
        measured = labelling.measure(*setting)
        print(names, f"right {100 * measured['right']:.1f}, kept {100 * measured['kept']:.1f} per cent")
        for row in ("precision", "recall", "wrong"):
            print(f"  {row:10}", *(f"{name} {100 * x:.0f}" for name, x in zip(classes, measured[row], strict=True)))
        rounded = {k: v if isinstance(v, float) else [round(x, 4) for x in v.tolist()] for k, v in measured.items()}
        found.append(names | rounded)
    if options.out is not None:
        content = {"checkpoint": f"{options.checkpoint.parent.name}/{options.checkpoint.name}", "classes": classes}
        options.out.write_text(
            json.dumps(content | {"environment": environment("cpu"), "results": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
