r"""FixMatch for segmentation, as the UniMatch authors published it (arXiv 2208.09910 and 2410.10777).

.. math:: L = \tfrac12 (L_x + L_s)

L_x is cross-entropy with the labels. L_s is cross-entropy of a strong view, cut and mixed, with what the weak view is
labelled, over the pixels whose confidence reaches the threshold, divided by the number of pixels that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from corrmatch.config import key
from corrmatch.data.streams import LABELED, MIX, UNLABELED, Stream
from corrmatch.methods.base import Batch, Progress, Step
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import answer
from corrmatch.methods.parts.weak_to_strong import WeakToStrong


class FixMatch(WeakToStrong):
    """FixMatch. As first published the network labels its own weak views, and images of a further stream are pasted.

    The second form (2024) is `teacher=eval partner=batch`: an averaged network labels, and images of the same batch, in
    reverse order, are pasted.
    """

    @dataclass
    class Options(WeakToStrong.Options):
        """Teacher, thresholds and images for CutMix."""

        partner: str = key("stream", "what CutMix pastes: another stream, or the reversed batch",
                           choices=("stream", "batch"))  # fmt: skip

    def streams(self) -> Mapping[str, Stream]:
        """Labelled and unlabelled images, and images for CutMix if they are another stream."""
        mix = {"mix": MIX} if self.options.partner == "stream" else {}
        return {"labeled": LABELED, "unlabeled": UNLABELED} | mix

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The two terms, and those of the propagated logits if there is a correlation head."""
        if progress.step < self.first_steps:
            return self.learn_labels(batch["labeled"])
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, box, strong = labeled["label"], unlabeled["box"][:, 0], unlabeled["strong"][:, 0]
        count, size = truth.shape[0], (truth.shape[1], truth.shape[2])
        mix, other = batch.get("mix"), None
        if mix is not None:
            said = answer(self.model, self.teacher, mix["weak"], features=part.spreads)
            other = PseudoLabels.of(part.spread(said), mix["ignore"])
        strong = paste(strong, strong.flip(0) if mix is None else mix["strong"][:, 0], box)
        if self.teacher is not None:
            weak = self.teacher(unlabeled["weak"], correlate=part.regions, features=part.spreads)
            both = self.model(torch.cat([labeled["image"], strong]), correlate=part.head)
            labelled, mixed = both.split(count)
        else:
            images = torch.cat([labeled["image"], unlabeled["weak"]])
            both = self.model(images, correlate=part.head, features=part.spreads)
            labelled, weak = both.split(count)
            mixed = self.model(strong, correlate=part.head)
        pseudo, threshold = self.label(weak, unlabeled["ignore"])
        target = pseudo.paste(pseudo.reversed() if other is None else other, box)
        masks = part.masks(weak, size, progress)
        labels, reliable = part.targets(target, threshold, masks, ~box & target.counted, weak.logits.shape[1])
        loss, scalars = self.learn_mixed(labelled, truth, mixed, (labels, reliable, target.counted), progress)
        scalars["reliable"] = pseudo.reliable(threshold).sum() / pseudo.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)
