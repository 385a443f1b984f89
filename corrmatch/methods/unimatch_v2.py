r"""UniMatch V2 (TPAMI 2025, arXiv 2410.10777): two strong views that see complementary channels.

.. math:: L = \tfrac12 \left( L_x + \tfrac12 (L_1 + L_2) \right)

L_k is the cross-entropy of strong view k, mixed with the reversed batch, with what an averaged network says of the weak
views, over the pixels whose confidence reaches the threshold, divided by the number of pixels that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corrmatch.config import key
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import WEAK_STRONG_STRONG
from corrmatch.methods.base import Batch, Progress, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.pseudo_labels import paste
from corrmatch.methods.parts.teacher import MODES, answer
from corrmatch.methods.parts.weak_to_strong import WeakToStrong


class UniMatchV2(WeakToStrong):
    """UniMatch V2. It needs the `widths` of the network's features, for dropout between backbone and decoder."""

    @dataclass
    class Options(WeakToStrong.Options):
        """A teacher makes the pseudo-labels."""

        teacher: str = key("eval", "mode of the averaged network, which labels and is evaluated", choices=MODES)

    score_all = True

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images, and unlabelled ones with two strong views."""
        return {"labeled": LABELED, "unlabeled": replace(UNLABELED, view=WEAK_STRONG_STRONG)}

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The three terms, and those of the propagated logits if there is a correlation head."""
        if progress.step < self.first_steps:
            return self.learn_labels(batch["labeled"])
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, boxes = labeled["label"], unlabeled["box"].unbind(1)
        images, size = unlabeled["weak"], (truth.shape[1], truth.shape[2])
        weak = answer(self.model, self.teacher, images, correlate=part.regions, features=part.spreads)
        pseudo, threshold = self.label(weak, unlabeled["ignore"])
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
            labels, reliable = part.targets(mixed, threshold, masks, ~box & mixed.counted, logits.shape[1])
            scalars[f"s{k}"] = losses.pseudo_supervised(logits, labels, reliable, mixed.counted)
            if propagated is not None:
                corr = losses.pseudo_supervised(propagated, labels, reliable, mixed.counted)
                scalars[f"corr{k}"] = part.from_start(corr, progress)
        loss = (scalars["x"] + (scalars["s1"] + scalars["s2"]) / 2) / 2
        if part.head:
            loss = loss + part.weight * (scalars["x_corr"] + (scalars["corr1"] + scalars["corr2"]) / 2) / 2
        scalars["reliable"] = pseudo.reliable(threshold).sum() / pseudo.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)


def complementary_dropout(images: int, widths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Factors (2 images, width) of the channels of both views' features, one for each width.

    Every channel is kept by one of the two views, at random, and doubled there. Half of the images, rounded down, are
    drawn to go without. Drawn from the generator that dropout draws from, by each process for itself.
    """
    kept = [2.0 * torch.randint(2, (images, width), device=device) for width in widths]
    order = torch.randperm(images, device=device)
    return [complementary(first, order) for first in kept]


def complementary(first: Tensor, order: Tensor) -> Tensor:
    """Factors of both views from those of the first (n, width), 0 or 2. The first floor(n / 2) of the order get 1."""
    spared = torch.zeros(len(order), 1, dtype=torch.bool, device=order.device)
    spared[order[: len(order) // 2]] = True
    return torch.cat([first, 2 - first]).where(~spared.repeat(2, 1), 1.0)
