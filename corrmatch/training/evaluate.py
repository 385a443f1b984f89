"""Segments whole images and scores the result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from corrmatch.config import Config, EvalConfig
from corrmatch.data.datasets import IGNORE, Data
from corrmatch.data.whole import Labelled
from corrmatch.models.network import Network, evaluating


@dataclass(frozen=True)
class Scores:
    """Intersection over union of each class; NaN for a class that is neither in the truth nor predicted."""

    classes: list[str]
    iou: list[float]
    accuracy: float
    images: int
    confusion: list[list[int]]  # pixels: truth in rows, prediction in columns

    @classmethod
    def of(cls, confusion: Tensor, classes: list[str], images: int) -> Scores:
        """The scores of a confusion matrix, truth in rows."""
        confusion = confusion.cpu()
        pixels = confusion.double()
        hits, union = pixels.diag(), pixels.sum(0) + pixels.sum(1) - pixels.diag()
        return cls(classes, (hits / union).tolist(), float(hits.sum() / pixels.sum()), images, confusion.tolist())

    @property
    def miou(self) -> float:
        """Mean IoU of the classes that occur."""
        present = [value for value in self.iou if not math.isnan(value)]
        return sum(present) / len(present) if present else math.nan

    def table(self) -> str:
        """A table with a line for each class."""
        width = max(map(len, [*self.classes, "mean IoU", "accuracy"]))
        rows = [*zip(self.classes, self.iou, strict=True), ("mean IoU", self.miou), ("accuracy", self.accuracy)]
        lines = [f"{name:<{width}}  {'n/a' if math.isnan(value) else f'{100 * value:.2f}':>6}" for name, value in rows]
        return "\n".join([f"{self.images} images", *lines])


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: Data, config: Config, device: torch.device, process: int = 0, processes: int = 1
) -> Scores:
    """Scores on the validation images. Each image is evaluated by one process; all processes return the same scores."""
    confusion = MulticlassConfusionMatrix(len(data.classes), ignore_index=IGNORE, validate_args=False).to(device)
    crop = config.train.crop if config.eval.mode == "center_crop" else None
    mine = Labelled(data.val[process::processes], data.table, crop)
    loader = DataLoader(mine, batch_size=None, num_workers=config.train.workers, generator=torch.Generator())
    with evaluating(model):
        for image, mask in loader:
            labels = segment(model, image.to(device, non_blocking=True), config.eval)
            confusion.update(labels, mask.to(device, non_blocking=True))
    return Scores.of(confusion.compute(), data.classes, len(data.val))


def segment(model: nn.Module, image: Tensor, config: EvalConfig) -> Tensor:
    """Labels (H, W) of a normalised image (3, H, W)."""
    network = cast(Network, model)
    if config.mode == "sliding":
        return sliding_window(network, image, config.window, config.stride).argmax(0)
    return network.whole(image[None])[0].argmax(0)


def sliding_window(model: Network, image: Tensor, window: int, stride: int) -> Tensor:
    """Class probabilities (C, H, W), averaged over all windows of a pixel. The last windows end at the border."""
    height, width = image.shape[1:]
    windows = [
        (slice(top, top + window), slice(left, left + window))
        for top in starts(height, window, stride)
        for left in starts(width, window, stride)
    ]
    total, covered = image.new_zeros(()), image.new_zeros(height, width)
    for rows, columns in windows:
        probability = model.whole(image[None, :, rows, columns])[0].softmax(0)
        if total.dim() == 0:
            total = probability.new_zeros(probability.shape[0], height, width)
        total[:, rows, columns] += probability
        covered[rows, columns] += 1
    return total / covered


def starts(size: int, window: int, stride: int) -> list[int]:
    """The first pixel of each window along one side."""
    last = max(0, size - window)
    return [*range(0, last, stride), last]
