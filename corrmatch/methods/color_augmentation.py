r"""CutMix mean teacher with colour augmentation (French and Mackiewicz, VISAPP 2022, arXiv 2110.04487).

.. math::
    L = L_x + w\,\frac{1}{BHW} \sum_i r\,v_i \sum_c (p_{ci} - q_{ci})^2, \qquad
    r = \frac{1}{BHW} \sum_i [\max_c q_{ci} \ge \tau]

p are the probabilities of the trained network for two images with changed colours, mixed by CutMix. q are those of its
moving average for the unchanged images, mixed in the same way. v is 0 in padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corrmatch.config import Config, key
from corrmatch.data.boxes import half_box
from corrmatch.data.streams import LABELED, Stream
from corrmatch.data.views import GRAY, Colour, Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Step
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import enlarge

GEOMETRY = Geometry(scales=tuple(i / 10 for i in range(5, 16)), pad="around", fill=GRAY)
VIEW = View(GEOMETRY, strong=1, colour=Colour((0.4, 0.4, 0.4, 0.1), 0.8, gray=0.2, blur=0), box=half_box)
DISTANCES = ("squared", "kl", "binary", "logits")
TINY = 1e-6


class ColorAugmentation(Method):
    """CutMix mean teacher that changes colours for the student only. The teacher is evaluated."""

    @dataclass
    class Options:
        """Consistency and teacher."""

        threshold: float = key(0.97, "confidence that counts in the confidence rate", low=0, high=1)
        per_pixel: bool = key(False, "leave out unsure pixels instead of weighting all by the confidence rate")
        distance: str = key("squared", "of the two predictions", choices=DISTANCES)
        weight: float = key(1.0, "of the consistency", low=0)
        decay: float = key(0.99, "of the teacher", low=0, high=1)
        teacher_dropout: bool = key(False, "leave the teacher's dropout on, as in the published code")
        frozen_norms: bool = key(True, "keep the backbone's norm layers in evaluation mode; false from scratch")

    bar = ("confident",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.teacher = Teacher(self.model, self.options.decay, mode="train", buffers="average")

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images, and two streams of all images without labels."""
        views = {"unlabeled": Stream("all", VIEW, 1), "mix": Stream("all", VIEW, 2)}
        return {"labeled": replace(LABELED, view=View(GEOMETRY))} | views

    def train(self, mode: bool = True) -> ColorAugmentation:
        """Sets training mode, except for the backbones' norm layers and the teacher's dropout."""
        super().train(mode)
        networks: tuple[Any, ...] = (self.model, self.teacher.network)
        for network in networks if self.options.frozen_norms else ():
            for module in network.backbone.modules():
                module.train(mode and not isinstance(module, nn.modules.batchnorm._BatchNorm))
        for module in self.teacher.modules() if not self.options.teacher_dropout else ():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The two terms, and those of the propagated logits if there is a correlation head."""
        labeled, base, other, part = batch["labeled"], batch["unlabeled"], batch["mix"], self.propagation
        truth, box = labeled["label"], base["box"][:, 0]
        size = (truth.shape[1], truth.shape[2])
        known = self.model(labeled["image"], correlate=part.head)
        with torch.no_grad():
            pair = [enlarge(self.teacher(images["weak"]).logits, size) for images in (base, other)]
            target = torch.where(box.unsqueeze(1), pair[1], pair[0])
            valid = ~torch.where(box, other["ignore"], base["ignore"])
            q, sure = target.softmax(1), None
            if part.regions:
                q, sure = self.through_regions(q, valid, box, base["weak"], progress)
        out = self.model(paste(base["strong"][:, 0], other["strong"][:, 0], box), correlate=part.head)

        def distance(logits: Tensor) -> Tensor:
            return self.consistency(enlarge(logits, size), q, target, valid, sure)

        scalars = {"x": self.supervised(known.logits, truth), "consistency": distance(out.logits)}
        loss = scalars["x"] + self.options.weight * scalars["consistency"]
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(known), truth)
            scalars["corr"] = part.from_start(distance(part.logits(out)), progress)
            loss = loss + part.weight * (scalars["x_corr"] + self.options.weight * scalars["corr"])
        scalars["confident"] = (q.amax(1) >= self.options.threshold).float().mean()
        return Step.of(loss, scalars)

    def consistency(
        self, logits: Tensor, q: Tensor, target: Tensor, valid: Tensor, sure: Tensor | None = None
    ) -> Tensor:
        """The distance of the student's logits (B, C, H, W) from the teacher's q, over all pixels.

        Args:
            logits: Of the student; they alone take a gradient.
            q: The teacher's probabilities.
            target: The teacher's logits.
            valid: bool (B, H, W), no padding.
            sure: bool (B, H, W), pixels that are confident whatever q is.
        """
        confident = q.amax(1) >= self.options.threshold
        if sure is not None:
            confident = confident | sure
        rate = confident.float() if self.options.per_pixel else confident.float().mean()
        return (rate * valid * pixel_distance(logits, q, target, self.options.distance)).mean()

    def through_regions(
        self, q: Tensor, valid: Tensor, box: Tensor, images: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """q, one-hot where region propagation gave a label, and a mask of these pixels."""
        part, classes = self.propagation, q.shape[1]
        confidence, labels = q.max(1)
        masks = part.masks(self.model(images, correlate=True), (q.shape[2], q.shape[3]), progress)
        pseudo = PseudoLabels(labels, confidence, ~valid)
        after, given = part.given(pseudo, self.options.threshold, masks, valid & ~box, classes)
        one_hot = F.one_hot(after, classes).movedim(-1, 1).to(q.dtype)
        return torch.where(given.unsqueeze(1), one_hot, q), given

    def after_step(self, progress: Progress) -> None:
        """Updates the teacher."""
        self.teacher.follow(self.model, progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The teacher, then the student."""
        return {"teacher": self.teacher.network, "student": self.model}


def pixel_distance(logits: Tensor, q: Tensor, target: Tensor, kind: str) -> Tensor:
    """The distance at each pixel (B, H, W), summed over classes.

    squared: of probabilities; kl: KL(q || p); binary: binary cross-entropy of each class; logits: squared difference of
    logits over the root of the number of classes.
    """
    if kind == "squared":
        return (logits.softmax(1) - q).square().sum(1)
    if kind == "kl":
        return F.kl_div(logits.log_softmax(1), q, reduction="none").sum(1)
    if kind == "binary":
        p = logits.softmax(1)
        return -(q * (p + TINY).log() + (1 - q) * (1 - p + TINY).log()).sum(1)
    return (logits - target).square().sum(1) / math.sqrt(logits.shape[1])
