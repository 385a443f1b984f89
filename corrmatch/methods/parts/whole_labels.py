"""Pseudo-labels of whole images on disk, from several views of each image.

They are made between two phases, with files for each image, so that an interrupted run continues with the next image
and several processes can share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrmatch.data.datasets import Item
from corrmatch.data.maps import SHARES, STEPS, Maps, atomically, save_array
from corrmatch.methods.base import Run
from corrmatch.methods.parts.labelling import barrier, claim, over_images, wait_for
from corrmatch.models.network import Network, evaluating


@dataclass(frozen=True)
class Views:
    """The views of a whole image whose probabilities are averaged.

    Attributes:
        scales: The scales of the image.
        reflect: Whether each scale is also seen reflected.
    """

    scales: Sequence[float] = (1.0,)
    reflect: bool = False

    @torch.no_grad()
    def probability(self, network: Network, image: Tensor) -> Tensor:
        """The mean probabilities (C, H, W) of an image (3, H, W) in evaluation mode."""
        size, total = image.shape[1:], torch.zeros(())
        for scale in self.scales:
            scaled = [max(1, round(scale * side)) for side in size]
            view = image[None] if scale == 1 else F.interpolate(image[None], scaled, mode="bilinear")
            for reflected in (False, True) if self.reflect else (False,):
                with evaluating(network):
                    logits = network.whole(view.flip(3) if reflected else view)
                logits = logits.flip(3) if reflected else logits
                logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
                total = total.to(logits) + logits[0].softmax(0)
        return total / (len(self.scales) * (2 if self.reflect else 1))


class WholeLabels:
    """The label maps of one phase, and the confidence of each label.

    Args:
        folder: The folder of the maps.
        network: The fingerprint of the labelling network.
        views: The views of an image.
    """

    def __init__(self, folder: Path, network: str, views: Views):
        facts = {"network": network, "scales": list(views.scales), "reflect": views.reflect}
        self.labels = Maps(folder, facts)
        self.confidence = Maps(folder, facts, SHARES)
        self.views = views

    def make(self, network: Network, run: Run, about: str) -> None:
        """Labels all unlabelled images that have no labels yet."""
        items = run.data.unlabeled
        claim([self.labels], items, run)

        def label(i: int, image: Tensor) -> None:
            confidence, labels = self.views.probability(network, image).max(0)
            self.confidence.write(i, confidence.cpu().numpy())
            self.labels.write(i, labels.to(torch.uint8).cpu().numpy())

        over_images(items, self.labels.paths(items), label, run, about)
        barrier()

    def thresholds(self, share: float, run: Run) -> Tensor:
        """For each class (C,) the largest confidence that at least this share of the pixels with its label reach.

        A class that no pixel is labelled with has the threshold 0.
        """
        kept = self.labels.folder / "thresholds.npy"
        if run.process == 0 and not kept.exists():
            found = self._thresholds(share, run.data.unlabeled, len(run.data.classes))
            atomically(kept, lambda draft: save_array(draft, found))
        wait_for([kept])
        return torch.from_numpy(np.load(kept))

    def _thresholds(self, share: float, items: Sequence[Item], classes: int) -> np.ndarray:
        counts = np.zeros((classes, STEPS + 1), np.int64)  # by label and confidence, in the steps of its map
        for i in range(len(items)):
            labels = self.labels.values(i)
            steps = np.rint(STEPS * self.confidence.values(i).astype(np.float64)).astype(np.int64)
            np.add.at(counts, (labels, steps), 1)
        reaching = counts[:, ::-1].cumsum(1)[:, ::-1]
        enough = reaching >= share * counts.sum(1, keepdims=True)
        return (np.maximum(enough.sum(1) - 1, 0) * counts.any(1) / np.float32(STEPS)).astype(np.float32)
