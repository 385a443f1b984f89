"""What a training method is: streams that it draws, networks and state that it holds, a loss from a batch.

The loop knows three verbs: `before_step` and `finish_step` around each step of the optimiser, `forward` for each batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from corrmatch.config import Config, TrainConfig
from corrmatch.data.datasets import Data
from corrmatch.data.streams import Stream
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.progress import Progress as Progress
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Network, enlarge

Batch = dict[str, dict[str, Tensor]]


class Step(NamedTuple):
    """The loss of one batch and what is to be logged: 0-d tensors, left on the device."""

    loss: Tensor
    scalars: dict[str, Tensor]

    @classmethod
    def of(cls, loss: Tensor, scalars: dict[str, Tensor]) -> Step:
        """The loss is logged beside the scalars, of which none keeps a graph."""
        return cls(loss, {"loss": loss.detach()} | {name: value.detach() for name, value in scalars.items()})


class Run(NamedTuple):
    """What work between phases can use."""

    data: Data
    config: Config
    folder: Path
    device: torch.device
    process: int
    processes: int


@dataclass
class NoOptions:
    """A method without keys of its own."""


class Method(nn.Module):
    """Base of all methods. Networks, teachers, banks and thresholds are attributes: all of them are saved and resumed.

    Attributes:
        Options: A dataclass of `config.key`s: the section of a configuration that carries the method's name.
        renamed: Keys of earlier versions, and what they are called now.
        correlation: Whether the method is published with a correlation head and regions.
        pseudo_labels: Whether it makes labels that regions could propagate.
        score_all: Score all networks of `evaluated` in training, not only the first.
        bar: Scalars that the progress bar shows beside the loss.
        labels_first: Whether it begins with steps on labelled images where `train.labels_first` asks for them.
        carries_on: Whether an optimiser keeps, over phases, what it knows of the parameters: momentum and the like.
        phase: Where the loop stands.
        model: A network that is trained. Further ones are further attributes, from the same factory.
        average: The averaged network that `train.ema` asks for.
    """

    Options: ClassVar[type] = NoOptions
    renamed: ClassVar[Mapping[str, str]] = {}
    correlation: ClassVar[bool] = False
    pseudo_labels: ClassVar[bool] = True
    score_all: ClassVar[bool] = False
    bar: ClassVar[Sequence[str]] = ()
    labels_first: ClassVar[bool] = False
    carries_on: ClassVar[bool] = False
    phase: int = 0

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__()
        self.options: Any = config.options
        self.propagation = Propagation(config.propagation)
        self.first_steps = config.train.labels_first
        self.hard_pixels = config.train.ohem_pixels if config.train.ohem else None
        self.model = build()
        self.average: Teacher | None = None

    # What every method says.

    def streams(self) -> Mapping[str, Stream]:
        """What a batch consists of: name -> images and views."""
        raise NotImplementedError

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The loss of a batch."""
        raise NotImplementedError

    # What most methods leave as it is.

    def before_step(self, progress: Progress) -> None:
        """Called once before each step of the optimiser, before its first batch."""

    def after_step(self, progress: Progress) -> None:
        """Called once after each step of the optimiser, `progress.step` being the number of steps before it."""

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """Networks by name; the first is scored, saved as the one to predict with, and shown."""
        return {"model": self.model}

    @property
    def labeller(self) -> nn.Module:
        """The network whose pseudo-labels `eval.pseudo_labels` measures: the first of `evaluated`."""
        return next(iter(self.evaluated.values()))

    @property
    def threshold(self) -> float | Tensor:
        """Confidence from which a pseudo-label counts: the key of that name, 0 in methods without one."""
        return getattr(self.options, "threshold", 0.0)

    def corrected(self, logits: Tensor) -> Tensor:
        """The logits (B, C, h, w) of unlabelled images as they are turned into pseudo-labels."""
        return logits

    def panels(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Label maps (B, H, W), bool maps and bool masks (B, K, H, W) to look at; the network is in evaluation mode."""
        return {"prediction": enlarge(model(images).logits, images.shape[2:]).argmax(1)}

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """Trained parameters with a `name` and an `lr`: those of backbones, and all others at `lr_multi` times it.

        A group may say a `least_lr`, which the schedule keeps to.
        """
        groups = [{"name": "backbone", "lr": train.lr}, {"name": "head", "lr": train.lr * train.lr_multi}]
        for group in groups:
            inside = group["name"] == "backbone"
            group["params"] = [p for name, p in self.trained() if ("backbone" in name.split(".")) == inside]
        return groups

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are not frozen, by name: those that the optimiser moves."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # Methods in several phases, each with an optimiser and a schedule of its own.

    def phases(self, epochs: int) -> Sequence[int]:
        """Epochs of each phase."""
        return (epochs,)

    def trains(self, phase: int) -> list[nn.Parameter]:
        """What a phase trains: all but teachers and frozen backbones. The loop freezes the rest, also on resume."""
        fixed: list[nn.Module] = [module for module in self.modules() if isinstance(module, Teacher)]
        fixed += [module.backbone for module in self.modules() if isinstance(module, Network) and module.frozen]
        without = {id(p) for module in fixed for p in module.parameters()}
        return [p for p in self.parameters() if id(p) not in without]

    def begin(self, phase: int, run: Run) -> None:
        """Work before a phase, and before its optimiser exists; not done again when the phase is resumed."""

    # What the loop calls.

    def finish_step(self, progress: Progress) -> None:
        """Everything that follows a step of the optimiser."""
        self.after_step(progress)
        if self.average is not None:
            self.average.follow(next(iter(self.evaluated.values())), progress.step)

    @property
    def scored(self) -> dict[str, nn.Module]:
        """`evaluated`, behind the averaged network where there is one."""
        averaged = {} if self.average is None else {"average": self.average.network}
        return averaged | self.evaluated

    # What methods share.

    def learn_labels(self, labeled: Mapping[str, Tensor]) -> Step:
        """The supervised terms alone, for the `train.labels_first` steps before a method begins."""
        out, truth = self.model(labeled["image"], correlate=self.propagation.head), labeled["label"]
        loss = self.supervised(out.logits, truth)
        scalars = {"x": loss}
        if self.propagation.head:
            scalars["x_corr"] = self.supervised(self.propagation.logits(out), truth)
            loss = loss + self.propagation.weight * scalars["x_corr"]
        return Step.of(loss, scalars)

    def supervised(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy with labels (B, H, W); of hard pixels only where `train.ohem` says so."""
        return losses.supervised(logits, truth, hard_pixels=self.hard_pixels)
