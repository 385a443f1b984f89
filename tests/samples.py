"""Sample calls of all ops on random inputs, for tests of all ops. `support` has those of each op."""

from __future__ import annotations

import torch
from support import OPS
from torch import Tensor

# Name of a sample: its op, and the function that makes the call.
SAMPLES = {name: (op, make) for op, support in OPS.items() for name, make in support.SAMPLES.items()}
DIFFERENTIABLE = tuple(name for support in OPS.values() for name in support.DIFFERENTIABLE)


def results(found) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def with_gradients(call, arguments) -> list[Tensor]:
    """The result, then the gradients of the floating maps, which are the first arguments."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() and x.dim() == 4 else x for x in arguments]
    found = call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.square().sum(), wanted)]
