"""Region masks: corrmatch and the published steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness.case import TOLERANCE, Benchmark, Case, Setting, share_different, smooth_features
from harness.measure import Contender
from torch import Tensor

from corrmatch import RegionMasks, ops, reference


def published(query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """The published steps: rows of the map, enlarged as floats, min-max normalised, cut at one half. Bool."""
    q, k = query.flatten(2), key.flatten(2)
    rows = (q[:, :, index].mT @ k / math.sqrt(q.shape[1])).softmax(-1).view(q.shape[0], -1, *key.shape[2:])
    large = F.interpolate(rows, size=size, mode="bilinear", align_corners=True).flatten(2)
    low, high = large.min(2, keepdim=True)[0], large.max(2, keepdim=True)[0]
    return ((large - low) / (high - low) > 0.5).view(q.shape[0], -1, *size)


def chunked(query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int], masks: int = 8) -> Tensor:
    """The same for a few masks at a time, so that the enlarged maps stay in the cache."""
    out = torch.empty(query.shape[0], index.shape[0], *size, dtype=torch.bool, device=query.device)
    for b in range(query.shape[0]):
        for i in range(0, index.shape[0], masks):
            out[b, i : i + masks] = published(query[b : b + 1], key[b : b + 1], index[i : i + masks], size)[0]
    return out


def cases(s: Setting) -> Iterator[Case]:
    """Masks from the rows of smooth features."""
    query, key, index = smooth_features(s)
    size, (height, width) = s.full, s.grid
    contenders = [
        Contender("corrmatch", lambda: ops.region_masks(query, key, index, size), ours=True),
        Contender("eager, 8 masks at once", lambda: chunked(query, key, index, size)),
        Contender("published eager", lambda: published(query, key, index, size)),
    ]

    def expected() -> tuple[RegionMasks]:
        return (reference.region_masks(query.double(), key.double(), index, size),)

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        masks = got[0].to_bool() if isinstance(got[0], RegionMasks) else got[0]
        return share_different(masks, want[0].to_bool())

    pixels = s.batch * index.shape[0] * size[0] * size[1]
    yield Case(
        "region_masks", f"{height}x{width} to {size[0]}x{size[1]}, B = {s.batch}", pixels, "mask pixels",
        f"K = {index.shape[0]} masks an image, D = {s.channels}", contenders, expected, error, TOLERANCE[s.dtype],
        height * width,
        s.batch, oracle_bytes=4 * 8 * pixels,
    )  # fmt: skip


BENCHMARK = Benchmark(
    "region_masks",
    "rows of the map, enlarged, normalised, cut at one half",
    cases,
    share=2.0,
)
