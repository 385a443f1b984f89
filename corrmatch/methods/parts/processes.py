"""What the processes of a run know together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def total(sums: Tensor) -> Tensor:
    """The sum over all processes, the same in each of them; `sums` itself in a run of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    sums = sums.contiguous().clone()
    dist.all_reduce(sums)
    return sums
