"""Random valid shapes, layouts, dtypes, options and numbers for the random calls of `support`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import layouts
import torch
from backends import FLOATING, Target
from torch import Tensor

from corrmatch import RegionMasks, ops

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NAN, INF = float("nan"), float("inf")


@dataclass
class RandomCall:
    """A call of the function `name` with the keyword arguments `tensors` and `options`.

    Attributes:
        disagreement: Function of call, target and result. It describes what is wrong; None if the result is right.
        threads: Threads of the CPU kernels.
        grad: Gradient of the result, if gradients of the maps in `leaves` are computed.
    """

    name: str
    disagreement: Callable[[RandomCall, Target, Any], str | None]
    tensors: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    grad: Tensor | None = None
    leaves: tuple[str, ...] = ()

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{name} {str(x.dtype)[6:]} {tuple(x.shape)}" for name, x in self.tensors.items() if isinstance(x, Tensor)
        )
        return f"{self.name}({shapes}, {', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def on(self, target: Target) -> Any:
        """The result of the target; with gradients a tuple of result and gradients."""
        tensors = {k: there(x, target.device) for k, x in self.tensors.items()}
        options = dict(self.options) if target.name == "torch" else {**self.options, "backend": target.name}
        if isinstance(options.get("threshold"), Tensor):
            options["threshold"] = options["threshold"].to(target.device)
        if self.grad is None:
            return getattr(ops, self.name)(**tensors, **options)
        leaves = {k: tensors[k].detach().requires_grad_() for k in self.leaves}
        z = getattr(ops, self.name)(**{**tensors, **leaves}, **options)
        return z.detach(), *torch.autograd.grad(z, list(leaves.values()), layouts.moved(self.grad, target.device))


def there(x: Any, device: str) -> Any:
    """A copy of a tensor or of masks on the device, in the same layout."""
    if isinstance(x, RegionMasks):
        return RegionMasks(layouts.moved(x.packed, device), x.size)
    return layouts.moved(x, device) if isinstance(x, Tensor) else x


def maps(batch, depth, height, width, device="cpu"):
    return torch.randn(batch, depth, height, width, device=device)


def side(r: random.Random) -> tuple[int, int]:
    """The side of a grid: mostly small, sometimes long."""
    if r.random() < 0.15:
        strip = (1, r.randint(1, 150))
        return strip if r.random() < 0.5 else strip[::-1]
    return r.randint(1, 12), r.randint(1, 12)


def channels(r: random.Random) -> int:
    return r.choice((1, 2, 3, 4, 5, 8, 13, 16, 17, 21, 31, 33)) if r.random() < 0.97 else r.choice((64, 150, 256))


def numbers(r: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random floating numbers of a kind."""
    x = torch.randn(shape, dtype=torch.float64) * r.choice((0.1, 1, 1, 1, 3))
    info = torch.finfo(dtype)
    largest = min(info.max, 1e100)  # products of two numbers are in the range of the oracle
    kind = r.random()
    if kind < 0.05:
        x = torch.full_like(x, r.choice((0.0, 1.0, -3.0, largest, info.tiny, -0.0)))
    elif kind < 0.1:
        x = torch.randint(-2, 3, shape).double()
    elif kind < 0.2:
        x *= r.choice((20, 1e3, 1e10, 1e30, 1e100))
    elif kind < 0.3:
        x *= r.choice((1e-3, 1e-10, 1e-30, 1e-39, 1e-42, info.tiny, info.smallest_normal))
    x = x.clamp(-largest, largest).to(dtype)
    if kind > 0.8 and x.numel() > 0:
        spikes = (NAN, INF, -INF) if r.random() < 0.5 else (largest, -largest, info.tiny / 2, 0.0)
        for _ in range(r.choice((1, 1, 3))):
            x.view(-1)[r.randrange(x.numel())] = r.choice(spikes)
    return x


def placed(r: random.Random, x: Tensor, repeats: bool = True) -> Tensor:
    """The tensor in another memory layout. With `repeats` it may repeat one slice, with stride 0."""
    if x.numel() == 0 or x.dim() < 2 or r.random() < 0.4:
        return x
    if repeats and r.random() < 0.15:
        dim = r.randrange(x.dim())
        return x.narrow(dim, 0, 1).expand(x.shape)
    choices = layouts.MAPS if x.dim() == 4 else layouts.ANY
    return r.choice(list(choices.values()))(x)


def flags(r: random.Random, *shape: int) -> Tensor:
    return placed(r, torch.rand(shape) < r.choice((0.0, 0.1, 0.5, 0.8, 0.95, 1.0)))


def dtypes(r: random.Random, count: int) -> list[torch.dtype]:
    """A random dtype for each, which is mostly the same."""
    first = r.choice(FLOATING)
    return [first if r.random() < 0.9 else r.choice(FLOATING) for _ in range(count)]


def features(r: random.Random, flat: bool, count: int = 2) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Query, key and, if three are requested, value; and the grids of query and key."""
    batch, depth, values = r.choice((0, 1, 1, 2, 3)), channels(r), channels(r)
    grids = [(side(r)), (side(r))]
    if r.random() < 0.3:
        grids[1] = grids[0]
    shapes = [tuple(grid) if not flat else (grid[0] * grid[1],) for grid in grids]
    kinds = dtypes(r, count)
    wanted = ((depth, shapes[0]), (depth, shapes[1]), (values, shapes[0]))[:count]
    return [placed(r, numbers(r, d, batch, c, *s)) for d, (c, s) in zip(kinds, wanted, strict=True)], shapes


def scale(r: random.Random) -> float | None:
    return r.choice((None, None, None, 1.0, 0.0, -0.7, 1e-3, 25.0, 1e8, 1e-30))


def row_index(r: random.Random, query: Tensor) -> Tensor:
    positions = query.flatten(2).shape[2]
    shape = (r.randint(0, 9),) if r.random() < 0.5 else (query.shape[0], r.randint(0, 9))
    return placed(r, torch.randint(positions, shape))
