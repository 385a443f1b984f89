r"""Unbiased subclass regularisation (USRN, CVPR 2022, arXiv 2203.10026): a second branch learns balanced subclasses.

.. math::
    L = L_x + L'_x + L_u + L'_u, \qquad
    L_u = \frac1N \sum [\tilde k > \tau]\,\mathrm{CE}(f(s), \tilde y), \qquad
    \tilde y = \begin{cases} \mathrm{par}(y') & H' \le H \\ \arg\max p & \text{else} \end{cases}, \quad
    \tilde k = p_{\tilde y}

A baseline is trained on labelled images. Its features are clustered class by class into subclasses of about equal size.
Then a new network learns the classes, and its second branch the subclasses. Where the entropy H' of this branch is at
most that of the main one, H, it rejects pseudo-labels of other classes than the parent of its own label y'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from corrmatch.config import Config, ConfigError, key
from corrmatch.data.datasets import IGNORE
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import GRAY, Colour, Geometry, View, seeded
from corrmatch.methods.base import Batch, Method, Progress, Run, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, half, nearest
from corrmatch.methods.parts.subclass_maps import make_subclasses, subclass_maps
from corrmatch.models.deeplab import DeepLabV3Plus, second_branch
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Network, Prediction
from corrmatch.paths import expand

JITTER = (0.4, 0.4, 0.4, 0.1)
BLUR = v2.GaussianBlur(5, 1.1)
COLOUR = v2.Compose([
    v2.RandomApply([BLUR], 0.5), v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8), v2.RandomGrayscale(0.2)
])  # fmt: skip


class Subclass(Method):
    """A baseline, then a network with a second branch for subclasses. Each is evaluated in its own phase."""

    @dataclass
    class Options:
        """Subclasses, pseudo-labels, views."""

        threshold: float = key(0.75, "confidence that a pseudo-label exceeds", low=0, high=1)
        counts: list[int] | None = key(None, "subclasses of each class; null: by its share of the pixels", low=1)
        most: int = key(200, "subclasses in all at most, where counts is null", low=2, high=255)
        sample: int = key(256, "points of a subclass that its centre is fitted to", low=1)
        baseline_epochs: int | None = key(None, "of the baseline; null: as many as train.epochs", low=1)
        base: int = key(400, "longer side of images, pixels, that scales refer to; 2048 on Cityscapes", low=1)
        jitter: bool = key(False, "change colours of labelled images, too, as on Cityscapes")
        dropout: float = key(0.1, "of the features that classifiers take", low=0, high=1)
        mask_padding: bool = key(False, "leave padding out of the unlabelled terms")

    bar = ("reliable",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.classes, self.crop, self.seed = build.num_classes, config.train.crop, config.train.seed
        self.folder = expand(config.work_dir)
        self._check_options()
        self.baseline = build()
        self.baseline.correlation = None  # its features are all that counts
        first, second = self.model, build()
        if not (isinstance(first, DeepLabV3Plus) and isinstance(second, DeepLabV3Plus)):
            raise ConfigError("model.decoder: subclass needs deeplabv3plus, whose backbone two branches can share")
        self.branch = second_branch(first, second)
        self.counts: list[int] = []  # subclasses of each class, once they are known
        self.register_buffer("parents", torch.zeros(0, dtype=torch.int64), persistent=False)

    def _check_options(self) -> None:
        counts, most = self.options.counts, self.options.most
        if counts is not None and len(counts) != self.classes:
            raise ConfigError(f"subclass.counts: expected {self.classes} numbers, one a class, got {len(counts)}")
        if counts is not None and sum(counts) > IGNORE:
            raise ConfigError(f"subclass.counts: expected {IGNORE} subclasses at most, got {sum(counts)}")
        if counts is None and most < self.classes:
            raise ConfigError(f"subclass.most: expected one for each of the {self.classes} classes, got {most}")

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images, in the second phase with subclasses, and unlabelled ones with a strong view."""
        unit = self.options.base / self.crop
        known = Geometry((0.5 * unit, 2 * unit), fill=GRAY, fit=True)
        weak = Geometry((0.8 * unit, 2 * unit), fill=GRAY, fit=True)
        colour = Colour(JITTER, 1, gray=0, blur=0) if self.options.jitter else None
        maps = {}
        if self.counts:
            sample, seed = self.options.sample, self.seed
            maps["subclass"] = subclass_maps(self.folder, self.baseline, self.counts, seed, sample)
        return {
            "labeled": replace(LABELED, view=View(known, weak=colour), maps=maps),
            "unlabeled": replace(UNLABELED, view=View(weak, strong=1, colour=COLOUR)),
        }

    def phases(self, epochs: int) -> Sequence[int]:
        """The baseline, then both branches."""
        return (self.options.baseline_epochs or epochs, epochs)

    def trains(self, phase: int) -> list[nn.Parameter]:
        """The baseline in the first phase; all others in the second."""
        networks = (self.baseline,) if phase == 0 else (self.model, self.branch)
        own = {id(p) for network in networks for p in network.parameters()}
        return [p for p in super().trains(phase) if id(p) in own]

    def begin(self, phase: int, run: Run) -> None:
        """Before the second phase: subclasses of the labelled images."""
        if phase == 0:
            return
        options = self.options
        counts = make_subclasses(self.baseline, run, options.counts, most=options.most, sample=options.sample)
        with seeded(run.config.train.seed, phase):  # the same classifier in all processes
            self.divide(counts)
        if self.average is not None:
            self.average.copy_from(self.model)

    def divide(self, counts: list[int]) -> None:
        """Builds the classifier of the branch for these numbers of subclasses of each class."""
        old, self.counts = self.branch.classifier, counts
        self.branch.decode[-1] = nn.Conv2d(old.in_channels, sum(counts), 1).to(old.weight.device)
        self.parents = parents_of(counts).to(old.weight.device)

    def get_extra_state(self) -> Tensor:
        """The numbers of subclasses, which a checkpoint needs to build the classifier before its weights are loaded."""
        return torch.tensor(self.counts, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the numbers of subclasses."""
        if len(state) > 0:
            self.divide(state.tolist())

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The loss of the baseline or the four terms, and those of propagated logits if there is a correlation head."""
        labeled, part = batch["labeled"], self.propagation
        if progress.phase == 0:
            out = self.baseline(labeled["image"], features=True)
            loss = self.supervised(self.classify(self.baseline, out.features), labeled["label"])
            return Step.of(loss, {"x": loss})
        known = self.ask(labeled["image"], part.head)
        strong = self.ask(batch["unlabeled"]["strong"][:, 0], part.head)
        with torch.no_grad():  # in training mode: norm layers and dropout as in the other passes
            weak = self.ask(batch["unlabeled"]["weak"], part.regions)
            said = self.judge(weak)
        labels, used, counted = self.targets(said, weak, batch["unlabeled"]["ignore"], progress)
        sure = (said.confidence > self.options.threshold) & counted
        scalars = {
            "x": self.supervised(self.classify(self.model, known.features), labeled["label"]),
            "x_sub": losses.supervised(
                self.classify(self.branch, known.subfeatures), labeled["subclass"], hard_pixels=self.hard_pixels
            ),
            "u": losses.pseudo_supervised(self.classify(self.model, half(strong.features)), labels, used, counted),
            "u_sub": losses.pseudo_supervised(
                self.classify(self.branch, half(strong.subfeatures)), said.subclass, sure, counted
            ),
        }
        loss = torch.stack(list(scalars.values())).sum()
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(known.first), labeled["label"])
            corr = losses.pseudo_supervised(part.logits(strong.first), labels, used, counted)
            scalars["u_corr"] = part.from_start(corr, progress)
            loss = loss + part.weight * (scalars["x_corr"] + scalars["u_corr"]) / 2
        scalars["reliable"] = used.sum() / counted.sum().clamp(min=1)
        scalars["sub_reliable"] = sure.sum() / counted.sum().clamp(min=1)
        return Step.of(loss, scalars)

    def judge(self, weak: Answer) -> Judgement:
        """The predictions of both branches for weak views, at stride 8, without gradient."""
        p, own = (self.classify(*pair).float().softmax(1) for pair in (
            (self.model, half(weak.features)), (self.branch, half(weak.subfeatures))
        ))  # fmt: skip
        confidence, subclass = own.max(1)
        return Judgement(p, subclass, confidence, entropy(p), entropy(own))

    def targets(
        self, said: Judgement, weak: Answer, ignore: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pseudo-labels (B, h, w) of weak views, where they are used, and which pixels are not padding."""
        labels, confidence = gated(said, self.parents)
        size = (labels.shape[1], labels.shape[2])
        counted = ~nearest(ignore, size) if self.options.mask_padding else torch.ones_like(labels, dtype=torch.bool)
        used = (confidence > self.options.threshold) & counted
        masks = self.propagation.masks(weak.first, size, progress)
        # The confidence has to exceed the threshold; what does not is left out here.
        pseudo = PseudoLabels(labels, confidence, ~used)
        labels, used = self.propagation.targets(pseudo, self.options.threshold, masks, counted, self.classes)
        return labels, used, counted

    def ask(self, images: Tensor, correlate: bool) -> Answer:
        """The features of both branches. The first stages of the backbone are shared."""
        first = self.model(images, features=True, low=True, correlate=correlate)
        return Answer(first, self.branch(first.low, features=True))

    def classify(self, network: Network, features: Tensor) -> Tensor:
        """Logits of features, with dropout in training."""
        return network.classifier(F.dropout(features, self.options.dropout, self.training))

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The baseline, then the main branch alone."""
        return {"model": self.model} if self.counts else {"baseline": self.baseline}

    @property
    def labeller(self) -> nn.Module:
        """The main branch, without the veto of the other one."""
        return self.model


class Answer(NamedTuple):
    """The features of both branches."""

    first: Prediction
    second: Prediction

    @property
    def features(self) -> Tensor:
        """Features (B, channels, h, w) of the main branch at stride 4."""
        return self.first.features  # type: ignore[return-value]

    @property
    def subfeatures(self) -> Tensor:
        """Features of the subclass branch."""
        return self.second.features  # type: ignore[return-value]


class Judgement(NamedTuple):
    """The predictions of both branches at pixels (B, h, w)."""

    p: Tensor  # (B, C, h, w), probabilities of the classes
    subclass: Tensor  # the most probable one
    confidence: Tensor  # its probability
    entropy: Tensor  # of the classes
    sub_entropy: Tensor  # of the subclasses


def gated(said: Judgement, parents: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and confidence of the classes. Where subclasses have no larger entropy, only their parent remains."""
    labels = torch.where(said.sub_entropy <= said.entropy, parents[said.subclass], said.p.argmax(1))
    return labels, said.p.gather(1, labels.unsqueeze(1))[:, 0]


def entropy(p: Tensor) -> Tensor:
    """The normalised entropy of probabilities (B, C, h, w), from 0 to 1."""
    return -(p * (p + 1e-30).log()).sum(1) / math.log(p.shape[1])


def parents_of(counts: Sequence[int]) -> Tensor:
    """The class of each subclass (K,). Subclasses of a class have consecutive numbers."""
    return torch.repeat_interleave(torch.tensor(counts))
