"""The base class of training methods: streams of images, networks and other state, and the loss of a batch.

The training loop calls `forward` for each batch, and `before_step` and `finish_step` around each step of the optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from corrmatch.config import Config, TrainConfig
from corrmatch.data.classes import log_frequencies
from corrmatch.data.datasets import Data
from corrmatch.data.streams import Stream
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.progress import Progress as Progress
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Network, Prediction, enlarge

Batch = dict[str, dict[str, Tensor]]


class Step(NamedTuple):
    """The loss of one batch and the scalars to be logged: 0-d tensors on the device."""

    loss: Tensor
    scalars: dict[str, Tensor]

    @classmethod
    def of(cls, loss: Tensor, scalars: dict[str, Tensor]) -> Step:
        """A step whose scalars include the loss. The scalars are detached."""
        return cls(loss, {"loss": loss.detach()} | {name: value.detach() for name, value in scalars.items()})


class Run(NamedTuple):
    """The run, as work between phases sees it."""

    data: Data
    config: Config
    folder: Path
    device: torch.device
    process: int
    processes: int


@dataclass
class NoOptions:
    """Options of a method without own keys."""


class Method(nn.Module):
    """Base class of all methods. Modules and buffers, such as teachers and thresholds, are saved in checkpoints.

    Attributes:
        Options: A dataclass of `config.key`s: the section of a configuration that carries the method's name.
        renamed: Old names of keys, and their current names.
        correlation: Whether the method is published with a correlation head and regions.
        needs_unlabeled: Whether a phase of it trains on unlabelled images.
        pseudo_labels: Whether it makes pseudo-labels, which regions can propagate.
        score_all: Whether all networks of `evaluated` are scored during training, or only the first.
        bar: Scalars that the progress bar shows in addition to the loss.
        labels_first: Whether it supports `train.labels_first`, steps on labelled images alone before it begins.
        spreads_labels: Whether it supports `propagation.label_temperature`.
        carries_on: Whether the optimiser keeps its state, such as momentum, from one phase to the next.
        phase: The current phase.
        model: The trained network. Further networks are further attributes, built by the same factory.
        average: The averaged network that `train.ema` asks for.
        adjustment: (C,) float32, what the supervised terms add to logits; None without `train.logit_adjustment`.
    """

    Options: ClassVar[type] = NoOptions
    renamed: ClassVar[Mapping[str, str]] = {}
    correlation: ClassVar[bool] = False
    needs_unlabeled: ClassVar[bool] = True
    pseudo_labels: ClassVar[bool] = True
    score_all: ClassVar[bool] = False
    bar: ClassVar[Sequence[str]] = ()
    labels_first: ClassVar[bool] = False
    spreads_labels: ClassVar[bool] = False
    carries_on: ClassVar[bool] = False
    phase: int = 0
    adjustment: Tensor | None

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__()
        self.options: Any = config.options
        self.propagation = Propagation(config.propagation)
        self.first_steps = config.train.labels_first
        self.hard_pixels = config.train.ohem_pixels if config.train.ohem else None
        self.tau = config.train.logit_adjustment
        self.register_buffer("adjustment", torch.zeros(build.num_classes) if self.tau > 0 else None)
        self.model = build()
        self.average: Teacher | None = None

    # Every method implements these.

    def streams(self) -> Mapping[str, Stream]:
        """The parts of a batch by name, each a stream of images and their views."""
        raise NotImplementedError

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The loss of a batch."""
        raise NotImplementedError

    # Most methods keep these.

    def before_step(self, progress: Progress) -> None:
        """Called once before each step of the optimiser, before its first batch."""

    def after_step(self, progress: Progress) -> None:
        """Called once after each step of the optimiser. `progress.step` is the number of earlier steps."""

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """Networks by name. The first one is scored, shown, and used by `corrmatch predict`."""
        return {"model": self.model}

    @property
    def labeller(self) -> nn.Module:
        """The network whose pseudo-labels `eval.pseudo_labels` measures: the first of `evaluated`."""
        return next(iter(self.evaluated.values()))

    @property
    def threshold(self) -> float | Tensor:
        """The least confidence of a pseudo-label: the method's key of this name, or 0."""
        return getattr(self.options, "threshold", 0.0)

    def panels(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Label maps and bool maps (B, H, W) and bool masks (B, K, H, W) to log, with a network in evaluation mode."""
        return {"prediction": enlarge(model(images).logits, images.shape[2:]).argmax(1)}

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """Groups of trained parameters: backbones at the rate `lr`, all others at `lr_multi` times that rate.

        A group has a `name` and an `lr`. The schedule stays above its `least_lr`, if it has one.
        """
        groups = [{"name": "backbone", "lr": train.lr}, {"name": "head", "lr": train.lr * train.lr_multi}]
        for group in groups:
            inside = group["name"] == "backbone"
            group["params"] = [p for name, p in self.trained() if ("backbone" in name.split(".")) == inside]
        return groups

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the optimiser updates, by name."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # Methods with several phases override these. Each phase has its own optimiser and schedule.

    def phases(self, epochs: int) -> Sequence[int]:
        """Epochs of each phase."""
        return (epochs,)

    def trains(self, phase: int) -> list[nn.Parameter]:
        """The parameters that a phase trains: all but those of teachers and frozen backbones. Others are frozen."""
        fixed: list[nn.Module] = [module for module in self.modules() if isinstance(module, Teacher)]
        fixed += [module.backbone for module in self.modules() if isinstance(module, Network) and module.frozen]
        without = {id(p) for module in fixed for p in module.parameters()}
        return [p for p in self.parameters() if id(p) not in without]

    def begin(self, phase: int, run: Run) -> None:
        """Work before a phase and before its optimiser is made. It is not repeated when the phase is resumed."""

    # The loop calls these.

    def see_data(self, data: Data) -> None:
        """Called once, before a run starts: measures what `train.logit_adjustment` needs."""
        if self.adjustment is not None:
            self.adjustment.copy_(self.tau * log_frequencies(data))

    def finish_step(self, progress: Progress) -> None:
        """All updates after a step of the optimiser."""
        self.after_step(progress)
        if self.average is not None:
            self.average.follow(next(iter(self.evaluated.values())), progress.step)

    @property
    def scored(self) -> dict[str, nn.Module]:
        """The networks to score: `evaluated`, after the averaged network of `train.ema` if there is one."""
        averaged = {} if self.average is None else {"average": self.average.network}
        return averaged | self.evaluated

    # Methods use these.

    def learn_labels(self, labeled: Mapping[str, Tensor]) -> Step:
        """The supervised terms alone, for the `train.labels_first` steps before a method begins."""
        out, truth = self.model(labeled["image"], correlate=self.propagation.head), labeled["label"]
        loss = self.supervised(out.logits, truth)
        scalars = {"x": loss}
        if self.propagation.head:
            scalars["x_corr"] = self.supervised(self.propagation.logits(out), truth)
            loss = loss + self.propagation.weight * scalars["x_corr"]
        return Step.of(loss, scalars)

    def learn_mixed(
        self, known: Prediction, truth: Tensor, mixed: Prediction, target: tuple[Tensor, Tensor, Tensor],
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Half the sum of the supervised term and of mixed views under pseudo-labels; and the terms, by name.

        With a correlation head the same terms of the propagated logits are added.

        Args:
            known: The prediction on labelled images.
            truth: Their labels.
            mixed: The prediction on mixed strong views.
            target: Their labels, where these are reliable, and where pixels are counted.
            progress: The progress of the run.
        """
        part = self.propagation
        scalars = {
            "x": self.supervised(known.logits, truth),
            "s": losses.pseudo_supervised(mixed.logits, *target),
        }
        loss = (scalars["x"] + scalars["s"]) / 2
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(known), truth)
            scalars["corr"] = part.from_start(losses.pseudo_supervised(part.logits(mixed), *target), progress)
            loss = loss + part.weight * (scalars["x_corr"] + scalars["corr"]) / 2
        return loss, scalars

    def supervised(self, logits: Tensor, truth: Tensor) -> Tensor:
        r"""Cross-entropy of logits (B, C, h, w) with labels (B, H, W), over hard pixels only if `train.ohem` is set.

        With `train.logit_adjustment` it is that of z_c + tau log f_c, with f the frequencies of the classes in the
        labels. Then z itself, from which predictions and pseudo-labels are made, predicts rare classes more often: as
        if they were more frequent by f_c^(-tau).

        Source: logit adjustment (ICLR 2021, arXiv 2007.07314).
        """
        if self.adjustment is not None:
            logits = logits + self.adjustment[:, None, None]
        return losses.supervised(logits, truth, hard_pixels=self.hard_pixels)
