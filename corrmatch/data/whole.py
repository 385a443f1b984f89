"""Whole labelled images, for evaluation."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from corrmatch.data.datasets import Item, read_image, read_mask
from corrmatch.data.views import normalize


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Whole images, normalised, and their masks."""

    def __init__(self, items: list[Item], table: Tensor, crop: int | None):
        self.items, self.table, self.crop = items, table, crop

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        item = self.items[i]
        if item.mask is None:
            raise ValueError(f"{item.name} has no mask")
        image, mask = normalize(read_image(item.image)), read_mask(item.mask, self.table).as_subclass(Tensor)
        if self.crop is not None:  # of images that are smaller in one direction, all of that direction
            size = [min(self.crop, side) for side in mask.shape]
            image, mask = tv.center_crop(image, size), tv.center_crop(mask.unsqueeze(0), size)[0]
        return image, mask.long()
