"""Views of an image: geometry, colours, CutMix boxes.

All random numbers come from torch, so that `seeded` makes a view repeatable. The defaults are those of UniMatch and
CorrMatch; methods that are published with other values set them in their `View`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from corrmatch.data.boxes import Box, cut_mix_box
from corrmatch.data.datasets import IGNORE

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which backbones expect
BLACK, GRAY = (0, 0, 0), tuple(round(255 * x) for x in MEAN)  # padding; gray is 0 after normalisation

Recolour = Callable[[tv_tensors.Image], tv_tensors.Image]
Further = Mapping[str, tv_tensors.Mask]  # other maps of an image than its labels, by name
NO_MAPS: Further = MappingProxyType({})

normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION), v2.ToPureTensor()])


@dataclass(frozen=True)
class Geometry:
    """Random scale, crop and flip of an image and its labels.

    Attributes:
        scales: Scales of the image. Two are the ends of a range; of more, one is chosen.
        flip: Probability of a horizontal flip.
        pad: Where an image smaller than the crop is padded: "right" (and below), or "around". "mirror" pads like
            "right", with the mirrored image instead of a colour.
        fill: Colour of the padding, whose label is IGNORE.
        fit: Whether scales refer to the largest size of the image that fits the crop, instead of its own size.
    """

    scales: Sequence[float] = (0.5, 2.0)
    flip: float = 0.5
    pad: str = "right"
    fill: Sequence[int] = BLACK
    fit: bool = False

    def __call__(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask, crop: int, *maps: tv_tensors.Mask
    ) -> tuple[Any, ...]:
        """The crop of the image, of its labels and of further maps: all (., crop, crop)."""
        scale, size = self._scale(), image.shape[1:]
        scale *= crop / max(size) if self.fit else 1
        scaled = [max(1, round(scale * side)) for side in size]
        image, *masks = (tv.resize(x, scaled) for x in (image, mask, *maps))
        missing = [max(0, crop - side) for side in scaled]
        if any(missing):
            before = [side // 2 if self.pad == "around" else 0 for side in missing]
            padding = [before[1], before[0], missing[1] - before[1], missing[0] - before[0]]
            if self.pad == "mirror":
                image = mirrored(image, [max(crop, side) for side in scaled])
            else:
                image = tv.pad(image, padding, fill=list(self.fill))
            masks = [tv.pad(x, padding, fill=IGNORE) for x in masks]
        top, left = (int(torch.randint(max(0, side - crop) + 1, ())) for side in scaled)
        cropped = [tv.crop(x, top, left, crop, crop) for x in (image, *masks)]
        if torch.rand(()) < self.flip:
            cropped = [tv.horizontal_flip(x) for x in cropped]
        return tuple(cropped)

    def _scale(self) -> float:
        if len(self.scales) == 2:
            return float(torch.empty(()).uniform_(*self.scales))
        return self.scales[int(torch.randint(len(self.scales), ()))]


def mirrored(image: tv_tensors.Image, size: Sequence[int]) -> tv_tensors.Image:
    """The image, continued to the right and below by its mirror images, cut to the size."""
    for axis, (old, new) in enumerate(zip(image.shape[1:], size, strict=True), start=1):
        period = max(1, 2 * (old - 1))
        back = torch.arange(new) % period
        image = tv_tensors.wrap(image.index_select(axis, torch.minimum(back, period - back) % old), like=image)
    return image


@dataclass(frozen=True)
class Colour:
    """Random changes of colour, in this order.

    Attributes:
        jitter: Brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        chance: Probability of the jitter.
        gray: Probability of a gray image.
        blur: Probability of a Gaussian blur.
        sigma: Range of the blur's deviation, pixels.
    """

    jitter: Sequence[float] = (0.5, 0.5, 0.5, 0.25)
    chance: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def __call__(self, image: tv_tensors.Image) -> tv_tensors.Image:
        """The image in other colours."""
        if torch.rand(()) < self.chance:
            image = v2.ColorJitter(*self.jitter)(image)
        if torch.rand(()) < self.gray:
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        if torch.rand(()) < self.blur:
            sigma = float(torch.empty(()).uniform_(*self.sigma))
            image = tv.gaussian_blur(image, 2 * math.ceil(3 * sigma) + 1, sigma)
        return image


@dataclass(frozen=True)
class Distortion:
    """Photometric distortion of SSD (ECCV 2016, arXiv 1512.02325): independent changes, contrast before or after hue.

    Attributes:
        brightness: The largest share of white that is added or subtracted.
        contrast: Colours times 1 - contrast to 1 + contrast.
        saturation: As contrast, of the distance from the lightest channel (saturation of HSV).
        hue: The largest rotation, as a share of the circle.
        chance: Probability of each of the four.
    """

    brightness: float = 32 / 255
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1
    chance: float = 0.5

    def __call__(self, image: tv_tensors.Image) -> tv_tensors.Image:
        """The image in other colours."""
        x, early = image / 255, bool(torch.rand(()) < 0.5)
        if self._due():
            x = (x + _uniform(0, self.brightness)).clamp(0, 1)
        if early and self._due():
            x = (x * _uniform(1, self.contrast)).clamp(0, 1)
        if self._due():
            high = x.amax(0)
            x = (high - (high - x) * _uniform(1, self.saturation)).clamp(0, 1)
        if self._due():
            x = tv.adjust_hue(x, _uniform(0, self.hue))
        if not early and self._due():
            x = (x * _uniform(1, self.contrast)).clamp(0, 1)
        return tv_tensors.Image((255 * x).round().to(torch.uint8))

    def _due(self) -> bool:
        return bool(torch.rand(()) < self.chance)


def _uniform(centre: float, radius: float) -> float:
    return float(torch.empty(()).uniform_(centre - radius, centre + radius))


@dataclass(frozen=True)
class View:
    """The views of one image.

    Attributes:
        geometry: Draws the crop that all views share.
        weak: Changes of colour of the weak view; None: no change.
        strong: Number of strong views.
        colour: Changes of colour of the strong views, drawn for each view.
        box: Draws a CutMix box for each strong view, or a single box without strong views.
    """

    geometry: Geometry = Geometry()
    weak: Recolour | None = None
    strong: int = 0
    colour: Recolour = Colour()
    box: Box | None = None

    def __call__(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask | None, crop: int, maps: Further = NO_MAPS
    ) -> dict[str, Tensor]:
        """The views by name. Labelled: `image`, `label`. Unlabelled: `weak`, `ignore` (padding).

        With strong views: `strong` (n, 3, crop, crop); with boxes: `box` (n, crop, crop).
        Further maps keep their names and follow the geometry; labels among them are IGNORE in the padding.
        """
        labels = mask if mask is not None else tv_tensors.Mask(torch.zeros(image.shape[1:], dtype=torch.uint8))
        image, labels, *further = self.geometry(image, labels, crop, *maps.values())
        ids, plain = labels.as_subclass(Tensor), image if self.weak is None else self.weak(image)
        if mask is not None:
            views = {"image": normalize(plain), "label": ids.long()}
        else:
            views = {"weak": normalize(plain), "ignore": ids == IGNORE}
        for name, x in zip(maps, further, strict=True):
            views[name] = x.as_subclass(Tensor) if x.is_floating_point() else x.as_subclass(Tensor).long()
        if self.strong > 0:
            views["strong"] = torch.stack([normalize(self.colour(image)) for _ in range(self.strong)])
        if self.box is not None:
            views["box"] = torch.stack([self.box((crop, crop)) for _ in range(max(1, self.strong))])
        return views


PLAIN = View()
WEAK_STRONG = View(strong=1, box=cut_mix_box)
WEAK_STRONG_STRONG = View(strong=2, box=cut_mix_box)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """A context in which torch's CPU generator is seeded with the key. Its state is restored afterwards."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        generator.set_state(before)


def labeled_view(
    image: tv_tensors.Image, mask: tv_tensors.Mask, crop: int, view: View = PLAIN, maps: Further = NO_MAPS
) -> dict[str, Tensor]:
    """The views of a labelled image."""
    return view(image, mask, crop, maps)


def unlabeled_views(
    image: tv_tensors.Image, crop: int, view: View = WEAK_STRONG, maps: Further = NO_MAPS
) -> dict[str, Tensor]:
    """The views of an image without labels, or whose labels are not used."""
    return view(image, None, crop, maps)
