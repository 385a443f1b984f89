"""Confidence thresholds of methods."""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch.nn import DynamicThreshold


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
