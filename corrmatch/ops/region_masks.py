"""Region masks: rows of a correlation map, enlarged and cut at a threshold."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from corrmatch import _C, reference
from corrmatch.masks import RegionMasks
from corrmatch.ops import checks, cuda
from corrmatch.ops.backend import HALF_AND_SINGLE, call, choose, implementation, run_on_cpu
from corrmatch.ops.borrowing import borrow
from corrmatch.ops.registration import register

CONNECTED = (None, "peak", "seed")


def region_masks(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    size: tuple[int, int],
    *,
    scale: float | None = None,
    threshold: float = 0.5,
    connected: str | None = None,
    connectivity: int = 8,
    backend: str | None = None,
) -> RegionMasks:
    r"""Cuts class-agnostic regions out of rows of the correlation map.

    For each sampled query position r the row x[j] = P[r, j] on the (Hk, Wk) grid is enlarged to `size`, bilinearly
    (align_corners=True). Then

    .. math:: \mathrm{mask} = \frac{x - \min x}{\max x - \min x} > \mathrm{threshold}

    with the extrema of the enlarged map. A constant map gives an empty mask.

    Args:
        query: (B, D, Hq, Wq); float16, bfloat16, float32, or float64 on a CPU; any strides.
        key: (B, D, Hk, Wk).
        index: int64 (K,), shared by the batch, or (B, K): flat query positions.
        size: (H, W) in pixels.
        scale: Factor of the scores; 1 / sqrt(D) if None.
        threshold: Number. A pixel of the mask exceeds it.
        connected: None keeps the mask. "peak" keeps its connected region with the maximum of the enlarged map (the
            first in raster order). "seed" keeps the one with the sampled position, enlarged and rounded to the nearest
            pixel; it is empty if this pixel is not in the mask.
        connectivity: 4 or 8, for `connected`.
        backend: "cpu", "cuda", "reference", or None for the best available.

    Returns:
        RegionMasks with `packed` int32 (B, K, ceil(H * W / 32)), without gradient. A pixel that equals the threshold up
        to rounding errors may be inside or outside. Neither K x N_k nor K x H x W floats are stored.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device or backend; an index out of range (on a CPU, elsewhere
            with CORRMATCH_CHECK=1). The message names the argument.

    Source: CorrMatch (CVPR 2024, arXiv 2306.04300), "region propagation".
    """
    checks.query_key(query, key, flat=False)
    checks.row_index(index, query)
    height, width = checks.image_size(size)
    scale = checks.scale(scale, query)
    threshold = checks.real("threshold", threshold)
    checks.choice("connected", connected, CONNECTED)
    checks.choice("connectivity", connectivity, (4, 8))
    backend = choose("region_masks", backend, query, key)
    index = index.expand(query.shape[0], -1)
    packed = torch.ops.corrmatch.region_masks(
        query, key, index, height, width, scale, threshold, CONNECTED.index(connected), connectivity, backend
    )
    return RegionMasks(packed, (height, width))


def region_masks_op(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    height: int,
    width: int,
    scale: float,
    threshold: float,
    connected: int,
    connectivity: int,
    backend: str,
) -> Tensor:
    """Packed masks, int32 (B, K, words), for an index (B, K). `connected` is an index into CONNECTED."""
    if index.numel() == 0:
        return _empty_masks(query, index, height, width)
    size = (height, width)
    return call("region_masks", backend, query, key, index, size, scale, threshold, connected, connectivity)


@implementation("region_masks", "reference")
def _reference(
    query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int], scale: float, threshold: float, connected: int,
    connectivity: int,
) -> Tensor:  # fmt: skip
    checks.positions(index, query.shape[2] * query.shape[3])
    return reference.region_masks(
        query, key, index, size, scale=scale, threshold=threshold, connected=CONNECTED[connected],
        connectivity=connectivity,
    ).packed  # fmt: skip


@implementation("region_masks", "cpu")
def _cpu(
    query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int], scale: float, threshold: float, connected: int,
    connectivity: int,
) -> Tensor:  # fmt: skip
    packed = _empty_masks(query, index, *size)
    run_on_cpu(
        _C.cpu.region_masks, borrow(query), borrow(key), borrow(index), *size, scale, threshold, connected,
        connectivity, borrow(packed),
    )  # fmt: skip
    return packed


@implementation("region_masks", "cuda", dtypes=HALF_AND_SINGLE, capability=80)
def _cuda(
    query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int], scale: float, threshold: float, connected: int,
    connectivity: int,
) -> Tensor:  # fmt: skip
    checks.positions(index, query.shape[2] * query.shape[3])
    packed = _empty_masks(query, index, *size)
    inputs = (borrow(query), borrow(key), borrow(index), *size)
    scratch = functools.partial(cuda.EXTENSION.region_masks_scratch, *inputs, connected)
    arguments = (*inputs, scale, threshold, connected, connectivity, borrow(packed))
    cuda.launch(cuda.EXTENSION.region_masks, query, scratch, *arguments)
    return packed


def _empty_masks(query: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    return query.new_empty(*index.shape, RegionMasks.words((height, width)), dtype=torch.int32)


def _fake(query, key, index, height, width, scale, threshold, connected, connectivity, backend):
    return _empty_masks(query, index, height, width)


register("region_masks", region_masks_op, fake=_fake)
