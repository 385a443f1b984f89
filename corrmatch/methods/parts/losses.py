"""Losses that methods share.

Every function takes logits (B, C, h, w), integer labels (B, H, W) and bool masks (B, H, W), and returns a 0-d tensor.
Logits are enlarged to the labels in the loss itself (`corrmatch.ops.cross_entropy`), bilinearly with aligned corners.
No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, stack, where

from corrmatch import ops
from corrmatch.data.datasets import IGNORE

HARD_PROBABILITY = 0.7


def supervised(logits: Tensor, truth: Tensor, *, hard_pixels: int | None = None) -> Tensor:
    """Mean cross-entropy over the labelled pixels, or over the hard ones among them if `hard_pixels` is set."""
    counted = truth != IGNORE
    if hard_pixels is not None:
        counted &= hard(logits, truth, hard_pixels)
    return pseudo_supervised(logits, truth, counted, counted)


def hard(logits: Tensor, truth: Tensor, pixels: int) -> Tensor:
    """OHEM: the `pixels` pixels whose label is least probable, and all whose label is less probable than 0.7."""
    _, surprise = ops.cross_entropy(logits.detach(), truth, (truth != IGNORE).float())
    probability = surprise.neg().exp()  # 1 where there is no label
    kth = probability.flatten().kthvalue(min(pixels, probability.numel())).values
    return probability <= kth.clamp(min=HARD_PROBABILITY)


def pseudo_supervised(logits: Tensor, labels: Tensor, reliable: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy summed over the reliable pixels, divided by the number of counted pixels."""
    return ops.cross_entropy(logits, labels, _share(reliable, counted))[0]


def consistency(strong: Tensor, weak: Tensor, reliable: Tensor, counted: Tensor) -> Tensor:
    """KL(softmax weak || softmax strong) summed over the reliable pixels, divided by the number of counted pixels."""
    return ops.divergence(strong, weak, _share(reliable, counted))[0]


def rate_weighted(logits: Tensor, labels: Tensor, confident: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy averaged over the counted pixels, times the share of confident pixels among them."""
    pixels = counted.count_nonzero().clamp(min=1)
    rate = (confident & counted).count_nonzero() / pixels
    return ops.cross_entropy(logits, labels, where(counted, rate / pixels, 0.0))[0]


def _share(reliable: Tensor, counted: Tensor) -> Tensor:
    """The weight of each pixel in a masked mean."""
    return where(reliable, 1 / counted.count_nonzero().clamp(min=1), 0.0)


def summed(terms: Iterable[Tensor]) -> Tensor:
    """The sum of 0-d terms."""
    return stack(list(terms)).sum()
