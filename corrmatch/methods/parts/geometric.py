"""Scale and crop of batches on the device, drawn from the generator of the step.

For views that can only be made in the step, as of images together with what a teacher says of them. Sizes differ from
image to image, so nothing is resized by its size: rows and columns are weighed, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Placed(NamedTuple):
    """Where each position of a crop of side n comes from, along one axis of B images of side H."""

    place: Tensor  # (B, n), in the scaled image; beyond its end mirrored back
    inside: Tensor  # bool (B, n), no padding
    scaled: Tensor  # (B, 1), side of the scaled image
    side: int  # H

    @property
    def nearest(self) -> Tensor:
        """(B, n): the position that labels are taken from."""
        return self.place * self.side // self.scaled

    @property
    def weights(self) -> Tensor:
        """(B, n, H): bilinear, over as many positions as one of the scaled image covers."""
        step = self.side / self.scaled
        centre = ((self.place + 0.5) * step).unsqueeze(2)
        apart = torch.arange(self.side, device=self.place.device) + 0.5 - centre
        share = (1 - (apart / step.clamp(min=1).unsqueeze(2)).abs()).clamp(min=0)
        return share / share.sum(2, keepdim=True)


def scale_and_crop(
    images: Tensor, scales: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, tuple[Placed, Placed]]:
    """Each image (B, 3, H, W) scaled by a factor of its own, and a random crop of its old size.

    Where a scaled image is smaller it is mirrored at its right and lower end. `follow` takes labels along.
    """
    count, _, *size = images.shape
    low, high = scales
    factor = low + (high - low) * torch.rand(count, generator=generator, device=images.device)
    rows, columns = (place(side, factor, generator) for side in size)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        scaled = rows.weights.unsqueeze(1) @ images.float() @ columns.weights.unsqueeze(1).mT
    return scaled, (rows, columns)


def place(side: int, factor: Tensor, generator: torch.Generator) -> Placed:
    """A random place for a crop of that side in images that are scaled by the factors (B,)."""
    scaled = (side * factor).long().clamp(min=1).unsqueeze(1)
    spare = (scaled - side).clamp(min=0)
    lot = torch.rand(scaled.shape, generator=generator, device=factor.device)
    position = torch.arange(side, device=factor.device) + torch.minimum((lot * (spare + 1)).long(), spare)
    period = (2 * (scaled - 1)).clamp(min=1)
    back = position % period
    return Placed(torch.minimum(torch.minimum(back, period - back), scaled - 1), position < scaled, scaled, side)


def follow(placed: tuple[Placed, Placed], maps: Tensor, padding: float) -> Tensor:
    """Labels or confidences (B, H, W) of the same crops; `padding` where there is none."""
    rows, columns = placed
    image = torch.arange(maps.shape[0], device=maps.device).view(-1, 1, 1)
    found = maps[image, rows.nearest.unsqueeze(2), columns.nearest.unsqueeze(1)]
    return torch.where(rows.inside.unsqueeze(2) & columns.inside.unsqueeze(1), found, padding)
