"""Mixing of images on the device, with the generator of the step. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def class_mix(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """ClassMix: draws floor(n / 2) of the n classes that occur in an image. The mask is True at their pixels.

    Args:
        labels: (B, H, W) in 0..num_classes - 1.
        num_classes: The number of classes, with a class for padding if there is one.
        generator: For the draw, on the device of the labels.

    Source: ClassMix (WACV 2021, arXiv 2007.07936).
    """
    flat = labels.flatten(1)
    present = torch.zeros(flat.shape[0], num_classes, dtype=torch.bool, device=labels.device).scatter_(1, flat, True)
    lot = torch.rand(present.shape, generator=generator, device=labels.device).masked_fill(~present, -1)
    rank = lot.argsort(1, descending=True).argsort(1)
    chosen = rank < present.sum(1, keepdim=True) // 2
    return chosen.gather(1, flat).view_as(labels)


def with_next(x: Tensor, mask: Tensor) -> Tensor:
    """Each image (B, C, H, W) or map (B, H, W) inside its mask (B, H, W), and the next one of the batch outside."""
    return torch.where(mask.unsqueeze(1) if x.dim() > mask.dim() else mask, x, x.roll(-1, 0))
