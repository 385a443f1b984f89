"""Changes of colour that methods are published with, beside `views.Colour`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv


@dataclass(frozen=True)
class Distortion:
    """Photometric distortion of detectors (SSD): each change with a chance of its own, contrast first or last.

    Attributes:
        brightness: At most so much is added, as a share of white.
        contrast: Range of the factor of all channels.
        saturation: Range of the factor.
        hue: At most so much of the circle is turned.
        chance: Of each.
    """

    brightness: float = 32 / 255
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 0.1
    chance: float = 0.5

    def __call__(self, picture: tv_tensors.Image) -> tv_tensors.Image:
        """The image in other colours, float32 in [0, 1]."""
        x = tv.to_dtype(picture, torch.float32, scale=True)
        early = self._draws(0.5)
        if early:
            x = self._contrast(x)
        if self._draws(self.chance):
            x = tv_tensors.wrap((x + _uniform(-self.brightness, self.brightness)).clamp(0, 1), like=picture)
        if self._draws(self.chance):
            x = tv.adjust_saturation(x, _uniform(*self.saturation))
        if self._draws(self.chance):
            x = tv.adjust_hue(x, _uniform(-self.hue, self.hue))
        return x if early else self._contrast(x)

    def _contrast(self, x: tv_tensors.Image) -> tv_tensors.Image:
        if not self._draws(self.chance):
            return x
        return tv_tensors.wrap((x * _uniform(*self.contrast)).clamp(0, 1), like=x)

    def _draws(self, chance: float) -> bool:
        return bool(torch.rand(()) < chance)


# One of five: jitter, blur, equal histogram, solarisation, gray.
ONE_OF_FIVE = v2.RandomChoice(
    [
        v2.ColorJitter(0.5, 0.5, 0.5, 0.25),
        v2.RandomChoice([v2.GaussianBlur(size, (0.1, 2.0)) for size in (3, 5, 7)]),
        v2.RandomEqualize(1),
        v2.RandomSolarize(128, 1),
        v2.Grayscale(3),
    ],
    p=[0.3, 0.5, 0.1, 0.1, 0.5],
)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))
