"""Where a run stands."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Progress(NamedTuple):
    """Where a run stands; the same in all processes."""

    step: int  # steps of the optimiser made so far
    steps: int  # of the whole run
    epoch_steps: int  # of an epoch
    phase: int  # index into `Method.phases`
    generator: torch.Generator  # on the device; a function of the run's seed and the step

    @property
    def epoch(self) -> int:
        """Counted from 0."""
        return self.step // self.epoch_steps
