"""Averaged networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from corrmatch.models.network import Prediction, evaluating

MODES = ("eval", "train")
BUFFERS = ("copy", "average", "own")


class Teacher(nn.Module):
    r"""The moving average of a network, without gradient.

    .. math:: g \leftarrow a\,g + (1 - a)\,f, \qquad a = \min(1 - 1 / (t + 1),\ \mathrm{decay})

    with `ramp`, else a = decay. g are the weights of the teacher, f those of the student. t counts steps from 0, so
    that with a ramp the first update copies the student.

    Args:
        student: The network. The teacher starts as its copy.
        decay: The largest a.
        ramp: Whether a starts small.
        mode: "eval" or "train": the mode that the teacher keeps, also when the method changes its own.
        buffers: The statistics of batch norm: "copy" copies the student's, "average" averages them like parameters
            (but not counters), "own" leaves them to the teacher's forward passes.
    """

    def __init__(
        self, student: nn.Module, decay: float, *, ramp: bool = False, mode: str = "eval", buffers: str = "copy"
    ):
        super().__init__()
        if mode not in MODES or buffers not in BUFFERS:
            raise ValueError(f"mode, buffers: expected one of {MODES} and {BUFFERS}, got {mode!r} and {buffers!r}")
        self.decay, self.ramp, self.mode, self.buffers_are = decay, ramp, mode, buffers
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.train()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The network's output, without gradient."""
        with torch.no_grad():
            return self.network(*arguments, **options)

    def train(self, mode: bool = True) -> Teacher:
        """Keeps the teacher in its own mode, although the loop sets training mode in every step."""
        return super().train(self.mode == "train")

    @torch.no_grad()
    def follow(self, student: nn.Module, step: int) -> None:
        """Updates the average with the student; `step` is t."""
        decay = min(1 - 1 / (step + 1), self.decay) if self.ramp else self.decay
        _move(list(self.network.parameters()), list(student.parameters()), decay)
        if self.buffers_are == "own":
            return
        pairs = list(zip(self.network.buffers(), student.buffers(), strict=True))
        averaged = [pair for pair in pairs if self.buffers_are == "average" and pair[0].is_floating_point()]
        _move([mine for mine, _ in averaged], [theirs for _, theirs in averaged], decay)
        if self.buffers_are == "copy":
            for mine, theirs in pairs:
                mine.copy_(theirs)

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Copies the student, buffers included."""
        self.network.load_state_dict(student.state_dict())


def answer(
    student: nn.Module, teacher: Teacher | None, images: Tensor, *, correlate: bool = False, features: bool = False
) -> Prediction:  # fmt: skip
    """The teacher's prediction; without a teacher, the student's in evaluation mode. No gradient."""
    if teacher is not None:
        return teacher(images, correlate=correlate, features=features)
    with evaluating(student), torch.no_grad():
        return student(images, correlate=correlate, features=features)


def _move(mine: list[Tensor], theirs: list[Tensor], decay: float) -> None:
    if mine:
        torch._foreach_mul_(mine, decay)
        torch._foreach_add_(mine, theirs, alpha=1 - decay)
