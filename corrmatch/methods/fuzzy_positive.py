r"""Fuzzy positive learning (CVPR 2023, arXiv 2210.08519) in cross pseudo supervision with CutMix.

.. math::
    F(s, t) = \log \Bigl(1 + \sum_{i \in P} \sum_{j \notin P} e^{s_j - s_i}\Bigr), \qquad
    L = L_x^{(1)} + L_x^{(2)} + \lambda\,\beta\,\bigl(\overline{w F(s_1, t_2)} + \overline{w F(s_2, t_1)}\bigr)

P are the most probable classes of the other network's logits t: all that come before their probabilities add up to T,
at least one. beta, a number without gradient, gives the sum the value that plain cross-entropy has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corrmatch import ops
from corrmatch.config import Config, key
from corrmatch.data.boxes import toggled_boxes
from corrmatch.data.streams import LABELED, MIX, UNLABELED, Stream
from corrmatch.data.views import GRAY, Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Step
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.threshold import StepThreshold
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction, enlarge

GEOMETRY = Geometry(scales=(0.5, 0.75, 1, 1.5, 1.75, 2), pad="around", fill=GRAY)
WEIGHTS = ("none", "linear", "convex", "concave")
SHARPNESS = 50  # of the concave weight


class Fuzzy(NamedTuple):
    """The target that one network gives the other at each pixel."""

    positive: Tensor  # bool (B, C, H, W)
    weight: Tensor  # (B, H, W)
    labels: Tensor  # (B, H, W), the most probable class


class FuzzyPositive(Method):
    """Two networks that teach one another. The first one is evaluated."""

    @dataclass
    class Options:
        """Positive classes, their weight, and the weight of the other network's targets."""

        confidence: float = key(0.9, "T: what the positives' probabilities are to add up to", low=0, high=1)
        positives: int = key(3, "at most so many classes are positive", low=1)
        weight: str = key("concave", "of a pixel, from how far its classes are apart", choices=WEIGHTS)
        cross_weight: float = key(1.0, "lambda; 5 on Cityscapes", low=0)
        padding: bool = key(True, "pixels of padding count, as in the published code")

    bar = ("positives",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.peer = build()
        self.theta = StepThreshold(build.num_classes, 0.85, 0.999) if self.propagation.regions else None

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images and two streams of unlabelled ones, without changes of colour."""
        streams = {"unlabeled": replace(UNLABELED, view=View(GEOMETRY, box=toggled_boxes)),
                   "mix": replace(MIX, view=View(GEOMETRY))}  # fmt: skip
        return {"labeled": replace(LABELED, view=View(GEOMETRY))} | streams

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The terms of both networks, and those of their propagated logits if they have correlation heads."""
        labeled, base, other, part = batch["labeled"], batch["unlabeled"], batch["mix"], self.propagation
        truth, box, networks = labeled["label"], base["box"][:, 0], (self.model, self.peer)
        ignore = torch.where(box, other["ignore"], base["ignore"])
        counted = torch.ones_like(box) if self.options.padding else ~ignore
        with torch.no_grad():  # in training mode, as published
            asked = [self.ask(network, base, other, box, ignore, progress) for network in networks]
        scalars = {"x": truth.new_zeros((), dtype=torch.float32)}
        cross, corr = [], []
        mixed = paste(base["weak"], other["weak"], box)
        for network, wanted in zip(networks, reversed(asked), strict=True):
            known, out = network(labeled["image"], correlate=part.head), network(mixed, correlate=part.head)
            scalars["x"] = scalars["x"] + self.supervised(known.logits, truth)
            cross.append(fuzzy_losses(out.logits, wanted, counted))
            if part.head:
                corr.append(
                    (self.supervised(part.logits(known), truth), fuzzy_losses(part.logits(out), wanted, counted))
                )
        scalars["cross"] = balanced(cross)
        loss = scalars["x"] + self.options.cross_weight * scalars["cross"]
        if part.head:
            scalars["x_corr"] = torch.stack([x for x, _ in corr]).sum()
            scalars["corr"] = part.from_start(balanced([pair for _, pair in corr]), progress)
            loss = loss + part.weight * (scalars["x_corr"] + self.options.cross_weight * scalars["corr"])
        scalars["positives"] = torch.stack([a.positive.sum(1).float().mean() for a in asked]).mean()
        return Step.of(loss, scalars)

    def ask(
        self, network: nn.Module, base: dict[str, Tensor], other: dict[str, Tensor], box: Tensor, ignore: Tensor,
        progress: Progress,
    ) -> Fuzzy:  # fmt: skip
        """The logits of a network for the mixed images: computed for each image, then mixed."""
        size, part = (box.shape[1], box.shape[2]), self.propagation
        below, above = network(base["weak"], correlate=part.regions), network(other["weak"])
        logits = paste(enlarge(below.logits, size), enlarge(above.logits, size), box)
        fuzzy = fuzzy_positives(logits, self.options.confidence, self.options.positives, self.options.weight)
        if self.theta is None:
            return fuzzy
        return through_regions(fuzzy, logits, below, part, self.theta, ~box & ~ignore, ignore, progress)

    def after_step(self, progress: Progress) -> None:
        """Updates the threshold of the regions."""
        if self.theta is not None:
            self.theta.finish_step()

    @property
    def threshold(self) -> float | Tensor:
        """The threshold of the regions; 0 without regions."""
        return 0.0 if self.theta is None else self.theta.threshold

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """Both networks, for evaluation."""
        return {"first": self.model, "second": self.peer}


def fuzzy_positives(logits: Tensor, confidence: float, positives: int, weight: str) -> Fuzzy:
    """Positive classes and weight of each pixel from logits (B, C, H, W), C > positives.

    Without gradient. n classes are positive: 1 and one more for each j in 2..positives whose first j probabilities add
    up to less than `confidence`.
    """
    if not positives < logits.shape[1]:
        raise ValueError(f"positives: expected fewer than the {logits.shape[1]} classes, got {positives}")
    with torch.no_grad():
        top, order = logits.softmax(1).topk(positives + 1, 1)
        sums = top.cumsum(1)
        count = 1 + (sums[:, 1:positives] < confidence).sum(1, keepdim=True)
        rank = torch.arange(positives + 1, device=logits.device).view(1, -1, 1, 1)
        positive = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, rank < count)
        mean, last = (x.gather(1, count)[:, 0] for x in (sums / (rank + 1), top))
        if weight == "none":
            share = torch.ones_like(mean)
        elif weight == "linear":
            share = (mean - last) / mean
        elif weight == "convex":
            share = (mean - last) / (mean + last)
        else:
            share = (SHARPNESS * (mean - last)).log1p() / (SHARPNESS * mean).log1p()
    return Fuzzy(positive, share, order[:, 0])


def fuzzy_pixels(logits: Tensor, positive: Tensor) -> Tensor:
    """F at each pixel (B, H, W) of logits (B, C, H, W). With one positive class it is cross-entropy."""
    lowest = logits.masked_fill(~positive, torch.inf).neg().logsumexp(1)
    highest = logits.masked_fill(positive, -torch.inf).logsumexp(1)
    return F.softplus(lowest + highest)


def fuzzy_losses(logits: Tensor, wanted: Fuzzy, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the counted pixels of the weighted F, and of plain cross-entropy without gradient."""
    large = enlarge(logits, (counted.shape[1], counted.shape[2]))
    share = counted / counted.sum().clamp(min=1)
    fuzzy = (share * wanted.weight * fuzzy_pixels(large, wanted.positive)).sum()
    return fuzzy, ops.cross_entropy(large.detach(), wanted.labels, share)[0]


def balanced(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the first of each pair, scaled to the value of the sum of the second."""
    fuzzy, plain = (torch.stack(x).sum() for x in zip(*pairs, strict=True))
    return torch.where(fuzzy > 0, plain / fuzzy.detach().clamp(min=torch.finfo(fuzzy.dtype).tiny), 0) * fuzzy


def through_regions(
    fuzzy: Fuzzy, logits: Tensor, out: Prediction, propagation: Propagation, theta: StepThreshold, valid: Tensor,
    ignore: Tensor, progress: Progress,
) -> Fuzzy:  # fmt: skip
    """Targets in which a pixel that region propagation finds reliable has one positive class, the region's label."""
    classes, size = logits.shape[1], (ignore.shape[1], ignore.shape[2])
    labels, confidence, class_peak = ops.pseudo_label(logits, ignore=ignore)
    threshold = theta.update(class_peak)
    masks = propagation.masks(out, size, progress)
    pseudo = PseudoLabels(labels, confidence, ignore)
    after, reliable = propagation.targets(pseudo, threshold, masks, valid, classes)
    one = F.one_hot(after, classes).movedim(-1, 1).bool()
    positive = torch.where(reliable.unsqueeze(1), one, fuzzy.positive)
    return Fuzzy(positive, fuzzy.weight, torch.where(reliable, after, fuzzy.labels))
