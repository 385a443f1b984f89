r"""Self-training in rounds (ST of ST++, CVPR 2022, arXiv 2106.05095): a network labels all images, a new one learns.

.. math:: L = \tfrac12 (L_x + L_s)

The first phase trains on labelled images alone. Before each further phase, the network labels all unlabelled images,
each whole and in several views. L_x is cross-entropy with the labels. L_s is cross-entropy of a strong view, cut and
mixed, with these pseudo-labels, over the pixels whose confidence reaches the threshold of their class, divided by the
number of pixels that are no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from corrmatch.config import Config, ConfigError, key
from corrmatch.data.maps import discard
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.methods.base import Batch, Method, Progress, Run, Step
from corrmatch.methods.parts.labelling import alike, fingerprint
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, paste
from corrmatch.methods.parts.teacher import Teacher, answer
from corrmatch.methods.parts.whole_labels import Views, WholeLabels
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Network
from corrmatch.paths import expand


class SelfTraining(Method):
    """Self-training in rounds: a phase on labels, then `rounds` phases on pseudo-labels of the network before.

    Attributes:
        start: The network as it was before training, from which every phase starts; None with `anew=false`.
        thresholds: (C,) float32, the least confidence of each class in this phase.
    """

    @dataclass
    class Options:
        """Phases and labels."""

        first_epochs: int | None = key(None, "on labelled images alone; null: as a round has, train.epochs", low=1)
        rounds: int = key(1, "of labelling and training", low=1)
        anew: bool = key(True, "a round trains a new network; false: the one that has labelled")
        scales: list[float] = key([1.0], "of the images that are labelled; the probabilities are averaged", low=0.1)
        reflect: bool = key(False, "average with the reflected images, too")
        class_share: float = key(1.0, "of the labels of each class, the most confident, that count", low=0, high=1)

    thresholds: Tensor

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        if not self.options.scales:
            raise ConfigError("self_training.scales: expected at least one scale")
        self.folder = expand(config.work_dir) / "labels"
        self.start = Teacher(self.model, 0) if self.options.anew else None
        self.register_buffer("thresholds", torch.zeros(build.num_classes))
        self.propagation.check(self.thresholds)
        self.hash = ""  # of the network that made the labels of this phase

    @property
    def threshold(self) -> Tensor:
        """The thresholds of the classes (C,)."""
        return self.thresholds

    def phases(self, epochs: int) -> Sequence[int]:
        """Labelled images alone, then the rounds."""
        return (self.options.first_epochs or epochs, *[epochs] * self.options.rounds)

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images, and after the first phase unlabelled ones with their pseudo-labels."""
        if self.phase == 0:
            return {"labeled": LABELED}
        made = self.made(self.phase)
        return {
            "labeled": LABELED,
            "unlabeled": replace(UNLABELED, maps={"pseudo": made.labels, "confidence": made.confidence}),
        }

    def begin(self, phase: int, run: Run) -> None:
        """Before a round the network labels all unlabelled images. Then the weights are those of the start again."""
        if phase == 0:
            return
        network = cast(Network, next(iter(self.scored.values())))
        alike(network)
        self.hash = fingerprint(network)
        made = self.made(phase)
        made.make(network, run, f"labels of round {phase}")
        self.thresholds.copy_(made.thresholds(self.options.class_share, run))
        if run.process == 0:
            discard(self.folder / f"round_{phase - 1}")
        if self.start is not None:
            alike(self.start)
            self.model.load_state_dict(self.start.network.state_dict())
        if self.average is not None:
            self.average.copy_from(self.model)

    def made(self, phase: int) -> WholeLabels:
        """The labels of a round."""
        o = self.options
        return WholeLabels(self.folder / f"round_{phase}", self.hash, Views(o.scales, o.reflect))

    def get_extra_state(self) -> dict[str, str]:
        """The hash of the network that made the labels of this phase."""
        return {"hash": self.hash}

    def set_extra_state(self, state: Any) -> None:
        """The hash of the network that made the labels of this phase."""
        self.hash = state["hash"]

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The two terms, and those of the propagated logits if there is a correlation head."""
        labeled, part = batch["labeled"], self.propagation
        if self.phase == 0:
            return self.learn_labels(labeled)
        unlabeled, truth = batch["unlabeled"], labeled["label"]
        box, strong = unlabeled["box"][:, 0], unlabeled["strong"][:, 0]
        count, size = truth.shape[0], (truth.shape[1], truth.shape[2])
        ignore = unlabeled["ignore"]
        labels = unlabeled["pseudo"].masked_fill(ignore, 0)  # IGNORE there, which has no threshold
        pseudo = PseudoLabels(labels, unlabeled["confidence"], ignore)
        target, strong = pseudo.paste(pseudo.reversed(), box), paste(strong, strong.flip(0), box)
        masks = None
        if part.regions:
            masks = part.masks(answer(self.model, None, unlabeled["weak"], correlate=True), size, progress)
        out = self.model(torch.cat([labeled["image"], strong]), correlate=part.head)
        known, mixed = out.split(count)
        labels, reliable = part.targets(target, self.thresholds, masks, ~box & target.counted, len(self.thresholds))
        loss, scalars = self.learn_mixed(known, truth, mixed, (labels, reliable, target.counted), progress)
        scalars["reliable"] = pseudo.reliable(self.thresholds).sum() / pseudo.counted.sum().clamp(min=1)
        return Step.of(loss, scalars)
