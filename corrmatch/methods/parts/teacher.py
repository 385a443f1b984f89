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
    r"""A network that follows another one as its moving average; it takes no gradient.

    .. math:: g \leftarrow a\,g + (1 - a)\,f, \qquad a = \min(1 - 1 / (t + 1),\ \mathrm{decay})

    with `ramp`, else a = decay. t counts steps from 0, so that the first update of a ramp copies the student.

    Args:
        student: The network; the teacher starts as its copy.
        decay: Of the average.
        ramp: Whether the average starts short.
        mode: "eval" stays in evaluation mode whatever mode the method is in, "train" in training mode.
        buffers: What becomes of batch norm's statistics: "copy" of the student's, "average" as parameters (counters
            stay), or "own", which the teacher's forwards alone move.
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
        """Keeps the teacher in its own mode: the loop asks for training mode in every step."""
        return super().train(self.mode == "train")

    @torch.no_grad()
    def follow(self, student: nn.Module, step: int) -> None:
        """Moves towards the student; `step` is t."""
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
        """Becomes the student, buffers included."""
        self.network.load_state_dict(student.state_dict())


def answer(student: nn.Module, teacher: Teacher | None, images: Tensor, *, correlate: bool = False) -> Prediction:
    """The teacher's prediction; without a teacher, the student's in evaluation mode. No gradient."""
    if teacher is not None:
        return teacher(images, correlate=correlate)
    with evaluating(student), torch.no_grad():
        return student(images, correlate=correlate)


def _move(mine: list[Tensor], theirs: list[Tensor], decay: float) -> None:
    if mine:
        torch._foreach_mul_(mine, decay)
        torch._foreach_add_(mine, theirs, alpha=1 - decay)
