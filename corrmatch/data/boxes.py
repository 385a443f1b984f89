"""Boxes of CutMix. A law draws a bool mask (H, W), True where the other image is pasted in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Box = Callable[[tuple[int, int]], Tensor]

CHANCE, AREA, RATIO = 0.5, (0.02, 0.4), 0.3  # the constants of UniMatch
TOGGLED_AREA, TOGGLED = (0.25, 0.5), 3  # the constants of cross pseudo supervision


def cut_mix_box(size: tuple[int, int]) -> Tensor:
    """The law of UniMatch: no box half of the time, else uniform area a, ratio r and corner until the box fits.

    Height sqrt(a r), width sqrt(a / r), r uniform in [0.3, 1 / 0.3]: boxes are taller than wide, as published.
    """
    height, width = size
    if torch.rand(()) >= CHANCE:
        return torch.zeros(size, dtype=torch.bool)
    area = float(torch.empty(()).uniform_(*AREA)) * height * width
    while True:
        ratio, y, x = torch.rand(3).tolist()
        ratio = RATIO + ratio * (1 / RATIO - RATIO)
        rows, columns = max(1, int(math.sqrt(area * ratio))), max(1, int(math.sqrt(area / ratio)))
        top, left = int(y * height), int(x * width)
        if top + rows <= height and left + columns <= width:
            return box_mask(size, (top, left, top + rows, left + columns))


def half_box(size: tuple[int, int]) -> Tensor:
    """The law of French et al.: one box of half the area inside the image, with log-uniform sides."""
    aspect, y, x = torch.rand(3, dtype=torch.float64).tolist()
    return box_mask(size, log_uniform_box(size, 0.5, aspect, (y, x)))


def toggled_boxes(size: tuple[int, int]) -> Tensor:
    """Three boxes with log-uniform sides and areas of 1/12 to 1/6. Two boxes cancel where they overlap."""
    mask = torch.zeros(size, dtype=torch.bool)
    for _ in range(TOGGLED):
        share = float(torch.empty((), dtype=torch.float64).uniform_(*TOGGLED_AREA))
        aspect, y, x = torch.rand(3, dtype=torch.float64).tolist()
        mask ^= box_mask(size, log_uniform_box(size, share, aspect, (y, x), math.sqrt(1 / TOGGLED)))
    return mask


def log_uniform_box(
    size: tuple[int, int], area: float, aspect: float, place: tuple[float, float], scale: float = 1.0
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), ends exclusive, from draws `aspect` and `place` in [0, 1).

    Sides are `scale` area^aspect of the height and `scale` area^(1 - aspect) of the width, rounded half to even.
    """
    share = area**aspect
    rows, columns = (round(side * part * scale) for side, part in zip(size, (share, area / share), strict=True))
    top, left = round((size[0] - rows) * place[0]), round((size[1] - columns) * place[1])
    return top, left, top + rows, left + columns


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """A mask (H, W), True inside (top, left, bottom, right)."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask
