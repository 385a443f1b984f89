"""Colours of classes, and images for people to look at."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from torch import Tensor

from corrmatch.data.datasets import IGNORE
from corrmatch.data.views import DEVIATION, MEAN

BACKGROUND = "background"  # a first class of this name is not painted in overlays
GOLDEN = 0.618034


def palette(classes: list[str]) -> Tensor:
    """Colours (256, 3) uint8: distant hues for neighbouring classes, black for a background, white for IGNORE."""
    colors = torch.zeros(256, 3, dtype=torch.uint8)
    for i in range(IGNORE):
        lightness, saturation = ((0.55, 0.75), (0.38, 0.65), (0.7, 0.6))[i // 7 % 3]
        rgb = colorsys.hls_to_rgb((0.02 + GOLDEN * i) % 1, lightness, saturation)
        colors[i] = torch.tensor([round(255 * x) for x in rgb], dtype=torch.uint8)
    colors[IGNORE] = 255
    if classes[0].lower() == BACKGROUND:
        colors[0] = 0
    return colors


def paint(labels: Tensor, colors: Tensor) -> Tensor:
    """A label map as colours (H, W, 3) uint8."""
    return colors[labels.long()]


def overlay(image: Tensor, labels: Tensor, classes: list[str], colors: Tensor) -> Tensor:
    """The image (H, W, 3) tinted by class, with outlines; a background is only dimmed."""
    tint = (0.5 * image.float() + 0.5 * colors[labels.long()].float()).round().to(torch.uint8)
    if classes[0].lower() == BACKGROUND:
        tint = torch.where((labels == 0).unsqueeze(-1), (0.75 * image.float()).to(torch.uint8), tint)
    edge = torch.zeros_like(labels, dtype=torch.bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return torch.where(edge.unsqueeze(-1), torch.tensor(255, dtype=torch.uint8), tint)


def denormalize(images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) as uint8 (B, H, W, 3)."""
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))
    return ((images.cpu() * deviation + mean) * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def views(image: Tensor, maps: dict[str, Tensor], truth: Tensor, colors: Tensor) -> dict[str, np.ndarray]:
    """Image, maps and truth by name, to look at: (H, W, 3) uint8.

    Label maps are drawn in the colours of the classes. Bool maps show the image where they are true. Each mask has its
    own colour.
    """
    shown = {"image": image}
    for name, x in (maps | {"truth": truth}).items():
        if x.dim() == 3:
            view = (0.35 * image.float()).to(torch.uint8)
            for k, mask in enumerate(x, start=1):
                view[mask] = (0.4 * image[mask].float() + 0.6 * colors[k].float()).to(torch.uint8)
        elif x.dtype == torch.bool:
            view = torch.where(x.unsqueeze(-1), image, torch.tensor(0, dtype=torch.uint8))
        else:
            view = paint(x, colors)
        shown[name] = view
    return {name: view.numpy() for name, view in shown.items()}


def side_by_side(images: list[np.ndarray]) -> np.ndarray:
    """Views side by side (H, n W, 3), with gaps of 4 pixels."""
    gap = np.full((images[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], 1)
