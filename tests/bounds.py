"""Bounds of the distance between a result and the oracle, `corrmatch.reference` in float64, from the arithmetic.

The error of a score is a number of units in the last place of its terms, and gives a factor for P and its sums. Any
result is right if numbers may leave the range of the dtype, or if rounding alone decides. If the oracle is not finite,
the result must not be finite, either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch import reference


class RowsOfP:
    """P in float64, and the largest error of a computation in the dtypes of `maps`.

    Attributes:
        p: (B, N_q, N_k).
        slack: (B, N_q), the relative error of a row.
        lost: The part of an entry that underflow may remove.
        error: (B, N_q, N_k), the error of an entry; inf in rows whose scores may leave the range.
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
            tight &= self.slack < 80  # above it an entry that should be 1 may leave the range
        self.lost = 4 * info.smallest_normal if rounding == 0 else 2.0**-32  # the least of float16, before the bias
        # In half types rows are not divided by their sum, and may add up to more than 1.
        limit = float("inf") if rounding > 0 else 1.0
        factor = torch.expm1(self.slack).clamp(max=info.max).unsqueeze(2)  # 0 times that is 0
        error = (self.p * factor).clamp(max=limit) + self.lost
        self.error = torch.where(tight.unsqueeze(2), error, float("inf"))


def different(name: str, found: Tensor, expected: Tensor) -> str | None:
    """A description of the elements in which two tensors differ."""
    found = found.cpu()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{name}: {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    wrong = (found != expected).nonzero()
    if len(wrong) == 0:
        return None
    at = tuple(wrong[0])
    return f"{name} at {wrong[0].tolist()}: {found[at]}, expected {expected[at]}; {len(wrong)} of {found.numel()}"


def unbounded(*maps: Tensor) -> Tensor:
    """Whether each image has a number that is not finite, bool (B,)."""
    return torch.stack([~x.isfinite().flatten(1).all(1) for x in maps]).any(0)


def beyond(name: str, found: Tensor, expected: Tensor, bound: Tensor, wild: Tensor | None = None) -> str | None:
    """A description of the numbers whose distance from the expected ones exceeds the bound.

    If the input is `wild` and the expected number is not finite, the number must not be finite, either. If the expected
    number only left the range of float64, any number is right.
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
