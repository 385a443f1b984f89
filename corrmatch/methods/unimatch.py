r"""UniMatch (CVPR 2023, arXiv 2208.09910): two strong views and perturbed features under one weak view.

.. math:: L = \tfrac12 \left( L_x + \tfrac14 L_1 + \tfrac14 L_2 + \tfrac12 L_{fp} \right)

L_k is the cross-entropy of strong view k, cut and mixed, with what the weak views are labelled; L_fp that of the weak
view decoded from perturbed features. Both run over the pixels whose confidence reaches the threshold, divided by the
number of pixels that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from corrmatch.data.streams import LABELED, MIX, UNLABELED, Stream
from corrmatch.data.views import WEAK_STRONG_STRONG
from corrmatch.methods.base import Batch, Progress, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import answer
from corrmatch.methods.parts.weak_to_strong import WeakToStrong


class UniMatch(WeakToStrong):
    """UniMatch. As published the network labels its own weak views; with `teacher` its moving average does."""

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images, unlabelled ones with two strong views, and images for CutMix."""
        views = {"unlabeled": UNLABELED, "mix": MIX}
        return {"labeled": LABELED} | {name: replace(s, view=WEAK_STRONG_STRONG) for name, s in views.items()}

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The four terms, and those of the propagated logits if there is a correlation head."""
        if progress.step < self.first_steps:
            return self.learn_labels(batch["labeled"])
        labeled, unlabeled, mix, part = batch["labeled"], batch["unlabeled"], batch["mix"], self.propagation
        truth, boxes = labeled["label"], unlabeled["box"].unbind(1)
        count, size = truth.shape[0], (truth.shape[1], truth.shape[2])
        said = answer(self.model, self.teacher, mix["weak"], features=part.spreads)
        other = PseudoLabels.of(part.spread(said), mix["ignore"])
        both = torch.cat([labeled["image"], unlabeled["weak"]])
        plain = self.model(both, perturb=True, correlate=part.head, features=part.spreads)
        labelled, perturbed = plain.split(count)
        weak = perturbed
        if self.teacher is not None:
            weak = self.teacher(unlabeled["weak"], correlate=part.regions, features=part.spreads)
        pairs = zip(unlabeled["strong"].unbind(1), mix["strong"].unbind(1), boxes, strict=True)
        strong = self.model(torch.cat([paste(*pair) for pair in pairs]), correlate=part.head)
        along = part.logits(strong).chunk(2) if part.head else (None, None)

        pseudo, threshold = self.label(weak, unlabeled["ignore"])
        masks = part.masks(weak, size, progress)
        scalars = {"x": self.supervised(labelled.logits, truth)}
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(labelled), truth)
        for k, (logits, propagated, box) in enumerate(zip(strong.logits.chunk(2), along, boxes, strict=True), start=1):
            mixed = pseudo.paste(other, box)
            labels, reliable = part.targets(mixed, threshold, masks, ~box & mixed.counted, logits.shape[1])
            scalars[f"s{k}"] = losses.pseudo_supervised(logits, labels, reliable, mixed.counted)
            if propagated is not None:
                corr = losses.pseudo_supervised(propagated, labels, reliable, mixed.counted)
                scalars[f"corr{k}"] = part.from_start(corr, progress)
        reliable = pseudo.reliable(threshold)
        scalars["fp"] = losses.pseudo_supervised(perturbed.perturbed, pseudo.labels, reliable, pseudo.counted)
        loss = (scalars["x"] + (scalars["s1"] + scalars["s2"]) / 4 + scalars["fp"] / 2) / 2
        if part.head:
            loss = loss + part.weight * (scalars["x_corr"] + (scalars["corr1"] + scalars["corr2"]) / 4) / 2
        scalars["reliable"] = reliable.sum() / pseudo.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)
