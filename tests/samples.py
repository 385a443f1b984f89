"""A call of every op on random inputs, for tests that go over all of them: what `support` says of each."""

from __future__ import annotations

import torch
from support import OPS
from torch import Tensor

# Name of the sample: the op, and what makes the call.
SAMPLES = {name: (op, make) for op, support in OPS.items() for name, make in support.SAMPLES.items()}
DIFFERENTIABLE = tuple(name for support in OPS.values() for name in support.DIFFERENTIABLE)


def results(found) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def with_gradients(call, arguments) -> list[Tensor]:
    """Results, and the gradients of every floating map, which come first."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() and x.dim() == 4 else x for x in arguments]
    found = call(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.square().sum(), wanted)]
