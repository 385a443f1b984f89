"""How far a result may be from the oracle, `corrmatch.reference` in float64, derived from the arithmetic.

The error of a score is so many units in the last place of what is added up for it, which gives a factor for P and for
its sums. Where numbers may leave the range of the dtype, or rounding alone decides, any result is right; where the
oracle is not finite, the result must not be either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch import reference


class RowsOfP:
    """RowsOfP of P in float64, and the error that a computation in the dtypes of `maps` may make.

    Attributes:
        p: (B, N_q, N_k).
        slack: (B, N_q): relative error of a row.
        lost: What of an entry may be lost to underflow.
        error: (B, N_q, N_k): of an entry; inf in rows whose scores may leave the range.
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float | None, *others: torch.dtype, rounding: float = 0.0):
        self.dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype, *others) else torch.float32
        info, depth = torch.finfo(self.dtype), query.shape[1]
        scale = depth**-0.5 if scale is None else scale
        q, k = (x.double().flatten(2) for x in (query, key))
        self.p = reference.correlation(q, k, scale)
        product = (q.abs().mT @ k.abs()).amax(2)
        size, large = abs(scale) * product, 2 * abs(scale) * q.abs().amax(1)
        lost = info.smallest_normal * (1 + abs(scale)) * depth * k.abs().amax((1, 2)).unsqueeze(1)  # to underflow
        self.slack = 2 * (depth + 8) * info.eps * (1 + size) + 2 * k.shape[2] * info.eps + 2 * rounding + 2 * lost
        tight = torch.maximum(torch.maximum(2 * size, large), product) < info.max / 4
        if rounding > 0:
            tight &= self.slack < 80  # beyond, an entry that should be 1 may leave the range
        self.lost = 4 * info.smallest_normal if rounding == 0 else 2.0**-32  # the least of float16, before the bias
        # In half types rows are not divided by their sum, and may add up to more than 1.
        limit = float("inf") if rounding > 0 else 1.0
        factor = torch.expm1(self.slack).clamp(max=info.max).unsqueeze(2)  # 0 times that is 0
        error = (self.p * factor).clamp(max=limit) + self.lost
        self.error = torch.where(tight.unsqueeze(2), error, float("inf"))


def different(name: str, found: Tensor, expected: Tensor) -> str | None:
    """Where two tensors are not equal."""
    found = found.cpu()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{name}: {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    wrong = (found != expected).nonzero()
    if len(wrong) == 0:
        return None
    at = tuple(wrong[0])
    return f"{name} at {wrong[0].tolist()}: {found[at]}, expected {expected[at]}; {len(wrong)} of {found.numel()}"


def unbounded(*maps: Tensor) -> Tensor:
    """Images with a number that is not finite: bool (B,)."""
    return torch.stack([~x.isfinite().flatten(1).all(1) for x in maps]).any(0)


def beyond(name: str, found: Tensor, expected: Tensor, bound: Tensor, wild: Tensor | None = None) -> str | None:
    """Where a number is farther from the expected one than the bound.

    Where the input is `wild` and the expected number not finite, the one found must not be either; where it only left
    the range of float64, anything goes.
    """
    found = found.cpu().double()
    close = ((found - expected).abs() <= bound) | (bound == float("inf"))
    fair = ~found.isfinite() | ~(torch.zeros((), dtype=torch.bool) if wild is None else wild)
    wrong = (~torch.where(expected.isfinite(), close, fair)).nonzero()
    if len(wrong) == 0:
        return None
    at = tuple(wrong[0])
    return (
        f"{name} at {wrong[0].tolist()}: {found[at]:.9g}, expected {expected[at]:.9g} within {bound[at]:.2g}; "
        f"{len(wrong)} of {found.numel()}"
    )
