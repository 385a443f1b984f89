"""The progress of a run."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Progress(NamedTuple):
    """The progress of a run, equal in all processes."""

    step: int  # steps of the optimiser so far
    steps: int  # steps of the whole run
    epoch_steps: int  # steps of an epoch
    phase: int  # index into `Method.phases`
    generator: torch.Generator  # on the device, seeded with the run's seed and the step

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return self.step // self.epoch_steps
