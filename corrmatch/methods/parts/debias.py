"""Pseudo-labels corrected for the classes that a network names too often."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import nearest


class Debias(nn.Module):
    r"""Takes from the logits of each class what the network says of that class on average.

    .. math::
        z_c \leftarrow z_c - \lambda \log \bar p_c, \qquad
        \bar p \leftarrow m \bar p + (1 - m) \operatorname{mean} p

    with p = softmax(z) at the positions of unlabelled images that are not padding. A class that is rare among few
    labels is named too seldom, and pseudo-labels carry that on from step to step; lambda = 1 would undo the class
    frequencies that the network has learnt.

    Args:
        num_classes: C.
        strength: lambda; 0 returns the logits as they are.
        momentum: m.

    Attributes:
        mean: (C,) float32, the average, uniform before the first step.

    Source: DebiasPL (CVPR 2022, arXiv 2201.01490); the correction itself is logit adjustment (arXiv 2007.07314).
    """

    mean: Tensor
    sums: Tensor  # of the step: probabilities, then positions

    def __init__(self, num_classes: int, strength: float, momentum: float = 0.99):
        super().__init__()
        self.strength, self.momentum = strength, momentum
        self.register_buffer("mean", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("sums", torch.zeros(num_classes + 1))

    def forward(self, logits: Tensor) -> Tensor:
        """The corrected logits (B, C, h, w), without gradient, in their dtype."""
        if self.strength == 0:
            return logits.detach()
        return logits.detach() - (self.strength * self.mean.log()).to(logits.dtype)[:, None, None]

    @torch.no_grad()
    def see(self, logits: Tensor, ignore: Tensor) -> None:
        """Counts the probabilities of one more batch: its logits (B, C, h, w), and its padding (B, H, W)."""
        if self.strength == 0:
            return
        counted = nearest(~ignore, logits.shape[2:]).to(self.sums.dtype)
        probability = logits.float().softmax(1) * counted[:, None]
        self.sums += torch.cat([probability.sum((0, 2, 3)), counted.sum()[None]])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Moves the average by the step's positions, those of all processes."""
        if self.strength == 0:
            return
        sums = total(self.sums)
        moved = self.momentum * self.mean + (1 - self.momentum) * sums[:-1] / sums[-1].clamp(min=1)
        self.mean.copy_(torch.where(sums[-1] > 0, moved, self.mean))
        self.sums.zero_()
