r"""CorrMatch (CVPR 2024, arXiv 2306.04300): weak-to-strong consistency with propagated labels.

.. math::
    L = \tfrac12 \left( \tfrac12 L_x + \tfrac12 L_{x,\mathrm{corr}} + \tfrac14 L_s + \tfrac14 L_{kl} + \tfrac14 L_{fp}
    + \tfrac14 L_{\mathrm{corr}} \right)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from corrmatch import ops
from corrmatch.config import Config, key
from corrmatch.data.streams import LABELED, MIX, UNLABELED, Stream
from corrmatch.masks import RegionMasks
from corrmatch.methods.base import Batch, Progress, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import answer
from corrmatch.methods.parts.threshold import StepThreshold
from corrmatch.methods.parts.weak_to_strong import WeakToStrong
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction
from corrmatch.nn import DynamicThreshold

WEIGHTS = {"x": 0.25, "x_corr": 0.25, "s": 0.125, "kl": 0.125, "fp": 0.125, "corr": 0.125}
SHOWN_MASKS = 6
SAMPLED_MASKS = 16  # whose area is logged: their positions are drawn at random, so the first are as good as all


class Targets(NamedTuple):
    """The targets of a step."""

    logits: Tensor  # (B, C, h, w) of the weak views
    weak: PseudoLabels  # what they say, and where it reaches the threshold:
    weak_reliable: Tensor
    labels: Tensor  # (B, H, W), of the strong views: cut and mixed, then propagated in regions
    reliable: Tensor  # after region propagation
    reliable_before: Tensor
    counted: Tensor  # not padding


class CorrMatch(WeakToStrong):
    """CorrMatch. Without `propagation.head` it has no terms `x_corr` and `corr`."""

    @dataclass
    class Options(WeakToStrong.Options):
        """Teacher, thresholds and weights of the terms."""

        threshold: float = key(0.85, "confidence from which a label is reliable, before the first step", low=0, high=1)
        momentum: float = key(0.999, "of the threshold; 1 keeps it where it is", low=0, high=1)
        supervised_weight: float = key(0.25, "of the terms x and x_corr", low=0)
        s_weight: float = key(0.125, "of the strong views under pseudo-labels; 0 leaves a term out", low=0)
        kl_weight: float = key(0.125, "of the divergence from weak to strong views", low=0)
        fp_weight: float = key(0.125, "of the perturbed features under pseudo-labels", low=0)
        corr_weight: float = key(0.125, "of the propagated logits under pseudo-labels", low=0)

    renamed: ClassVar[Mapping[str, str]] = {
        "corrmatch.num_masks": "propagation.num_masks",
        "corrmatch.connected": "propagation.connected",
    }
    correlation = True
    bar = ("threshold", "reliable")

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.theta = StepThreshold(build.num_classes, self.options.threshold, self.options.momentum)
        o = self.options
        self.weights = {"x": o.supervised_weight, "x_corr": o.supervised_weight, "s": o.s_weight, "kl": o.kl_weight,
                        "fp": o.fp_weight, "corr": o.corr_weight if self.propagation.head else 0.0}  # fmt: skip

    def streams(self) -> Mapping[str, Stream]:
        """Labelled and unlabelled images, and images for CutMix."""
        return {"labeled": LABELED, "unlabeled": UNLABELED, "mix": MIX}

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The six terms."""
        if progress.step < self.first_steps:
            return self.learn_labels(batch["labeled"])
        labeled, unlabeled, mix = batch["labeled"], batch["unlabeled"], batch["mix"]
        truth, box, part = labeled["label"], unlabeled["box"][:, 0], self.propagation
        count, size = truth.shape[0], (truth.shape[1], truth.shape[2])
        said = answer(self.model, self.teacher, mix["weak"], features=part.spreads)
        pasted = PseudoLabels.of(part.spread(said), mix["ignore"])
        # The network sees the weak views where it labels them itself, or where a term is of its answers there.
        seen = self.teacher is None or self.weights["fp"] > 0 or self.weights["corr"] > 0
        both = torch.cat([labeled["image"], unlabeled["weak"]]) if seen else labeled["image"]
        weak = self.model(both, perturb=self.weights["fp"] > 0, correlate=part.head, features=part.spreads)
        if self.teacher is not None:
            labelling = self.teacher(unlabeled["weak"], correlate=part.regions, features=part.spreads)
        else:
            labelling = weak.split(count)[1]
        images = paste(unlabeled["strong"][:, 0], mix["strong"][:, 0], box)
        strong = self.model(images, correlate=part.head)
        masks, logits = part.masks(labelling, size, progress), part.spread(labelling)
        classes = None if self.class_thresholds is None else self.threshold
        targets = make_targets(logits, pasted, unlabeled["ignore"], box, masks, self.theta, part, classes)
        if self.class_thresholds is not None:
            self.class_thresholds.see(targets.weak)
        propagated = (part.logits(weak), part.logits(strong)) if part.head else None
        parts = terms(weak, strong, propagated, targets, truth, self.weights, self.supervised)
        if "corr" in parts:
            parts["corr"] = part.from_start(parts["corr"], progress)
        loss = total(parts, self.weights)
        counted = targets.counted.count_nonzero().clamp(min=1)
        scalars = parts | {
            "threshold": self.threshold.mean(),
            "reliable": targets.reliable_before.count_nonzero() / counted,
            "reliable_after": targets.reliable.count_nonzero() / counted,
        }
        if masks is not None:
            some = RegionMasks(masks.packed[:1, :SAMPLED_MASKS], masks.size)
            scalars["mask_area"] = some.area().float().mean() / box[0].numel()
        return Step.of(loss, scalars)

    def after_step(self, progress: Progress) -> None:
        """Ends the update of the dynamic threshold."""
        super().after_step(progress)
        self.theta.finish_step()

    @property
    def threshold(self) -> Tensor:
        """The dynamic threshold, or those of the classes."""
        return self.theta.threshold if self.class_thresholds is None else self.class_thresholds.threshold

    def panels(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """The prediction and the pseudo-labels of the images."""
        out = model(images, correlate=self.propagation.head, features=self.propagation.spreads)
        size = (images.shape[2], images.shape[3])
        padding = torch.zeros(images.shape[0], *size, dtype=torch.bool, device=images.device)
        pseudo = PseudoLabels.of(self.propagation.spread(out), padding)
        shown = {"prediction": pseudo.labels, "reliable": pseudo.reliable(self.threshold)}
        if not self.propagation.regions:
            return shown
        masks = self.propagation.sample(out, size, torch.Generator(images.device).manual_seed(0))
        propagated, after = self.propagation.targets(pseudo, self.threshold, masks, ~padding, out.logits.shape[1])
        some = RegionMasks(masks.packed[:, :SHOWN_MASKS].contiguous(), masks.size)
        return shown | {"propagated": propagated, "reliable after": after, "regions": some.to_bool()}


def total(parts: dict[str, Tensor], weights: Mapping[str, float] = WEIGHTS) -> Tensor:
    """The weighted sum of the terms."""
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum()


def terms(
    weak: Prediction,
    strong: Prediction,
    propagated: tuple[Tensor, Tensor] | None,
    targets: Targets,
    truth: Tensor,
    weights: Mapping[str, float] = WEIGHTS,
    supervised: Callable[[Tensor, Tensor], Tensor] = losses.supervised,
) -> dict[str, Tensor]:
    """Every term of the loss by name, unweighted.

    Args:
        weak: Of the weak views, labelled images first, with perturbed logits.
        strong: Of the strong views.
        propagated: The logits of both, spread along their correlation maps; None leaves out the terms of it.
        targets: The targets of the logits.
        truth: (B, H, W), labels of the labelled images.
        weights: A term of weight 0 is left out.
        supervised: The supervised term of logits and labels.
    """
    count, t = truth.shape[0], targets
    weak_target = (t.weak.labels, t.weak_reliable, t.weak.counted)
    strong_target = (t.labels, t.reliable, t.counted)
    parts = {"x": supervised(weak.logits[:count], truth)}
    if weights["s"] > 0:
        parts["s"] = losses.pseudo_supervised(strong.logits, *strong_target)
    if weights["kl"] > 0:
        parts["kl"] = losses.consistency(strong.logits, t.logits, t.reliable_before, t.counted)
    if weights["fp"] > 0:
        parts["fp"] = losses.pseudo_supervised(weak.perturbed[count:], *weak_target)  # type: ignore[index]
    if propagated is not None:
        along_weak, along_strong = propagated
        parts["x_corr"] = supervised(along_weak[:count], truth)
        if weights["corr"] > 0:
            parts["corr"] = 0.5 * (
                losses.pseudo_supervised(along_strong, *strong_target)
                + losses.pseudo_supervised(along_weak[count:], *weak_target)
            )
    return parts


@torch.no_grad()
def make_targets(
    weak_logits: Tensor, pasted: PseudoLabels, ignore: Tensor, box: Tensor, masks: RegionMasks | None,
    theta: DynamicThreshold, propagation: Propagation, class_thresholds: Tensor | None = None,
) -> Targets:  # fmt: skip
    """Targets of the losses; moves the threshold `theta`.

    Args:
        weak_logits: (B, C, h, w) of the unlabelled images.
        pasted: Of the images that CutMix pastes.
        ignore: bool (B, H, W), padding of the unlabelled images.
        box: bool (B, H, W), where CutMix pastes.
        masks: Region masks of the unlabelled images; None leaves the labels as they are.
        theta: The dynamic threshold; sees the weak logits where the *mixed* image is not padded, as published.
        propagation: Sends labels through the masks.
        class_thresholds: (C,), which then hold in place of the dynamic one.
    """
    labels, confidence, class_peak = ops.pseudo_label(
        weak_logits, size=(box.shape[1], box.shape[2]), ignore=torch.where(box, pasted.ignore, ignore)
    )
    weak = PseudoLabels(labels, confidence, ignore)
    mixed = weak.paste(pasted, box)
    threshold = theta.update(class_peak)
    if class_thresholds is not None:
        threshold = class_thresholds
    after_labels, after = propagation.targets(mixed, threshold, masks, ~box & mixed.counted, weak_logits.shape[1])
    return Targets(
        weak_logits.detach(),
        weak,
        weak.reliable(threshold),
        after_labels,
        after,
        mixed.reliable(threshold),
        mixed.counted,
    )
