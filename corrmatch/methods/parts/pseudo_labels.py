"""Pseudo-labels: the predictions of a network on unlabelled images, and their mixing. No gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corrmatch import ops


class PseudoLabels(NamedTuple):
    """Labels of unlabelled images (B, H, W), their confidence, and where the images are padded."""

    labels: Tensor
    confidence: Tensor
    ignore: Tensor

    @classmethod
    def of(cls, logits: Tensor, ignore: Tensor) -> PseudoLabels:
        """Pseudo-labels from logits (B, C, h, w), enlarged to the size of `ignore`."""
        labels, confidence, _ = ops.pseudo_label(logits.detach(), size=(ignore.shape[1], ignore.shape[2]))
        return cls(labels, confidence, ignore)

    def paste(self, other: PseudoLabels, box: Tensor) -> PseudoLabels:
        """CutMix: inside the box (B, H, W) the labels of `other`."""
        return PseudoLabels(*(torch.where(box, theirs, mine) for theirs, mine in zip(other, self, strict=True)))

    def taken(self, images: Tensor) -> PseudoLabels:
        """The pseudo-labels of the images with these indices (B,)."""
        return PseudoLabels(*(x[images] for x in self))

    def reversed(self) -> PseudoLabels:
        """The batch in reverse order."""
        return PseudoLabels(*(x.flip(0) for x in self))

    @property
    def counted(self) -> Tensor:
        """True outside of padding."""
        return ~self.ignore

    def reliable(self, threshold: float | Tensor) -> Tensor:
        """True where the confidence reaches the threshold, a number or (C,), outside of padding."""
        if isinstance(threshold, Tensor) and threshold.dim() == 1:
            threshold = threshold[self.labels.long()]
        return (self.confidence >= threshold) & ~self.ignore


def paste(base: Tensor, other: Tensor, box: Tensor) -> Tensor:
    """CutMix of images (B, 3, H, W): inside the box (B, H, W) the pixels of `other`."""
    return torch.where(box.unsqueeze(1), other, base)


def nearest(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Labels or masks (B, H, W) on a grid (h, w). Position i takes the value at floor(i H / h), exactly."""
    rows, columns = (
        torch.arange(new, device=maps.device) * old // new for old, new in zip(maps.shape[1:], size, strict=True)
    )
    return maps[:, rows[:, None], columns]


def half(x: Tensor) -> Tensor:
    """Half the size: means of 2 x 2 pixels, as bilinear without aligned corners. An odd last row is dropped."""
    return F.avg_pool2d(x.float(), 2)
