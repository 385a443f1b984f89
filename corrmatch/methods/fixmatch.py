r"""FixMatch for segmentation, as the UniMatch authors published it (arXiv 2208.09910 and 2410.10777).

.. math:: L = \tfrac12 (L_x + L_s)

L_x is cross-entropy with the labels. L_s is cross-entropy of a strong view, cut and mixed, with what the weak view is
labelled, over the pixels whose confidence reaches the threshold, divided by the number of pixels that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corrmatch.config import Config, key
from corrmatch.data.streams import LABELED, MIX, UNLABELED, Stream
from corrmatch.methods.base import Batch, Method, Progress, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.debias import Debias
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import MODES, Teacher, answer
from corrmatch.methods.parts.threshold import class_threshold
from corrmatch.models.factory import NetworkFactory


class FixMatch(Method):
    """FixMatch. As first published the network labels its own weak views, and images of a further stream are pasted.

    The second form (2024) is `teacher=eval partner=batch`: an averaged network labels, and images of the same batch, in
    reverse order, are pasted.
    """

    @dataclass
    class Options:
        """Who labels, from which confidence on, and what is pasted."""

        threshold: float = key(0.95, "confidence from which a pseudo-label counts", low=0, high=1)
        partner: str = key("stream", "what CutMix pastes: another stream, or the reversed batch",
                           choices=("stream", "batch"))  # fmt: skip
        teacher: str | None = key(None, "label with an averaged network in this mode; it is then evaluated",
                                  choices=(None, *MODES))  # fmt: skip
        decay: float = key(0.996, "of the averaged network", low=0, high=1)
        debias: float = key(0.0, "correct pseudo-labels for classes named too often, with this strength", low=0)
        class_share: float | None = key(None, "a threshold for each class instead: the confidence that this share of "
                                        "the pixels labelled with it reach", low=0, high=1)  # fmt: skip

    bar = ("reliable",)
    labels_first = True

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.teacher = None
        if self.options.teacher is not None:
            mode = self.options.teacher
            self.teacher = Teacher(self.model, self.options.decay, ramp=True, mode=mode, buffers="average")
        self.debias = Debias(build.num_classes, self.options.debias)
        self.theta = class_threshold(build.num_classes, self.options, self.propagation.config)

    def streams(self) -> Mapping[str, Stream]:
        """Labelled, unlabelled, and where it is another stream what CutMix pastes."""
        mix = {"mix": MIX} if self.options.partner == "stream" else {}
        return {"labeled": LABELED, "unlabeled": UNLABELED} | mix

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The two terms; with a correlation head those of the propagated logits besides."""
        if progress.step < self.first_steps:
            return self.learn_labels(batch["labeled"])
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, box, strong = labeled["label"], unlabeled["box"][:, 0], unlabeled["strong"][:, 0]
        count, size = truth.shape[0], (truth.shape[1], truth.shape[2])
        mix, other = batch.get("mix"), None
        if mix is not None:
            said = answer(self.model, self.teacher, mix["weak"]).logits
            other = PseudoLabels.of(self.corrected(said), mix["ignore"])
        strong = paste(strong, strong.flip(0) if mix is None else mix["strong"][:, 0], box)
        if self.teacher is not None:
            weak = self.teacher(unlabeled["weak"], correlate=part.regions)
            both = self.model(torch.cat([labeled["image"], strong]), correlate=part.head)
            labelled, mixed = both.split(count)
        else:
            both = self.model(torch.cat([labeled["image"], unlabeled["weak"]]), correlate=part.head)
            labelled, weak = both.split(count)
            mixed = self.model(strong, correlate=part.head)
        pseudo = PseudoLabels.of(self.corrected(weak.logits), unlabeled["ignore"])
        self.debias.see(weak.logits, unlabeled["ignore"])
        threshold = self.options.threshold if self.theta is None else self.theta.see(pseudo)
        target = pseudo.paste(pseudo.reversed() if other is None else other, box)
        masks = part.masks(weak, size, progress)
        labels, reliable = part.targets(target, threshold, masks, ~box & target.counted, weak.logits.shape[1])
        scalars = {
            "x": self.supervised(labelled.logits, truth),
            "s": losses.pseudo_supervised(mixed.logits, labels, reliable, target.counted),
        }
        loss = (scalars["x"] + scalars["s"]) / 2
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(labelled), truth)
            corr = losses.pseudo_supervised(part.logits(mixed), labels, reliable, target.counted)
            scalars["corr"] = part.from_start(corr, progress)
            loss = loss + part.weight * (scalars["x_corr"] + scalars["corr"]) / 2
        scalars["reliable"] = pseudo.reliable(threshold).sum() / pseudo.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)

    def corrected(self, logits: Tensor) -> Tensor:
        """Corrected for classes named too often."""
        return self.debias(logits)

    def after_step(self, progress: Progress) -> None:
        """The averaged network follows; the thresholds and the classes' mean probabilities move on."""
        self.debias.finish_step()
        if self.theta is not None:
            self.theta.finish_step()
        if self.teacher is not None:
            self.teacher.follow(self.model, progress.step)

    @property
    def threshold(self) -> float | Tensor:
        """The key of that name, or where the thresholds of the classes stand."""
        return self.options.threshold if self.theta is None else self.theta.threshold

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The averaged network before the trained one."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.network}
        return teacher | {"student": self.model}
