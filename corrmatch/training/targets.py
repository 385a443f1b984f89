"""Pseudo-labels of a CorrMatch step: thresholded, cut and mixed, propagated in regions. No gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corrmatch import ops
from corrmatch.masks import RegionMasks
from corrmatch.nn import DynamicThreshold
from corrmatch.training.losses import Targets


class PseudoLabels(NamedTuple):
    """What the network says of unlabelled pictures (B, H, W), and where they are padding."""

    labels: Tensor
    confidence: Tensor
    ignore: Tensor


def cut_mix(box: Tensor, pasted: PseudoLabels, base: PseudoLabels) -> PseudoLabels:
    """Inside the box the pasted picture's."""
    return PseudoLabels(*(torch.where(box, inside, outside) for inside, outside in zip(pasted, base, strict=True)))


@torch.no_grad()
def make_targets(
    weak_logits: Tensor, mix: PseudoLabels, ignore: Tensor, box: Tensor, masks: RegionMasks, theta: DynamicThreshold,
    truth: Tensor,
) -> Targets:  # fmt: skip
    """Targets of the losses; moves the threshold `theta`.

    Args:
        weak_logits: (B, C, h, w) of the unlabelled pictures.
        mix: Of the pictures that CutMix pastes.
        ignore: bool (B, H, W), padding of the unlabelled pictures.
        box: bool (B, H, W), where CutMix pastes.
        masks: Region masks of the unlabelled pictures.
        theta: The dynamic threshold; sees the weak logits where the *mixed* picture is not padding, as published.
        truth: (B_x, H, W), labels of the labelled pictures, passed on.
    """
    labels, confidence, class_peak = ops.pseudo_label(
        weak_logits, size=(box.shape[1], box.shape[2]), ignore=torch.where(box, mix.ignore, ignore)
    )
    weak = PseudoLabels(labels, confidence, ignore)
    mixed = cut_mix(box, mix, weak)
    threshold = theta.update(class_peak)
    weak_reliable = (weak.confidence >= threshold) & ~weak.ignore
    before = (mixed.confidence >= threshold) & ~mixed.ignore
    after_labels, after = ops.region_propagate(
        mixed.labels, before, masks, threshold, num_classes=weak_logits.shape[1], valid=~box & ~mixed.ignore
    )
    return Targets(
        truth=truth,
        weak_labels=weak.labels, weak_reliable=weak_reliable, weak_counted=~weak.ignore,
        labels=after_labels, reliable=after, reliable_before=before, counted=~mixed.ignore,
    )  # fmt: skip
