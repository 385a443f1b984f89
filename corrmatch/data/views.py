"""Weak and strong views, CutMix boxes. All randomness is torch's, so that `seeded` makes a view repeatable."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from corrmatch.data.datasets import IGNORE

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which backbones expect
SCALES = (0.5, 2.0)  # of the picture
BOX_CHANCE, BOX_AREA, BOX_RATIO = 0.5, (0.02, 0.4), 0.3

normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION), v2.ToPureTensor()])
distort = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.25)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(9, sigma=(0.1, 2.0))], p=0.5),
    ]
)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from the key; afterwards it goes on as if nothing had been drawn."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        generator.set_state(before)


def geometry(picture: tv_tensors.Image, mask: tv_tensors.Mask, crop: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Random scale, crop and flip of both. What lies outside the picture is black and IGNORE."""
    height, width = picture.shape[1:]
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
    steps = [
        v2.ScaleJitter((width, height), SCALES),
        v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
    ]
    return v2.Compose(steps)(picture, mask)


def labeled_view(picture: tv_tensors.Image, mask: tv_tensors.Mask, crop: int) -> dict[str, Tensor]:
    """The weak view and its labels."""
    picture, mask = geometry(picture, mask, crop)
    return {"image": normalize(picture), "label": mask.as_subclass(Tensor).long()}


def unlabeled_views(picture: tv_tensors.Image, crop: int) -> dict[str, Tensor]:
    """Weak and strong view of one crop, where it is padding, and a box for CutMix."""
    everywhere = tv_tensors.Mask(torch.zeros(picture.shape[1:], dtype=torch.uint8))
    picture, mask = geometry(picture, everywhere, crop)
    return {
        "weak": normalize(picture),
        "strong": normalize(distort(picture)),
        "ignore": mask.as_subclass(Tensor) == IGNORE,
        "box": cut_mix_box((crop, crop)),
    }


def cut_mix_box(size: tuple[int, int]) -> Tensor:
    """True inside a box of random place, area and aspect ratio; every other time there is none."""
    box = torch.zeros(size, dtype=torch.bool)
    if torch.rand(()) >= BOX_CHANCE:
        return box
    area = float(torch.empty(()).uniform_(*BOX_AREA)) * size[0] * size[1]
    ratio = math.exp(float(torch.empty(()).uniform_(math.log(BOX_RATIO), -math.log(BOX_RATIO))))
    height = min(size[0], max(1, round(math.sqrt(area * ratio))))
    width = min(size[1], max(1, round(math.sqrt(area / ratio))))
    top = int(torch.randint(size[0] - height + 1, ()))
    left = int(torch.randint(size[1] - width + 1, ()))
    box[top : top + height, left : left + width] = True
    return box
