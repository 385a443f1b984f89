"""Scale and crop of batches on the device, drawn from the generator of the step.

These views are made during the step, because they apply to images together with pseudo-labels. The scale differs from
image to image, so resizing is a product with weights of rows and columns, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Placed(NamedTuple):
    """The source of each position of a crop of side n, along one axis of B images of side H."""

    place: Tensor  # (B, n), in the scaled image; positions beyond its end are mirrored
    inside: Tensor  # bool (B, n), False in padding
    scaled: Tensor  # (B, 1), side of the scaled image
    side: int  # H

    @property
    def nearest(self) -> Tensor:
        """(B, n): the nearest position, for labels."""
        return self.place * self.side // self.scaled

    @property
    def weights(self) -> Tensor:
        """(B, n, H): bilinear weights, antialiased: as wide as a position of the scaled image."""
        step = self.side / self.scaled
        centre = ((self.place + 0.5) * step).unsqueeze(2)
        apart = torch.arange(self.side, device=self.place.device) + 0.5 - centre
        share = (1 - (apart / step.clamp(min=1).unsqueeze(2)).abs()).clamp(min=0)
        return share / share.sum(2, keepdim=True)


def scale_and_crop(
    images: Tensor, scales: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, tuple[Placed, Placed]]:
    """Scales each image (B, 3, H, W) by its own factor, and crops it at random to its old size.

    A scaled image that is smaller is mirrored at its right and lower end. `follow` does the same with labels.
    """
    count, _, *size = images.shape
    low, high = scales
    factor = low + (high - low) * torch.rand(count, generator=generator, device=images.device)
    rows, columns = (place(side, factor, generator) for side in size)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        scaled = rows.weights.unsqueeze(1) @ images.float() @ columns.weights.unsqueeze(1).mT
    return scaled, (rows, columns)


def place(side: int, factor: Tensor, generator: torch.Generator) -> Placed:
    """A random crop of this side in images scaled by the factors (B,)."""
    scaled = (side * factor).long().clamp(min=1).unsqueeze(1)
    spare = (scaled - side).clamp(min=0)
    lot = torch.rand(scaled.shape, generator=generator, device=factor.device)
    position = torch.arange(side, device=factor.device) + torch.minimum((lot * (spare + 1)).long(), spare)
    period = (2 * (scaled - 1)).clamp(min=1)
    back = position % period
    return Placed(torch.minimum(torch.minimum(back, period - back), scaled - 1), position < scaled, scaled, side)


def follow(placed: tuple[Placed, Placed], maps: Tensor, padding: float) -> Tensor:
    """Labels or confidences (B, H, W) in the same crops, with the value `padding` in padding."""
    rows, columns = placed
    image = torch.arange(maps.shape[0], device=maps.device).view(-1, 1, 1)
    found = maps[image, rows.nearest.unsqueeze(2), columns.nearest.unsqueeze(1)]
    return torch.where(rows.inside.unsqueeze(2) & columns.inside.unsqueeze(1), found, padding)
