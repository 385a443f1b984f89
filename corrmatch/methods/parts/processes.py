"""Sums over the processes of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def total(sums: Tensor) -> Tensor:
    """The sum over all processes, equal in all of them. With a single process, `sums` itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    sums = sums.contiguous().clone()
    dist.all_reduce(sums)
    return sums
