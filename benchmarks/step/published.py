"""The published training step in eager PyTorch, written from its formulas. `bench_train` compares corrmatch with it.

It stores the whole correlation map and region masks as enlarged floats. It loops over classes, images and masks, and
each turn reads a result on the host. Its losses are those of torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from ops.region_propagate import published as region_propagate
from torch import Tensor, nn

from corrmatch.data.images import IGNORE
from corrmatch.methods.base import Progress


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges logits to the size of the images."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def propagate(query: Tensor, key: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The correlation map (B, HW, HW), and the logits propagated along it and enlarged to their former size."""
    q, k = query.flatten(2), key.flatten(2)
    p = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
    value = enlarge(logits.detach(), query.shape[2:])
    z = (value.flatten(2) @ p).view_as(value)
    return p, enlarge(z, logits.shape[2:])


def region_masks(p: Tensor, index: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Region masks, bool (B, K, H, W): rows of the map, enlarged, normalised by extrema and cut at one half."""
    rows = p.detach()[:, index].unflatten(2, grid)
    large = enlarge(rows, size).flatten(2)
    low, high = large.min(2, keepdim=True)[0], large.max(2, keepdim=True)[0]
    return ((large - low) / (high - low) > 0.5).unflatten(2, size)


def moved_threshold(theta: float, momentum: float, confidence: Tensor, labels: Tensor, ignore: Tensor) -> float:
    """The largest confidence of each class, averaged over the classes that occur."""
    counted = ~ignore
    classes = labels[counted].unique()
    if len(classes) == 0:
        return theta
    peaks = [confidence[counted & (labels == c)].max().item() for c in classes]
    return momentum * theta + (1 - momentum) * sum(peaks) / len(peaks)


def masked_mean(pixels: Tensor, reliable: Tensor, counted: Tensor) -> Tensor:
    """The sum over reliable pixels, divided by the number of pixels that count."""
    return (pixels * reliable).sum() / counted.sum()


class PublishedStep(nn.Module):
    """A step with the arguments and the result of `corrmatch.methods.corrmatch.CorrMatch`. `theta` is a float.

    The network returns query and key, and does not propagate.
    """

    def __init__(self, model: nn.Module, theta: float, momentum: float, num_masks: int):
        super().__init__()
        self.model, self.theta, self.momentum, self.num_masks = model, theta, momentum, num_masks

    def forward(self, batch: dict[str, dict[str, Tensor]], progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms."""
        labeled, unlabeled, mix = batch["labeled"], batch["unlabeled"], batch["mix"]
        box, count, size = unlabeled["box"][:, 0], labeled["image"].shape[0], tuple(labeled["image"].shape[2:])
        self.model.eval()
        with torch.no_grad():
            mix_confidence, mix_labels = enlarge(self.model(mix["weak"]).logits, size).softmax(1).max(1)
        self.model.train()

        weak = self.model(torch.cat([labeled["image"], unlabeled["weak"]]), perturb=True, correlate=True)
        grid, weak_logits, perturbed = (
            tuple(weak.query.shape[2:]),
            enlarge(weak.logits, size),
            enlarge(weak.perturbed, size),
        )
        p, weak_propagated = propagate(weak.query, weak.key, weak_logits)
        index = torch.randint(grid[0] * grid[1], (self.num_masks,), generator=progress.generator, device=p.device)
        masks = region_masks(p, index, grid, size)[count:]
        images = unlabeled["strong"][:, 0].clone()
        inside = box.unsqueeze(1).expand_as(images)
        images[inside] = mix["strong"][:, 0][inside]
        strong = self.model(images, correlate=True)
        strong_logits = enlarge(strong.logits, size)
        _, strong_propagated = propagate(strong.query, strong.key, strong_logits)

        with torch.no_grad():
            probability = weak_logits[count:].softmax(1)
            confidence, labels = probability.max(1)
            mixed_confidence, mixed_labels, ignore = confidence.clone(), labels.clone(), unlabeled["ignore"].clone()
            mixed_confidence[box] = mix_confidence[box]
            mixed_labels[box] = mix_labels[box]
            ignore[box] = mix["ignore"][box]
            self.theta = moved_threshold(self.theta, self.momentum, confidence, labels, ignore)
            before = (mixed_confidence >= self.theta) & ~ignore
            masks &= (~box & ~ignore).unsqueeze(1)
            after_labels, after = region_propagate(mixed_labels, before, masks, self.theta, probability.shape[1])
        reliable, weak_counted = (confidence >= self.theta) & ~unlabeled["ignore"], ~unlabeled["ignore"]

        def pixels(logits: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(logits, target, reduction="none")

        truth = labeled["label"]
        divergence = F.kl_div(strong_logits.log_softmax(1), probability, reduction="none").sum(1)
        parts = {
            "x": F.cross_entropy(weak_logits[:count], truth, ignore_index=IGNORE),
            "x_corr": F.cross_entropy(weak_propagated[:count], truth, ignore_index=IGNORE),
            "s": masked_mean(pixels(strong_logits, after_labels), after, ~ignore),
            "kl": masked_mean(divergence, before, ~ignore),
            "fp": masked_mean(pixels(perturbed[count:], labels), reliable, weak_counted),
            "corr": 0.5 * masked_mean(pixels(strong_propagated, after_labels), after, ~ignore)
            + 0.5 * masked_mean(pixels(weak_propagated[count:], labels), reliable, weak_counted),
        }
        supervised, rest = parts["x"] + parts["x_corr"], parts["s"] + parts["kl"] + parts["fp"] + parts["corr"]
        return (0.5 * supervised + 0.25 * rest) / 2, parts
