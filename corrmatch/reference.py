"""The definitions of the ops in plain PyTorch. They store the large arrays that the fused kernels avoid.

Names, arguments and results are those of `corrmatch.ops`, whose docstrings describe them. Autograd differentiates these
functions. Inputs of half types are computed in float32, as in the kernels. S is scale * <query_i, key_j>, and P is its
softmax over j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from corrmatch.dtypes import accumulation, accumulation_dtype, confidence_gate, without_autocast
from corrmatch.masks import RegionMasks


def pixel_propagate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    confidence: Tensor | None = None,
    threshold: float | Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Pixel propagation: Z[:, j] = sum_i g[i] value[:, i] P[i, j]."""
    q, k, v = accumulation(query, key, value)
    p, v = correlation(q, k, scale), v.flatten(2)
    if threshold is not None:
        gate = confidence_gate(value, confidence, threshold)
        p, v = torch.where(gate.unsqueeze(2), p, 0), torch.where(gate.unsqueeze(1), v, 0)
    z = v @ p
    if normalize:
        mass = p.sum(1, keepdim=True)
        z = torch.where(mass == 0, 0, z / torch.where(mass == 0, 1, mass))
    return z.unflatten(2, key.shape[2:]).to(value.dtype)


def correlation_rows(query: Tensor, key: Tensor, index: Tensor, *, scale: float | None = None) -> Tensor:
    """The rows `index` of P, on the grid of the key."""
    rows = index.expand(query.shape[0], -1).unsqueeze(1).expand(-1, query.shape[1], -1)
    sampled = query.flatten(2).gather(2, rows)
    return correlation(sampled, key, scale).unflatten(2, key.shape[2:]).to(query.dtype)


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
) -> RegionMasks:
    """Region masks: rows of P, enlarged, normalised by minimum and maximum, and cut at the threshold."""
    query, key = accumulation(query, key)
    rows = correlation_rows(query, key, index, scale=scale)
    large = F.interpolate(rows, size=size, mode="bilinear", align_corners=True)
    low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
    masks = (large - low) / (high - low) > threshold
    masks &= rows.amin((2, 3), keepdim=True) < rows.amax((2, 3), keepdim=True)  # a constant map has no region
    if connected is not None:
        if connected == "peak":
            marks = large.flatten(2).argmax(2)
        else:
            marks = enlarged_position(index, query.shape[2:], size).expand(rows.shape[:2])
        parts = connected_components(masks, connectivity=connectivity)
        at_mark = parts.flatten(2).gather(2, marks.unsqueeze(2)).unsqueeze(3)
        masks = (parts == at_mark) & (at_mark > 0)
    return RegionMasks.from_bool(masks)


def region_propagate(
    labels: Tensor,
    reliable: Tensor,
    masks: RegionMasks,
    threshold: float | Tensor,
    *,
    num_classes: int,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives each region its dominant label if the label is dominant enough and the region reliable enough."""
    regions = masks.to_bool() if valid is None else masks.to_bool() & valid.unsqueeze(1)
    labels, reliable_after = (
        labels.clone(memory_format=torch.contiguous_format),
        reliable.clone(memory_format=torch.contiguous_format),
    )
    theta = torch.as_tensor(threshold, dtype=torch.float32, device=labels.device)
    for b in range(regions.shape[0]):
        for region in regions[b]:
            counted = region & reliable[b]
            area, count = region.sum().float(), counted.sum().float()
            if count == 0 or count / area < theta:
                continue
            histogram = torch.bincount(labels[b][counted].long(), minlength=num_classes)
            dominant = histogram.argmax()
            if histogram[dominant].float() / count > theta:
                labels[b][region] = dominant.to(labels.dtype)
                reliable_after[b] |= region
    return labels, reliable_after


def connected_components(image: Tensor, *, connectivity: int = 8, background: int = 0) -> Tensor:
    """Components of equal value, numbered from 1 in raster order of their first pixels; 0 is background."""
    height, width = image.shape[-2:]
    values = image.reshape(image.shape[:-2].numel(), height, width).long()
    front = values != background
    # Each pixel takes the smallest raster index of its equal neighbours until no index changes. Background and pixels
    # beyond the border have an index larger than all others.
    outside = height * width
    first = torch.arange(outside, device=image.device).view(1, height, width).expand_as(values)
    first = torch.where(front, first, outside)
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if connectivity == 8 else [])
    padded_values = F.pad(values, (1, 1, 1, 1))
    while True:
        padded, smallest = F.pad(first, (1, 1, 1, 1), value=outside), first
        for dy, dx in steps:
            window = (slice(None), slice(1 + dy, 1 + dy + height), slice(1 + dx, 1 + dx + width))
            smallest = torch.where(padded_values[window] == values, smallest.minimum(padded[window]), smallest)
        if smallest.equal(first):
            break
        first = smallest
    is_first = first.flatten(1) == torch.arange(outside, device=image.device)
    number = F.pad(is_first.cumsum(1), (0, 1)).gather(1, first.flatten(1))
    return torch.where(front.flatten(1), number, 0).to(torch.int32).view(image.shape)


def pseudo_label(
    logits: Tensor, *, size: tuple[int, int] | None = None, ignore: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The most likely class, its probability, and for each class the largest of these probabilities."""
    (logits,) = accumulation(logits)
    if size is not None and tuple(size) != tuple(logits.shape[2:]):
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    labels, confidence = logits.argmax(1), logits.softmax(1).amax(1).float()
    counted = confidence if ignore is None else torch.where(ignore, 0, confidence)
    class_peak = counted.new_zeros(logits.shape[1])
    class_peak = class_peak.scatter_reduce(0, labels.flatten(), counted.flatten(), "amax")
    return labels, confidence, class_peak


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum over pixels of weight * -log softmax(logits)[label], and its terms."""
    weight = logits.new_ones(labels.shape) if weight is None else weight
    log_p = counted_log_softmax(logits, weight)
    labels = torch.where(weight == 0, 0, labels).long()
    return weighted_sum(-log_p.gather(1, labels.unsqueeze(1)).squeeze(1), weight)


def divergence(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum over pixels of weight * KL(softmax target || softmax logits), and its terms; 0 log 0 is 0."""
    weight = logits.new_ones(logits[:, 0].shape) if weight is None else weight
    target = target.to(accumulation_dtype(logits))
    log_p, log_q = counted_log_softmax(logits, weight), counted_log_softmax(target, weight)
    q = log_q.exp()
    return weighted_sum(torch.where(q == 0, 0, q * (log_q - log_p)).sum(1), weight)


def counted_log_softmax(logits: Tensor, weight: Tensor) -> Tensor:
    """Enlarges a map to the pixels of the weight. Where the weight is 0 the result is any finite number."""
    (logits,) = accumulation(logits)
    if weight.shape[1:] != logits.shape[2:]:
        logits = F.interpolate(logits, size=weight.shape[1:], mode="bilinear", align_corners=True)
    return torch.where(weight.unsqueeze(1) == 0, 0, logits).log_softmax(1)


def weighted_sum(loss: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weight * loss, and its terms, detached."""
    pixels = torch.where(weight == 0, 0, weight.to(loss.dtype) * loss)
    return pixels.sum(), pixels.detach()


def correlation(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """The correlation map P (B, N_q, N_k)."""
    q, k = (x.flatten(2) for x in accumulation(query, key))
    with without_autocast(query.device):
        return ((1 / math.sqrt(query.shape[1]) if scale is None else scale) * (q.mT @ k)).softmax(-1)


def enlarged_position(index: Tensor, grid: Sequence[int], size: tuple[int, int]) -> Tensor:
    """The flat pixel nearest to a flat grid position that is enlarged with aligned corners; halves round up."""
    y, x = index // grid[1], index % grid[1]
    row = (2 * y * (size[0] - 1) + grid[0] - 1) // (2 * max(grid[0] - 1, 1))
    column = (2 * x * (size[1] - 1) + grid[1] - 1) // (2 * max(grid[1] - 1, 1))
    return row * size[1] + column
