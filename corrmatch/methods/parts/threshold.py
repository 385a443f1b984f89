"""Confidence thresholds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.nn import DynamicThreshold

BINS = 256  # bins of a histogram of confidences


class ClassThreshold(nn.Module):
    r"""A threshold for each class: the confidence that a given share of the pixels with this pseudo-label reach.

    .. math:: \theta_c \leftarrow m \theta_c + (1 - m) q_c

    where q_c is the largest of 0, 1/256, 2/256, ... that at least `share` of the batch's pixels with label c reach. A
    class without pixels keeps its threshold. With a single threshold for all classes, only easy classes would get
    pseudo-labels; with these, every predicted class does.

    Args:
        num_classes: C.
        initial: The thresholds before the first step.
        share: The share of pixels of each class that reach the threshold.
        momentum: m.

    Attributes:
        threshold: (C,) float32.

    Source: class-balanced self-training (ECCV 2018, arXiv 1810.07911), here as a moving average.
    """

    threshold: Tensor
    counts: Tensor  # (C, BINS), pixels of the step by label and confidence

    def __init__(self, num_classes: int, initial: float, share: float, momentum: float = 0.99):
        super().__init__()
        self.share, self.momentum = share, momentum
        self.register_buffer("threshold", torch.full((num_classes,), float(initial)))
        self.register_buffer("counts", torch.zeros(num_classes, BINS))

    @torch.no_grad()
    def see(self, pseudo: PseudoLabels) -> None:
        """Adds the pixels of a batch."""
        bins = (pseudo.confidence * BINS).long().clamp(0, BINS - 1)
        pixels = pseudo.counted.to(self.counts.dtype).flatten()
        cells = (pseudo.labels.long() * BINS + bins).flatten()
        self.counts.view(-1).scatter_add_(0, cells, pixels)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Updates the thresholds with the pixels of the step in all processes."""
        counts = total(self.counts)
        pixels = counts.sum(1)
        reaching = counts.flip(1).cumsum(1).flip(1)  # pixels whose confidence is at least that of the bin
        reached = (reaching >= self.share * pixels[:, None]).sum(1) - 1  # the last bin that enough pixels reach
        moved = self.momentum * self.threshold + (1 - self.momentum) * reached / BINS
        self.threshold.copy_(torch.where(pixels > 0, moved, self.threshold))
        self.counts.zero_()


class StepThreshold(DynamicThreshold):
    """A dynamic threshold with one update for each step of the optimiser, which may consist of several batches.

    Each batch of a step computes the threshold from its value before the step and the largest peaks of the batches so
    far. After the last batch it has the value that one large batch would have given.

    Args:
        num_classes: C.
        initial: The threshold before the first step.
        momentum: As in `DynamicThreshold`.
    """

    before: Tensor
    peaks: Tensor

    def __init__(self, num_classes: int, initial: float, momentum: float):
        super().__init__(initial, momentum)
        self.register_buffer("before", self.threshold.clone())
        self.register_buffer("peaks", torch.zeros(num_classes, dtype=self.threshold.dtype))

    @torch.no_grad()
    def update(self, class_peak: Tensor) -> Tensor:
        """Updates the threshold with the peaks (C,) of one more batch."""
        self.peaks.copy_(torch.maximum(self.peaks, class_peak))
        self.threshold.copy_(self.before)
        return super().update(self.peaks)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Ends a step: the next update belongs to the next one."""
        self.before.copy_(self.threshold)
        self.peaks.zero_()
