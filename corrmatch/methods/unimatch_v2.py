r"""UniMatch V2 (TPAMI 2025, arXiv 2410.10777): two strong views that see complementary channels.

.. math:: L = \tfrac12 \left( L_x + \tfrac12 (L_1 + L_2) \right)

L_k is the cross-entropy of strong view k, mixed with the reversed batch, with what an averaged network says of the weak
views, over the pixels whose confidence reaches the threshold, divided by the number of pixels that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from corrmatch.config import Config, key
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import WEAK_STRONG_STRONG
from corrmatch.methods.base import Batch, Method, Progress, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory


class UniMatchV2(Method):
    """UniMatch V2. What it needs of a network are the `widths` of its features, for the dropout between its parts."""

    @dataclass
    class Options:
        """The threshold, and the averaged network that labels and is evaluated."""

        threshold: float = key(0.95, "confidence from which a pseudo-label counts", low=0, high=1)
        decay: float = key(0.996, "of the averaged network", low=0, high=1)

    score_all = True
    bar = ("reliable",)
    labels_first = True

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.teacher = Teacher(self.model, self.options.decay, ramp=True, mode="eval", buffers="average")

    def streams(self) -> Mapping[str, Stream]:
        """Labelled, and unlabelled with two strong views."""
        return {"labeled": LABELED, "unlabeled": replace(UNLABELED, view=WEAK_STRONG_STRONG)}

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The three terms; with a correlation head those of the propagated logits besides."""
        if progress.step < self.first_steps:
            return self.learn_labels(batch["labeled"])
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, boxes, theta = labeled["label"], unlabeled["box"].unbind(1), self.options.threshold
        images, size = unlabeled["weak"], (truth.shape[1], truth.shape[2])
        weak = self.teacher(images, correlate=part.regions)
        pseudo = PseudoLabels.of(weak.logits, unlabeled["ignore"])
        labelled = self.model(labeled["image"], correlate=part.head)
        views = [paste(view, view.flip(0), box) for view, box in zip(unlabeled["strong"].unbind(1), boxes, strict=True)]
        factors = complementary_dropout(len(images), self.model.widths, images.device)
        strong = self.model(torch.cat(views), correlate=part.head, factors=factors)
        along = part.logits(strong).chunk(2) if part.head else (None, None)

        masks = part.masks(weak, size, progress)
        scalars = {"x": self.supervised(labelled.logits, truth)}
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(labelled), truth)
        for k, (logits, propagated, box) in enumerate(zip(strong.logits.chunk(2), along, boxes, strict=True), start=1):
            mixed = pseudo.paste(pseudo.reversed(), box)
            labels, reliable = part.targets(mixed, theta, masks, ~box & mixed.counted, logits.shape[1])
            scalars[f"s{k}"] = losses.pseudo_supervised(logits, labels, reliable, mixed.counted)
            if propagated is not None:
                corr = losses.pseudo_supervised(propagated, labels, reliable, mixed.counted)
                scalars[f"corr{k}"] = part.from_start(corr, progress)
        loss = (scalars["x"] + (scalars["s1"] + scalars["s2"]) / 2) / 2
        if part.head:
            loss = loss + part.weight * (scalars["x_corr"] + (scalars["corr1"] + scalars["corr2"]) / 2) / 2
        scalars["reliable"] = pseudo.reliable(theta).sum() / pseudo.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)

    def after_step(self, progress: Progress) -> None:
        """The averaged network follows."""
        self.teacher.follow(self.model, progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The averaged network before the trained one."""
        return {"teacher": self.teacher.network, "student": self.model}


def complementary_dropout(images: int, widths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Factors (2 images, width) of the channels of both views' features, one for each width.

    Every channel is kept by one of the two views, at random, and doubled there. Half of the images, rounded down, are
    drawn to go without. Drawn from the generator that dropout draws from, by each process for itself.
    """
    kept = [2.0 * torch.randint(2, (images, width), device=device) for width in widths]
    order = torch.randperm(images, device=device)
    return [complementary(first, order) for first in kept]


def complementary(first: Tensor, order: Tensor) -> Tensor:
    """Factors of both views from those of the first (n, width), 0 or 2; the first floor(n / 2) of the order are 1."""
    spared = torch.zeros(len(order), 1, dtype=torch.bool, device=order.device)
    spared[order[: len(order) // 2]] = True
    return torch.cat([first, 2 - first]).where(~spared.repeat(2, 1), 1.0)
