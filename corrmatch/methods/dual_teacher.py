r"""Dual Teacher (NeurIPS 2023, arXiv 2310.18640): two averaged teachers that take turns.

.. math::
    L = L_x + L_{mix} + 0.2\,L_c, \qquad
    g \leftarrow a\,g + (1 - a)\,f, \quad a = \min(1 - 1 / (i + 1),\ 0.99)

A turn is a pass over the labelled images, and i the step within it. The teacher of the turn labels the weak views and
is updated with the student f. The other one is not updated. In the turns of one teacher weak views are mixed by
CutMix, and their colours change afterwards. In those of the other one strong views are mixed by ClassMix. L_c is the
consistency of the strong view before it is mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from corrmatch import ops
from corrmatch.config import Config, key
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import GRAY, Colour, Distortion, Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Run, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.mixing import class_mix
from corrmatch.methods.parts.photometric import flip, recolour
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import enlarge

VIEW = View(Geometry(fill=GRAY), weak=Distortion())
STRONG = Colour((0.5, 0.5, 0.5, 0.25), 1, gray=0.2, blur=0)  # one draw for the batch
AFTER_BOXES = Colour((0.25, 0.25, 0.25, 0.25), 0.8, gray=0, blur=0.5, sigma=(0.15, 1.15))  # a draw for each image
BETA = 4  # both parameters of the law of the boxes' share


class Mixed(NamedTuple):
    """Images for the student, and their targets."""

    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B, H, W)
    confidence: Tensor  # (B, H, W), of the labels
    counted: Tensor  # bool (B, H, W)


class DualTeacher(Method):
    """Dual Teacher. The student is evaluated."""

    @dataclass
    class Options:
        """Pseudo-labels and teachers."""

        threshold: float = key(0.95, "confidence from which a pseudo-label counts", low=0, high=1)
        weight: float = key(0.2, "of the consistency of the strong view", low=0)
        decay: float = key(0.99, "of the teachers", low=0, high=1)
        restart: bool = key(True, "a teacher's average starts anew with each of its turns")
        padding: bool = key(True, "mixed pixels of padding count, as in the published code")
        align_corners: bool = key(True, "enlarge logits with aligned corners, as evaluation does; false as published")
        drop_path: float = key(0.0, "stochastic depth of the student's backbone; 0.1 as published", low=0, high=1)

    bar = ("reliable",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.classes = build.num_classes
        self.teachers = nn.ModuleList(
            Teacher(self.model, self.options.decay, ramp=True, mode="train", buffers="own") for _ in range(2)
        )
        if self.options.drop_path > 0:
            student = build(drop_path=self.options.drop_path)
            student.load_state_dict(self.model.state_dict())
            self.model = student
        self.turn_steps = 0

    def streams(self) -> Mapping[str, Stream]:
        """Labelled and unlabelled images in the same kind of view; strong views are made in the step."""
        return {"labeled": replace(LABELED, view=VIEW), "unlabeled": replace(UNLABELED, view=VIEW)}

    def begin(self, phase: int, run: Run) -> None:
        """A turn is one pass over the labelled images."""
        train = run.config.train
        batch = train.batch_size * train.accumulate * run.processes
        self.turn_steps = math.ceil(len(run.data.labeled) / batch)

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps of a turn."""
        return {"turn_steps": self.turn_steps}

    def set_extra_state(self, state: Any) -> None:
        """The number of steps of a turn."""
        self.turn_steps = state["turn_steps"]

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The three terms, and those of the propagated logits if there is a correlation head."""
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, weak, ignore = labeled["label"], unlabeled["weak"], unlabeled["ignore"]
        duty, _ = self.turn(progress.step)
        target = self.targets(self.teachers[duty](weak).logits, weak, ignore, progress)
        strong = recolour(weak, STRONG, progress.generator, once="everything")
        boxes = duty == 0
        if boxes:
            mixed = self.box_mixed(weak, target, progress.generator)
        else:
            mixed = self.class_mixed(strong, target, progress.generator)
        both = self.model(torch.cat([labeled["image"], mixed.images]), correlate=part.head)
        known, out = both.split(truth.shape[0])
        again = self.model(strong, correlate=part.head)
        scalars = {
            "x": self.supervised(self.at_size(known.logits, truth), truth),
            "mix": self.box_loss(out.logits, mixed, target) if boxes else self.class_loss(out.logits, mixed),
            "consistency": self.consistency(again.logits, target),
        }
        loss = scalars["x"] + scalars["mix"] + self.options.weight * scalars["consistency"]
        if part.head:
            scalars["x_corr"] = self.supervised(self.at_size(part.logits(known), truth), truth)
            scalars["corr"] = part.from_start(self.consistency(part.logits(again), target), progress)
            loss = loss + part.weight * (scalars["x_corr"] + self.options.weight * scalars["corr"])
        reliable = target.reliable(self.options.threshold)
        scalars["reliable"] = reliable.sum() / target.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)

    def turn(self, step: int) -> tuple[int, int]:
        """The teacher of this step, and the number of the step within its turn."""
        turn, within = divmod(step, self.turn_steps)
        return turn % 2, within

    def targets(self, logits: Tensor, weak: Tensor, ignore: Tensor, progress: Progress) -> PseudoLabels:
        """The teacher's labels, propagated in regions of the student's map if regions are on."""
        pseudo, part = PseudoLabels.of(self.at_size(logits, ignore), ignore), self.propagation
        masks = None
        if part.regions:
            with torch.no_grad():
                out = self.model(weak, correlate=True)
            masks = part.masks(out, (ignore.shape[1], ignore.shape[2]), progress)
        return part.rewritten(pseudo, self.options.threshold, masks, logits.shape[1])

    def box_mixed(self, images: Tensor, target: PseudoLabels, generator: torch.Generator) -> Mixed:
        """CutMix within the batch, followed by changes of colour and a flip of each image with its labels."""
        count, _, *size = images.shape
        device = images.device
        share = torch.rand(2 * BETA - 1, generator=generator, device=device, dtype=torch.float64).median()  # Beta(4, 4)
        row, column = (torch.randint(side // 8, side, (count,), generator=generator, device=device) for side in size)
        box = inside(centred_boxes(share, row, column, size), size)
        mixed = mix(
            images, target, box, torch.randperm(count, generator=generator, device=device), self.options.padding
        )
        coloured = recolour(mixed.images, AFTER_BOXES, generator)
        return Mixed(*flip(generator, coloured, *mixed[1:]))

    def class_mixed(self, images: Tensor, target: PseudoLabels, generator: torch.Generator) -> Mixed:
        """ClassMix within the batch: half of the classes of each image are pasted on another one."""
        count = images.shape[0]
        own = class_mix(target.labels, self.classes, generator)
        other = torch.arange(count, device=images.device).flip(0)
        if count > 2:
            other = torch.randperm(count, generator=generator, device=images.device)
        return mix(images, target, ~own, other, self.options.padding)

    def box_loss(self, logits: Tensor, mixed: Mixed, target: PseudoLabels) -> Tensor:
        """Cross-entropy times the share of confident pixels of the image *before* it was mixed.

        Averaged over the pixels where this is more than 0; 0 where it is nowhere.
        """
        counted = torch.ones_like(target.ignore) if self.options.padding else target.counted
        confident = (target.confidence >= self.options.threshold) & counted
        rate = confident.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        weight = torch.where(mixed.counted, rate.view(-1, 1, 1), 0.0)
        total, pixels = ops.cross_entropy(self.at_size(logits, mixed.labels), mixed.labels, weight)
        return total / pixels.count_nonzero().clamp(min=1)

    def class_loss(self, logits: Tensor, mixed: Mixed) -> Tensor:
        """Mean cross-entropy times the share of confident pixels of the whole batch."""
        confident = mixed.confidence >= self.options.threshold
        return losses.rate_weighted(self.at_size(logits, mixed.labels), mixed.labels, confident, mixed.counted)

    def consistency(self, logits: Tensor, target: PseudoLabels) -> Tensor:
        """Cross-entropy of the strong view, summed over confident pixels and divided by the number of unpadded ones."""
        reliable = target.reliable(self.options.threshold)
        return losses.pseudo_supervised(self.at_size(logits, reliable), target.labels, reliable, target.counted)

    def at_size(self, logits: Tensor, like: Tensor) -> Tensor:
        """Logits on their grid, for ops and losses that enlarge them."""
        return logits if self.options.align_corners else enlarge(logits, like.shape[1:], align_corners=False)

    def after_step(self, progress: Progress) -> None:
        """Updates the teacher whose turn it is. In the first step of its turn it copies the student."""
        duty, step = self.turn(progress.step)
        teacher = cast(Teacher, self.teachers[duty])
        teacher.follow(self.model, step if self.options.restart else progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The student. The teachers are not evaluated: they predict with batch statistics."""
        return {"student": self.model}


def mix(images: Tensor, target: PseudoLabels, foreign: Tensor, other: Tensor, padding: bool) -> Mixed:
    """Pastes image `other[b]` of the batch into image b where `foreign` (B, H, W), with labels and confidence."""
    mixed = target.paste(target.taken(other), foreign)
    counted = torch.ones_like(mixed.ignore) if padding else mixed.counted
    return Mixed(paste(images, images[other], foreign), mixed.labels, mixed.confidence, counted)


def centred_boxes(share: Tensor, row: Tensor, column: Tensor, size: list[int]) -> Tensor:
    """(B, 4): top, left, bottom, right, ends exclusive, of boxes around (row, column), cut off at the image's border.

    Args:
        share: 0-d float64, of the image that is not covered: sides are sqrt(1 - share) of the image's, rounded down.
        row: Integer (B,), as column.
        column: Of the centres.
        size: (H, W).
    """
    ends = []
    for centre, side in zip((row, column), size, strict=True):
        half = (side * (1 - share).sqrt()).long() // 2
        ends.append(((centre - half).clamp(0, side), (centre + half).clamp(0, side)))
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1)


def inside(boxes: Tensor, size: list[int]) -> Tensor:
    """Masks (B, H, W), True inside boxes (B, 4)."""
    top, left, bottom, right = (x.view(-1, 1) for x in boxes.unbind(1))
    rows, columns = (torch.arange(side, device=boxes.device) for side in size)
    return ((top <= rows) & (rows < bottom)).unsqueeze(2) & ((left <= columns) & (columns < right)).unsqueeze(1)
