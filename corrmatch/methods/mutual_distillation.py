r"""Mutual knowledge distillation (ACM MM 2023, arXiv 2208.11499): two students, each taught by the other's teacher.

.. math::
    L = L_x^{(1)} + L_x^{(2)} + \sum_{i \ne j} \bigl( a\,\mathrm{CE}(\tilde z(f_i), q_j)
        + b\,\mathrm{CE}(\tilde z(f_i), r_j) \bigr), \qquad
    \tilde z_k = z_k + \tfrac{\rho}{2} \sum_a (W_{ka} - W_{la})^2 V_{la}

q are the labels of the teachers' augmented logits, r those of the students'. V is the running variance of the features
of class l, W the classifier's weight: the shift is what Gaussian noise of the features adds to cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from corrmatch import ops
from corrmatch.config import Config, key
from corrmatch.data.boxes import toggled_boxes
from corrmatch.data.datasets import IGNORE
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import GRAY, Distortion, Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.mixing import with_next
from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, half, nearest
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.methods.parts.threshold import StepThreshold
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction

# Jitter, blur, an equal histogram, solarisation or gray.
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
GEOMETRY = Geometry(fill=GRAY, fit=True)
WEAK = View(GEOMETRY, weak=Distortion())
STRONG = View(GEOMETRY, weak=Distortion(), strong=1, colour=ONE_OF_FIVE, box=toggled_boxes)


class MutualDistillation(Method):
    """Two students and their teachers. Each student learns from the other pair. The first student is evaluated."""

    @dataclass
    class Options:
        """Teachers, targets and the strength of the augmentation of features."""

        decay: float = key(0.6, "of the teachers", low=0, high=1)
        threshold: float = key(0.0, "confidence that a teacher's label needs; 0.95 in the paper", low=0, high=1)
        teacher_weight: float = key(1.5, "of what a student learns from the other's teacher", low=0)
        student_weight: float = key(1.0, "of what it learns from the other student", low=0)
        augmentation: float = key(1.5, "rho at the end of the run, 0 at its start", low=0)
        augmented_targets: bool = key(True, "take targets from augmented logits, as in the published code")
        norm_momentum: float = key(0.001, "of the norm layers' running statistics; 0.1 for short runs", low=0, high=1)

    score_all = True
    bar = ("agree",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.peer = build()
        students = (self.model, self.peer)
        self.teacher, self.peer_teacher = (
            Teacher(student, self.options.decay, ramp=True, mode="train", buffers="own") for student in students
        )
        # In the order of `networks`.
        widths = [student.classifier.in_channels for student in students] * 2
        self.statistics: Any = nn.ModuleList(ClassVariances(build.num_classes, width) for width in widths)
        self.theta = StepThreshold(build.num_classes, 0.85, 0.999) if self.propagation.regions else None
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = self.options.norm_momentum

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images, and unlabelled ones, which are mixed."""
        return {"labeled": replace(LABELED, view=WEAK), "unlabeled": replace(UNLABELED, view=STRONG)}

    @property
    def networks(self) -> dict[str, Any]:
        """The students, then the teachers."""
        return {
            "first": self.model,
            "second": self.peer,
            "first_teacher": self.teacher.network,
            "second_teacher": self.peer_teacher.network,
        }

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """All four networks."""
        return self.networks

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The three terms, and those of the propagated logits if there are correlation heads."""
        labeled, base, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, mask = labeled["label"], base["box"][:, 0]
        strong = with_next(base["strong"][:, 0], mask)
        asked = [
            (teacher(labeled["image"], features=True), teacher(base["weak"], features=True, correlate=part.regions))
            for teacher in (self.teacher, self.peer_teacher)
        ]
        said = [
            [student(images, features=True, correlate=part.head) for images in (labeled["image"], strong)]
            for student in (self.model, self.peer)
        ]
        ratio = self.options.augmentation * (1 - math.cos(math.pi * (progress.step + 1) / progress.steps)) / 2
        mixed = [[known, mix(weak, mask)] for known, weak in asked]
        views = [self.augment(i, known, out, truth, ratio) for i, (known, out) in enumerate([*said, *mixed])]
        taught = [self.targets(view, self.options.threshold) for view in views[2:]]
        if self.theta is not None:
            taught = [
                self.through_regions(q, i + 2, weak, base["ignore"], mask, ratio, progress)
                for i, (q, (_, weak)) in enumerate(zip(taught, asked, strict=True))
            ]
        peers = [self.targets(view) for view in views[:2]]
        scalars = {"x": torch.stack([self.supervised(known.logits, truth) for known, _ in said]).sum()}
        scalars |= mutual([view.augmented for view in views[:2]], taught, peers)
        loss = self.weighed(**scalars)
        if part.head:
            along = [[part.logits(out) for out in pair] for pair in said]
            scalars["x_corr"] = torch.stack([self.supervised(known, truth) for known, _ in along]).sum()
            corr = mutual([torch.cat(pair) for pair in along], taught, peers)
            corr = {name: part.from_start(value, progress) for name, value in corr.items()}
            scalars |= {f"{name}_corr": value for name, value in corr.items()}
            loss = loss + part.weight * self.weighed(scalars["x_corr"], **corr)
        scalars["agree"] = (taught[0] == taught[1]).float().mean()
        return Step.of(loss, scalars)

    def weighed(self, x: Tensor, teachers: Tensor, students: Tensor) -> Tensor:
        """The sum of the three terms."""
        return x + self.options.teacher_weight * teachers + self.options.student_weight * students

    def augment(self, network: int, known: Prediction, mixed: Prediction, truth: Tensor, ratio: float) -> Augmented:
        """Logits of both parts at half size. Statistics are those of each part before augmentation."""
        plain, augmented = [], []
        for out, given in ((known, truth), (mixed, None)):
            logits, features = half(out.logits), half(_features(out).detach())
            labels = logits.argmax(1) if given is None else nearest(given, logits.shape[2:])
            self.statistics[network].update(features, labels)
            plain.append(logits.detach())
            augmented.append(logits + self.shift(network, labels, ratio))
        return Augmented(torch.cat(plain), torch.cat(augmented))

    def shift(self, network: int, labels: Tensor, ratio: float) -> Tensor:
        """The change of a network's logits (B, C, h, w) by augmentation, at pixels with labels (B, h, w)."""
        weight = list(self.networks.values())[network].classifier.weight
        return self.statistics[network].shift(weight.flatten(1), labels, ratio)

    def targets(self, view: Augmented, threshold: float = 0.0) -> Tensor:
        """Labels; IGNORE where the confidence of the plain logits is below the threshold."""
        labels = (view.augmented.detach() if self.options.augmented_targets else view.plain).argmax(1)
        if threshold == 0:
            return labels
        return labels.masked_fill(view.plain.softmax(1).amax(1) < threshold, IGNORE)

    def through_regions(
        self, q: Tensor, network: int, out: Prediction, ignore: Tensor, mask: Tensor, ratio: float, progress: Progress
    ) -> Tensor:
        """A teacher's targets q with what region propagation makes of its labels before they are mixed.

        Every pixel keeps its label where the region gives none; with a threshold only the regions' labels count.
        """
        part, plain = self.propagation, half(out.logits)
        known, unlabeled = q.split([q.shape[0] - mask.shape[0], mask.shape[0]])
        size, classes = (plain.shape[2], plain.shape[3]), plain.shape[1]
        small = nearest(ignore, size)
        labels, confidence, class_peak = ops.pseudo_label(plain, ignore=small)
        view = Augmented(plain, plain + self.shift(network, labels, ratio))
        pseudo = PseudoLabels(self.targets(view), confidence, small)
        threshold = self.theta.update(class_peak)  # type: ignore[union-attr]
        masks = part.masks(out, size, progress)
        after, reliable = part.targets(pseudo, threshold, masks, ~small, classes)
        after, reliable = (with_next(x, nearest(mask, size)) for x in (after, reliable))
        kept = unlabeled if self.options.threshold == 0 else IGNORE
        return torch.cat([known, torch.where(reliable, after, kept)])

    def after_step(self, progress: Progress) -> None:
        """Updates the teachers as before the next step, whose number from 1 is `progress.step` + 2."""
        self.teacher.follow(self.model, progress.step + 1)
        self.peer_teacher.follow(self.peer, progress.step + 1)
        if self.theta is not None:
            self.theta.finish_step()


class Augmented(NamedTuple):
    """Logits of a network at half size (B, C, h, w), labelled images first."""

    plain: Tensor
    augmented: Tensor


class ClassVariances(nn.Module):
    """Running mean and variance of the features of each class, over all processes.

    Args:
        num_classes: C.
        channels: A.
    """

    mean: Tensor
    covariance: Tensor
    amount: Tensor

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, channels))
        self.register_buffer("covariance", torch.zeros(num_classes, channels))
        self.register_buffer("amount", torch.zeros(num_classes))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Counts the pixels of features (B, A, h, w) that have a label (B, h, w).

        The sums are float64: a small variance is the difference of large squares. Autocast leaves them alone.
        """
        counted = (labels != IGNORE).flatten()
        rows = features.double().movedim(1, -1).flatten(0, -2)
        index = torch.where(counted, labels.flatten(), 0)
        of_class = F.one_hot(index, self.amount.shape[0]).double().mT * counted
        sums = total(torch.cat([of_class @ rows, of_class @ rows.square(), of_class.sum(1, keepdim=True)], 1))
        first, second, count = sums.split([rows.shape[1], rows.shape[1], 1], 1)
        mean, square = (x / count.clamp(min=1) for x in (first, second))
        variance, offset = (square - mean.square()).clamp(min=0), mean - self.mean
        share = count / (count + self.amount.unsqueeze(1)).clamp(min=1)
        self.covariance.copy_((1 - share) * (self.covariance + share * offset.square()) + share * variance)
        self.mean.copy_(self.mean + share * offset)
        self.amount.add_(count[:, 0])

    @torch.no_grad()
    def shift(self, weight: Tensor, labels: Tensor, ratio: float) -> Tensor:
        """(B, C, h, w) for pixels of labels (B, h, w), 0 where there is none; `weight` (C, A) is the classifier's."""
        with torch.autocast(weight.device.type, enabled=False):
            apart = (weight.float().unsqueeze(0) - weight.float().unsqueeze(1)).square()  # (l, k, a)
            table = ratio / 2 * (apart @ self.covariance.unsqueeze(2))[..., 0]
        table = torch.cat([table, torch.zeros_like(table[:1])])
        return table[torch.where(labels == IGNORE, len(table) - 1, labels)].movedim(-1, 1)


def mutual(students: list[Tensor], taught: list[Tensor], peers: list[Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of each student with the labels of the other's teacher and of the other student."""
    return {
        name: torch.stack([losses.supervised(*pair) for pair in zip(students, reversed(labels), strict=True)]).sum()
        for name, labels in (("teachers", taught), ("students", peers))
    }


def mix(out: Prediction, mask: Tensor) -> Prediction:
    """Logits and features of weak views, mixed like the strong views."""
    inside = nearest(mask, out.logits.shape[2:])
    return Prediction(with_next(out.logits, inside), features=with_next(_features(out), inside))


def _features(out: Prediction) -> Tensor:
    if out.features is None:
        raise ValueError("the network was not asked for features: pass features=True")
    return out.features
