"""Confidence thresholds of methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.nn import DynamicThreshold

BINS = 256  # of a histogram of confidences


class ClassThreshold(nn.Module):
    r"""One threshold a class: the confidence that a share of the pixels labelled with the class reach.

    .. math:: \theta_c \leftarrow m \theta_c + (1 - m) q_c

    with q_c the largest of 0, 1/256, 2/256, ... that at least `share` of the batch's pixels with label c reach. A class
    without pixels keeps its threshold. Every class has labels, however unsure the network is of it, where one threshold
    for all labels the easy classes only.

    Args:
        num_classes: C.
        initial: All thresholds before the first step.
        share: Of the pixels labelled with a class, those that count.
        momentum: m.

    Attributes:
        threshold: (C,) float32.

    Source: class-balanced self-training (ECCV 2018, arXiv 1810.07911), here as a moving average.
    """

    threshold: Tensor
    counts: Tensor  # pixels of the step, by label and confidence

    def __init__(self, num_classes: int, initial: float, share: float, momentum: float = 0.99):
        super().__init__()
        self.share, self.momentum = share, momentum
        self.register_buffer("threshold", torch.full((num_classes,), float(initial)))
        self.register_buffer("counts", torch.zeros(num_classes, BINS))

    @torch.no_grad()
    def see(self, pseudo: PseudoLabels) -> None:
        """Counts the pixels of one more batch."""
        bins = (pseudo.confidence * BINS).long().clamp(0, BINS - 1)
        pixels = pseudo.counted.to(self.counts.dtype).flatten()
        cells = (pseudo.labels.long() * BINS + bins).flatten()
        self.counts.view(-1).scatter_add_(0, cells, pixels)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Moves the thresholds by the pixels of the step, those of all processes."""
        counts = total(self.counts)
        pixels = counts.sum(1)
        reaching = counts.flip(1).cumsum(1).flip(1)  # pixels whose confidence is at least that of the bin
        reached = (reaching >= self.share * pixels[:, None]).sum(1) - 1  # the last bin that enough pixels reach
        moved = self.momentum * self.threshold + (1 - self.momentum) * reached / BINS
        self.threshold.copy_(torch.where(pixels > 0, moved, self.threshold))
        self.counts.zero_()


class StepThreshold(DynamicThreshold):
    """A dynamic threshold that moves once a step of the optimiser, of however many batches the step is made.

    Each batch of a step moves the threshold from where it stood before the step, by the largest peaks of the batches so
    far: after the last one it stands where one large batch would have put it.

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
        """Moves the threshold by the (C,) peaks of one more batch."""
        self.peaks.copy_(torch.maximum(self.peaks, class_peak))
        self.threshold.copy_(self.before)
        return super().update(self.peaks)

    @torch.no_grad()
    def finish_step(self) -> None:
        """The next update belongs to another step."""
        self.before.copy_(self.threshold)
        self.peaks.zero_()
