r"""Pseudo-label enhancement (IEEE Access 2022, doi 10.1109/ACCESS.2022.3172664) on dynamic mutual training.

.. math::
    L = \frac{1}{|\{y \ne 255\}|} \sum \omega\,\mathrm{CE}(z, y), \qquad
    \omega = \begin{cases} p_y^{\gamma_1} & \arg\max p = y \\ 0 & \max p > s \\ p_y^{\gamma_2} & \text{else} \end{cases}

Two networks are trained on labelled images, then in phases. Before each phase, each network labels the unlabelled
images for the other one: label y with confidence s, for a growing share of each class. The new labels are merged with
those of the same network one phase earlier; at each pixel one of the two is kept. omega is 1 on labelled images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from corrmatch import ops
from corrmatch.config import Config, ConfigError, TrainConfig, key
from corrmatch.data.datasets import IGNORE
from corrmatch.data.maps import discard
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Run, Step
from corrmatch.methods.parts.labelling import alike, fingerprint
from corrmatch.methods.parts.rehearsal import Rehearsal, Rules, dynamic_weights
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Network
from corrmatch.paths import expand

NAMES = ("first", "second")
VIEW = View(Geometry(scales=(0.5, 1.5)))
SUFFIXES = ("", "_peer")  # of the streams of both networks


class Side(NamedTuple):
    """The batch of one network: labelled images, then pseudo-labelled ones."""

    images: Tensor
    labels: Tensor  # (B, H, W), IGNORE where there is none
    confidence: Tensor  # of pseudo-labels
    known: int  # so many images are labelled


class Forgetting(Method):
    """Two networks that make pseudo-labels for one another, in phases. Both are evaluated."""

    @dataclass
    class Options:
        """Phases, labels, weights."""

        ratios: list[float] = key([0.2, 0.4, 0.6, 0.8, 1.0], "labels of each class that are kept, phase by phase",
                                  low=0, high=1)  # fmt: skip
        first_epochs: int | None = key(None, "on labelled images alone; null: as a phase has, train.epochs", low=1)
        first_lr: float | None = key(None, "train.lr of these epochs; null: that of all", low=0)
        labeled: list[int] = key([1], "labelled images of a batch in phase 1, 2, ...; the last for all others", low=1)
        part: float = key(0.8, "of the labelled images that a network has at first, from either end of the list",
                          low=0, high=1)  # fmt: skip
        agree: float = key(5.0, "exponent gamma_1, of a pseudo-label's probability where the network agrees", low=0)
        disagree: float = key(5.0, "exponent gamma_2, where it does not, and is less sure than the label", low=0)
        gap: float = key(0.15, "by so much an earlier label has to be surer to be taken", low=0, high=1)
        background: int | None = key(0, "class that any other class replaces; null: none", low=0)
        dropped_loses: bool = key(False, "a label is always preferred to a dropped one; false as published")

    score_all = True
    bar = ("weight",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.classes, self.batch_size = build.num_classes, config.train.batch_size
        self.folder = expand(config.work_dir) / "labels"
        if max(self.options.labeled, default=self.batch_size) >= self.batch_size:
            raise ConfigError("forgetting.labeled: expected numbers below train.batch_size, which is all of a batch")
        if self.options.background is not None and self.options.background >= self.classes:
            raise ConfigError(f"forgetting.background: expected one of {self.classes} classes, or null")
        self.peer = build()
        self.previous: Any = nn.ModuleList(Teacher(network, 0) for network in self.networks)
        self.prints: list[str] = []  # of the networks that made the labels of this phase

    @property
    def networks(self) -> tuple[Network, Network]:
        """The two trained networks."""
        return self.model, self.peer

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The two trained networks."""
        return dict(zip(NAMES, self.networks, strict=True))

    def phases(self, epochs: int) -> Sequence[int]:
        """Labelled images alone, then a phase for each ratio."""
        return (self.options.first_epochs or epochs, *[epochs] * len(self.options.ratios))

    def streams(self) -> Mapping[str, Stream]:
        """For each network labelled images, and after the first phase unlabelled ones with the other one's labels."""
        part, known, unlabeled = self.options.part, replace(LABELED, view=VIEW), replace(UNLABELED, view=VIEW)
        if self.phase == 0:
            return {
                "labeled": replace(known, part=(0.0, part)),
                "labeled_peer": replace(known, order=3, part=(1 - part, 1.0)),
            }
        size = self.options.labeled[min(self.phase, len(self.options.labeled)) - 1]
        for_first, for_second = (self.rehearsal(self.phase, i) for i in (1, 0))
        maps = [{"pseudo": made.labels, "confidence": made.confidence} for made in (for_first, for_second)]
        rest = self.batch_size - size
        return {
            "labeled": replace(known, size=size),
            "labeled_peer": replace(known, order=3, size=size),
            "unlabeled": replace(unlabeled, maps=maps[0], size=rest),
            "unlabeled_peer": replace(unlabeled, order=2, maps=maps[1], size=rest),
        }

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """The first phase has its own learning rate."""
        first = self.options.first_lr
        return super().parameter_groups(replace(train, lr=first) if self.phase == 0 and first is not None else train)

    def begin(self, phase: int, run: Run) -> None:
        """Before a phase both networks label the unlabelled images. Copies of them become the previous networks."""
        if phase == 0:
            return
        alike(*self.networks, *self.previous)
        self.prints = [fingerprint(network) for network in self.networks]
        options, ratio = self.options, self.options.ratios[phase - 1]
        rules = Rules(self.classes, ratio, options.gap, options.background, options.dropped_loses)
        for i, (name, network, previous) in enumerate(zip(NAMES, self.networks, self.previous, strict=True)):
            before = None if phase == 1 else previous.network
            about = f"the {name} network, phase {phase}"
            thresholds = self.rehearsal(phase, i).make(network, before, rules, self.propagation, run, about)
            if run.process == 0:
                tqdm.write(f"{about}: thresholds {', '.join(f'{x:.3f}' for x in thresholds.tolist())}", file=sys.stderr)
        for network, previous in zip(self.networks, self.previous, strict=True):
            previous.copy_from(network)
        if run.process == 0:
            discard(self.folder / f"phase_{phase - 1}")

    def rehearsal(self, phase: int, network: int) -> Rehearsal:
        """The labels that a network made for a phase."""
        folder = self.folder / f"phase_{phase}" / NAMES[network]
        return Rehearsal(folder, self.prints[network], phase)

    def get_extra_state(self) -> dict[str, list[str]]:
        """Hashes of the networks that made the labels of this phase."""
        return {"prints": self.prints}

    def set_extra_state(self, state: Any) -> None:
        """Hashes of the networks that made the labels of this phase."""
        self.prints = list(state["prints"])

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The loss of both networks, and that of the propagated logits if they have correlation heads."""
        sides = [side_of(batch, suffix) for suffix in SUFFIXES]
        steps = [self.learn(*pair, progress) for pair in zip(self.networks, sides, strict=True)]
        scalars = {name: torch.stack([found[name] for _, found in steps]).mean() for name in steps[0][1]}
        return Step.of(torch.stack([loss for loss, _ in steps]).sum(), scalars)

    def learn(self, network: nn.Module, side: Side, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one network."""
        part, known = self.propagation, side.known
        out = network(side.images, correlate=part.head)
        if known == len(side.images):
            scalars = {"x": self.supervised(out.logits, side.labels)}
            loss = scalars["x"]
            if part.head:
                scalars["x_corr"] = self.supervised(part.logits(out), side.labels)
                loss = loss + part.weight * scalars["x_corr"]
            return loss, scalars
        counted = side.labels != IGNORE
        exponents = (self.options.agree, self.options.disagree)
        taught = out.logits[known:].detach(), side.labels[known:], side.confidence[known:]
        pseudo, disagree, surer = dynamic_weights(*taught, exponents)
        weight = torch.cat([counted[:known].float(), pseudo])
        loss, pixels = weighted(out.logits, side.labels, weight)
        kept = counted[known:].sum().clamp(min=1)
        scalars = {
            "x": pixels[:known].sum() * counted.sum() / counted[:known].sum().clamp(min=1),
            "weight": pseudo.sum() / kept, "disagree": disagree.sum() / kept, "surer": surer.sum() / kept,
        }  # fmt: skip
        if part.head:
            weight = torch.cat([weight[:known], part.from_start(pseudo, progress)])
            scalars["corr"], _ = weighted(part.logits(out), side.labels, weight)
            loss = loss + part.weight * scalars["corr"]
        return loss, scalars


def side_of(batch: Batch, suffix: str) -> Side:
    """The part of the batch for one network."""
    known, unlabeled = batch[f"labeled{suffix}"], batch.get(f"unlabeled{suffix}")
    images, labels = [known["image"]], [known["label"]]
    confidence = [torch.ones_like(known["label"], dtype=torch.float32)]
    if unlabeled is not None:
        images.append(unlabeled["weak"])
        labels.append(unlabeled["pseudo"])
        confidence.append(unlabeled["confidence"])
    return Side(torch.cat(images), torch.cat(labels), torch.cat(confidence), len(images[0]))


def weighted(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy divided by the number of labelled pixels, and its value at each pixel (B, H, W)."""
    return ops.cross_entropy(logits, labels, weight / (labels != IGNORE).sum().clamp(min=1))
