"""Alignment of the class frequencies of pseudo-labels with those of labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import nearest


class Alignment(nn.Module):
    r"""Aligns the frequencies of classes in pseudo-labels with those of the labels, flattened by a power.

    .. math::
        z_c \leftarrow z_c + \log \frac{q_c}{\bar p_c}, \qquad
        q_c \propto f_c^{\alpha}, \qquad
        \bar p \leftarrow m \bar p + (1 - m) \operatorname{mean} p

    with f the frequencies of the labels so far and p = softmax(z) at the positions of unlabelled images that are not
    padding. A network that has seen few labels predicts rare classes too seldom, and training on its pseudo-labels
    keeps it so. The correction is 0 once the frequencies of the predictions equal q, so it does not build up from step
    to step. A class without labels is never predicted.

    Args:
        num_classes: C.
        power: alpha. 1 keeps the frequencies of the labels, 0 makes all classes equally frequent.
        momentum: m.

    Attributes:
        mean: (C,) float32, the average of p. Zeros before the first step, when q takes its place.
        labels: (C,) int64, labelled pixels so far.

    Source: distribution alignment (ReMixMatch, arXiv 1911.09785), with the power of CReST (CVPR 2021, arXiv
    2102.09559).
    """

    mean: Tensor
    labels: Tensor
    sums: Tensor  # (C + 1,), of the step: probabilities of the classes, then the number of positions
    step_labels: Tensor  # labelled pixels of the step

    def __init__(self, num_classes: int, power: float, momentum: float = 0.99):
        super().__init__()
        self.power, self.momentum = power, momentum
        self.register_buffer("mean", torch.zeros(num_classes))
        self.register_buffer("labels", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(num_classes + 1))
        self.register_buffer("step_labels", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, logits: Tensor) -> Tensor:
        """The aligned logits (B, C, h, w), without gradient, in their dtype. Unchanged before the first step."""
        target = self.target()
        least = torch.finfo(torch.float32).tiny
        shift = target.log() - torch.where(self.mean.sum() > 0, self.mean, target).clamp(min=least).log()
        return logits.detach() + torch.where(target.sum() > 0, shift, 0.0).to(logits.dtype)[:, None, None]

    def target(self) -> Tensor:
        """The frequencies q (C,); zeros before the first labels."""
        flat = self.labels.float().pow(self.power) * (self.labels > 0)
        return flat / flat.sum().clamp(min=1)

    @torch.no_grad()
    def see_labels(self, truth: Tensor) -> None:
        """Adds the labels (B, H, W) of a batch. Values from C on are not counted."""
        classes = len(self.step_labels)
        cells = truth.long().clamp(max=classes).flatten()
        counts = torch.zeros(classes + 1, dtype=torch.int64, device=truth.device)
        self.step_labels += counts.scatter_add_(0, cells, torch.ones_like(cells))[:-1]

    @torch.no_grad()
    def see(self, logits: Tensor, ignore: Tensor) -> None:
        """Adds the probabilities of a batch, from its logits (B, C, h, w) and its padding (B, H, W)."""
        counted = nearest(~ignore, logits.shape[2:]).to(self.sums.dtype)
        probability = logits.float().softmax(1) * counted[:, None]
        self.sums += torch.cat([probability.sum((0, 2, 3)), counted.sum()[None]])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Updates the frequencies with the sums of the step over all processes."""
        sums = total(self.sums)
        self.labels += total(self.step_labels)
        before = torch.where(self.mean.sum() > 0, self.mean, self.target())
        moved = self.momentum * before + (1 - self.momentum) * sums[:-1] / sums[-1].clamp(min=1)
        self.mean.copy_(torch.where(sums[-1] > 0, moved, self.mean))
        self.sums.zero_()
        self.step_labels.zero_()
