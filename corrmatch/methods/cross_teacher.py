r"""Cross teacher training (Neurocomputing 2022, arXiv 2209.01327): a student learns from the other's averaged teacher.

.. math::
    L = \sum_{s = l, r} L_x^{(s)} + L_u^{(s)} \ [+\ 0.1\,L_{low}^{(s)} + 0.1\,L_{high}^{(s)}], \qquad
    L_u = r\,\overline{\mathrm{CE}}

r is the share of pixels of the batch whose pseudo-label is confident. The contrastive terms, an option, compare
features with banks of good features of labelled pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corrmatch.config import Config, key
from corrmatch.data.datasets import IGNORE
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import GRAY, Colour, Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Run, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.mixing import class_mix
from corrmatch.methods.parts.photometric import recolour
from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction

VIEW = View(Geometry(scales=tuple(i / 10 for i in range(5, 17)), flip=0, fill=GRAY))
JITTER = Colour((0.25, 0.25, 0.25, 0.25), 0.8, gray=0, blur=0)  # whether: once for the batch
BLUR = Colour(chance=0, gray=0, blur=0.5, sigma=(0.15, 1.15))  # once for the batch
TINY = 1e-12
HIGH_TEMPERATURE, LOW_TEMPERATURE = 0.1, 0.5
ROWS = 4096  # pixels that are compared with the banks at a time


class Asked(NamedTuple):
    """The images, the targets and the predictions of one student."""

    target: PseudoLabels  # mixed
    known: Prediction
    out: Prediction


class CrossTeacher(Method):
    """Cross teacher training. Both students are evaluated, the left one first."""

    score_all = True
    bar = ("reliable",)

    @dataclass
    class Options:
        """Pseudo-labels, teachers, and the contrastive part."""

        threshold: float = key(0.968, "confidence that counts in the rate of confident pixels", low=0, high=1)
        mix: bool = key(False, "ClassMix of the strong views: published for Cityscapes")
        decay: float = key(0.99, "of the teachers", low=0, high=1)
        padding: bool = key(True, "pixels of padding count, as in the published code")
        peer_pretrained: str | None = key(None, "weights of the right backbone; null: those of model.pretrained")
        contrast: float = key(0.0, "weight of both contrastive terms: 0.1 in the first published code, then 0", low=0)
        sure: float = key(
            0.75, "confidence from which a pixel is of high quality in the contrastive terms", low=0, high=1
        )
        bank: int = key(256, "features that are kept of each class", low=1)
        bank_threshold: float = key(0.95, "from which a prediction is good enough for the bank")
        bank_logits: bool = key(False, "compare bank_threshold with the largest logit, as published, not probability")

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        weights = self.options.peer_pretrained
        second = build if weights is None else dataclasses.replace(
            build, model=dataclasses.replace(build.model, pretrained=weights)
        )  # fmt: skip
        self.peer = second()
        self.teachers = nn.ModuleList(
            Teacher(student, self.options.decay, ramp=True, mode="train", buffers="own") for student in self.students
        )
        self.classes, self.admitted = build.num_classes, 0
        self.banks = nn.ModuleList()
        if self.options.contrast > 0:
            channels = self.model.classifier.in_channels
            self.banks = nn.ModuleList(Bank(self.classes, self.options.bank, channels) for _ in range(2))
        self.seen: list[tuple[Tensor, Tensor]] = []  # labelled batches of this step

    @property
    def students(self) -> tuple[nn.Module, nn.Module]:
        """The left and the right side."""
        return self.model, self.peer

    def streams(self) -> Mapping[str, Stream]:
        """Labelled and unlabelled images, without flips; strong views are made in the step."""
        return {"labeled": replace(LABELED, view=VIEW), "unlabeled": replace(UNLABELED, view=VIEW)}

    def begin(self, phase: int, run: Run) -> None:
        """The most features of a class that a step adds to a bank: two banks in a pass over labelled images."""
        size = run.config.train.batch_size * run.processes
        self.admitted = max(2 * self.options.bank // len(run.data.labeled), size)

    def get_extra_state(self) -> dict[str, int]:
        """The largest number of features of a class that a step adds to a bank."""
        return {"admitted": self.admitted}

    def set_extra_state(self, state: Any) -> None:
        """The largest number of features of a class that a step adds to a bank."""
        self.admitted = state["admitted"]

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The terms of both students, and those of their propagated logits if they have correlation heads."""
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, weak, ignore = labeled["label"], unlabeled["weak"], unlabeled["ignore"]
        contrast = self.options.contrast > 0
        targets = [
            self.target(teacher(weak).logits, student, weak, ignore, progress)
            for student, teacher in zip(self.students, reversed(self.teachers), strict=True)
        ]
        own, asked = None, []
        for student, target in zip(self.students, targets, strict=True):
            if self.options.mix and (own is None or not contrast):  # the low-level term compares the same pixels
                own = class_mix(target.labels, self.classes, progress.generator)
            images, mixed = (weak, target) if own is None else mix(weak, target, own)
            images = recolour(images, JITTER, progress.generator, once="chances")
            images = recolour(images, BLUR, progress.generator, once="everything")
            more = {"features": True} if contrast else {}
            known = student(labeled["image"], correlate=part.head, **more)
            asked.append(Asked(mixed, known, student(images, correlate=part.head, **more)))
        scalars = {
            "x": losses.summed(self.supervised(side.known.logits, truth) for side in asked),
            "u": losses.summed(self.unsupervised(side.out.logits, side.target) for side in asked),
        }
        loss = scalars["x"] + scalars["u"]
        if part.head:
            scalars["x_corr"] = losses.summed(self.supervised(part.logits(side.known), truth) for side in asked)
            corr = losses.summed(self.unsupervised(part.logits(side.out), side.target) for side in asked)
            scalars["corr"] = part.from_start(corr, progress)
            loss = loss + part.weight * (scalars["x_corr"] + scalars["corr"])
        if contrast:
            scalars |= self.contrast(asked, truth)
            loss = loss + self.options.contrast * (scalars["high"] + scalars["low"])
            self.seen.append((labeled["image"], truth))
        reliable = torch.stack([target.reliable(self.options.threshold) for target in targets]).sum()
        scalars["reliable"] = reliable / (2 * targets[0].counted.sum()).clamp(min=1)
        return Step.of(loss, scalars)

    def target(
        self, logits: Tensor, student: nn.Module, weak: Tensor, ignore: Tensor, progress: Progress
    ) -> PseudoLabels:
        """Labels of the other side's teacher, propagated in regions of the student's map if regions are on."""
        pseudo, part, masks = PseudoLabels.of(logits, ignore), self.propagation, None
        if part.regions:
            with torch.no_grad():
                out = student(weak, correlate=True)
            masks = part.masks(out, (ignore.shape[1], ignore.shape[2]), progress)
        return part.rewritten(pseudo, self.options.threshold, masks, self.classes)

    def unsupervised(self, logits: Tensor, target: PseudoLabels) -> Tensor:
        """Mean cross-entropy with the pseudo-labels, times the share of pixels that are confident."""
        confident = target.confidence >= self.options.threshold
        counted = torch.ones_like(target.ignore) if self.options.padding else target.counted
        return losses.rate_weighted(logits, target.labels, confident, counted)

    def contrast(self, asked: list[Asked], truth: Tensor) -> dict[str, Tensor]:
        """Both contrastive terms of both students; 0 until both banks are full for every class."""
        sizes = [cast(Tensor, side.out.features).shape[2:] for side in asked]
        large = [(nearest(side.target.confidence, size), nearest(side.target.labels, size))
                 for side, size in zip(asked, sizes, strict=True)]  # fmt: skip
        y, banks = nearest(truth, sizes[0]), [cast(Bank, bank) for bank in self.banks]
        joined = torch.cat([bank.entries for bank in banks], 1)
        best = [side.out.logits.detach().softmax(1).max(1) for side in asked]
        high, low = [], []
        for i, (side, bank, (confidence, labels)) in enumerate(zip(asked, banks, large, strict=True)):
            surest, said = best[1 - i]
            features = cast(Tensor, side.out.features)
            both = torch.cat([cast(Tensor, side.known.features), features])
            counted = torch.cat([y != IGNORE, confidence >= self.options.sure])
            high.append(high_level(both, torch.cat([y, labels]), counted, bank.entries))
            less = best[0].values < best[1].values
            learns = (confidence < self.options.sure) & (surest >= self.options.sure) & (less if i == 0 else ~less)
            peer = cast(Tensor, asked[1 - i].out.features).detach()
            low.append(low_level(features, peer, said, learns, joined))
        ready = torch.stack([bank.full for bank in banks]).all()
        return {name: torch.where(ready, losses.summed(terms), 0.0) for name, terms in (("high", high), ("low", low))}

    def after_step(self, progress: Progress) -> None:
        """Updates the teachers, and then the banks with their features of the labelled images."""
        for teacher, student in zip(self.teachers, self.students, strict=True):
            cast(Teacher, teacher).follow(student, progress.step)
        for images, truth in self.seen:
            for teacher, bank in zip(self.teachers, self.banks, strict=True):
                out = teacher(images, features=True)
                score = out.logits.float() if self.options.bank_logits else out.logits.float().softmax(1)
                labels = nearest(truth, out.features.shape[2:])
                cast(Bank, bank).add(score, out.features, labels, self.options.bank_threshold, self.admitted)
        self.seen = []

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """Both students. The teachers are not evaluated: they predict with batch statistics."""
        return {"left": self.model, "right": self.peer}


class Bank(nn.Module):
    """Features of each class, first in, first out.

    Args:
        classes: C.
        size: Entries of a class.
        channels: D.

    Attributes:
        entries: (C, size, D), random before they are filled.
        count: (C,), how many are filled.
    """

    entries: Tensor
    count: Tensor

    def __init__(self, classes: int, size: int, channels: int):
        super().__init__()
        self.register_buffer("entries", torch.randn(classes, size, channels))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.long))

    @property
    def full(self) -> Tensor:
        """Whether the bank is full for every class, 0-d."""
        return (self.count == self.entries.shape[1]).all()

    @torch.no_grad()
    def add(self, score: Tensor, features: Tensor, labels: Tensor, threshold: float, most: int) -> None:
        """Takes in the best features of each class, at most `most`, from all processes.

        Args:
            score: (B, C, h, w), logits or probabilities.
            features: (B, D, h, w).
            labels: (B, h, w). A pixel is good where the largest score is the label's and reaches the threshold.
            threshold: See labels.
            most: Features of a class.
        """
        classes, size, channels = self.entries.shape
        best, said = score.movedim(1, -1).flatten(0, 2).max(1)
        good = (said == labels.flatten()) & (best >= threshold)
        own = said == torch.arange(classes, device=said.device).unsqueeze(1)
        rank = torch.where(good & own, best, -torch.inf)  # (C, pixels)
        value, pixel = rank.topk(min(most, rank.shape[1]), 1)
        found = features.float().movedim(1, -1).flatten(0, 2)[pixel]  # (C, most, D)
        value, found = (everywhere(x) for x in (value, found))
        value, order = value.topk(min(most, size, value.shape[1]), 1)
        found = found.gather(1, order.unsqueeze(2).expand(-1, -1, channels))
        new = value.isfinite().sum(1, keepdim=True)
        old = self.count.unsqueeze(1)
        place = torch.arange(size, device=said.device)
        source = place + (old + new - size).clamp(min=0)  # of each entry in what was there, then what is new
        fresh = (source >= old) & (source < old + new)
        kept = torch.where(source < old, source, place).clamp(max=size - 1)
        index = torch.where(fresh, size + source - old, kept)
        both = torch.cat([self.entries, found], 1)
        self.entries.copy_(both.gather(1, index.unsqueeze(2).expand(-1, -1, channels)))
        self.count.copy_((old + new).clamp(max=size).squeeze(1))


def high_level(features: Tensor, labels: Tensor, counted: Tensor, bank: Tensor) -> Tensor:
    """Pixels are to be near the bank's entries of their class, and far from all others. Mean over classes that occur.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w).
        counted: Bool (B, h, w).
        bank: (C, K, D), without gradient.
    """
    return _by_rows(features, None, labels, counted, bank, HIGH_TEMPERATURE)


def low_level(features: Tensor, peer: Tensor, labels: Tensor, counted: Tensor, bank: Tensor) -> Tensor:
    """Contrast of pixels with the peer's features of the same pixel and with the bank's entries of other classes."""
    return _by_rows(features, peer, labels, counted, bank, LOW_TEMPERATURE)


def _by_rows(
    features: Tensor, peer: Tensor | None, labels: Tensor, counted: Tensor, bank: Tensor, temperature: float
) -> Tensor:
    """The mean over classes of means over pixels. Similarities are computed for a block of pixels at a time."""
    with torch.autocast(features.device.type, enabled=False):
        x, other = (None if v is None else F.normalize(v.float().movedim(1, -1).flatten(0, 2), dim=1, eps=TINY)
                    for v in (features, peer))  # fmt: skip
        classes, counted = bank.shape[0], counted.flatten()
        y = torch.where(counted, labels.flatten(), 0)
        pixels = torch.zeros(classes, device=bank.device).index_put_((y,), counted.float(), accumulate=True)
        share = counted / (pixels.clamp(min=1) * pixels.count_nonzero().clamp(min=1))[y]
        entries = F.normalize(bank, dim=2, eps=TINY).flatten(0, 1)
        loss = features.new_zeros((), dtype=torch.float32)
        for start in range(0, y.numel(), ROWS):
            block = slice(start, start + ROWS)
            near = None if other is None else other[block]
            pulled = checkpoint(
                _pixels, cast(Tensor, x)[block], near, y[block], entries, classes, temperature,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            loss = loss + (share[block] * pulled).sum()
    return loss


def _pixels(x: Tensor, near: Tensor | None, y: Tensor, entries: Tensor, classes: int, temperature: float) -> Tensor:
    """The loss of each pixel (P,): x and near (P, D), entries (C K, D), all of norm 1."""
    similar = (x @ entries.mT / temperature).exp().unflatten(1, (classes, -1))
    own = F.one_hot(y, classes).bool().unsqueeze(2)
    others = similar.masked_fill(own, 0).sum((1, 2)).unsqueeze(1)
    if near is None:
        positive = similar.gather(1, y.view(-1, 1, 1).expand(-1, 1, similar.shape[2]))[:, 0]
    else:
        positive = ((x * near).sum(1, keepdim=True) / temperature).exp()
    return -(positive / (positive + others + TINY) + TINY).log().mean(1)


def mix(images: Tensor, target: PseudoLabels, own: Tensor) -> tuple[Tensor, PseudoLabels]:
    """Image b where `own` (B, H, W), the next image of the batch elsewhere, with labels and confidence."""
    other = torch.arange(images.shape[0], device=images.device).roll(-1)
    return paste(images[other], images, own), target.taken(other).paste(target, own)


def nearest(x: Tensor, size: Any) -> Tensor:
    """Resizes maps (B, H, W) by nearest neighbour."""
    return F.interpolate(x.unsqueeze(1).double(), size=tuple(size), mode="nearest")[:, 0].to(x.dtype)


def everywhere(x: Tensor) -> Tensor:
    """Concatenates (C, n, ...) of all processes to (C, processes n, ...)."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = x.new_zeros(dist.get_world_size(), *x.shape)
    parts[dist.get_rank()] = x
    return total(parts).movedim(0, 1).flatten(1, 2)
