"""Pseudo-labels: the largest class of every pixel, its softmax probability, and the largest of those of each class.

A block owns some pixels and holds all their classes, enlarged on the fly: enlarged logits are never stored.
A class's peak is an atomic maximum over the blocks, the same in whatever order they come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED, LOG2E, on_device_of
from corrmatch.kernels.packing import block_size

NAN = tl.constexpr(0x7FC00000)  # as an integer larger than every confidence


def label(logits: Tensor, ignore: Tensor | None, labels: Tensor, confidence: Tensor, class_peak: Tensor) -> None:
    """Fills what `corrmatch.ops.pseudo_label` returns: labels and confidence (B, H, W), class_peak (C,)."""
    batch, classes, grid_height, grid_width = logits.shape
    height, width = labels.shape[1:]
    padded = triton.next_power_of_2(classes)
    block = 512 if INTERPRETED.value else block_size(padded)
    with on_device_of(logits):
        class_peak.zero_()
        label_kernel[(triton.cdiv(height * width, block), batch)](
            logits, ignore, labels, confidence, class_peak.view(torch.int32),
            classes, grid_height, grid_width, height, width,
            *logits.stride(), *((0, 0, 0) if ignore is None else ignore.stride()), LOG2E,
            RESIZE=(height, width) != (grid_height, grid_width), IGNORE=ignore is not None,
            CLASSES=padded, BLOCK=block,
        )  # fmt: skip


@triton.jit
def cell(position, inputs, outputs):
    """The input samples on both sides of output `position` with aligned corners, and the weight of the second."""
    steps = tl.maximum(outputs - 1, 1)
    scaled = position.to(tl.int64) * (inputs - 1)  # whole numbers: where samples coincide the weight is 0
    low = scaled // steps
    return low, tl.minimum(low + 1, inputs - 1), (scaled % steps).to(tl.float32) / steps


@triton.jit
def column(logits, x, top, bottom, weight, wanted):
    """Logits between two rows of the grid."""
    above = tl.load(logits + (top + x)[None, :], mask=wanted, other=0.0).to(tl.float32)
    below = tl.load(logits + (bottom + x)[None, :], mask=wanted, other=0.0).to(tl.float32)
    return above + weight[None, :] * (below - above)


@triton.jit
def label_kernel(
    logits, ignore, labels, confidence, class_peak, classes, grid_height, grid_width, height, width,
    stride_b, stride_c, stride_y, stride_x, ignore_b, ignore_y, ignore_x, log2e,
    RESIZE: tl.constexpr, IGNORE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    y, x = pixel // width, pixel % width
    c = tl.arange(0, CLASSES)[:, None]
    wanted = (c < classes) & inside[None, :]
    logits += b * stride_b + c.to(tl.int64) * stride_c
    if RESIZE:
        top, bottom, down = cell(y, grid_height, height)
        left, right, across = cell(x, grid_width, width)
        near = column(logits, left * stride_x, top * stride_y, bottom * stride_y, down, wanted)
        far = column(logits, right * stride_x, top * stride_y, bottom * stride_y, down, wanted)
        values = near + across[None, :] * (far - near)
    else:
        at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        values = tl.load(logits + at[None, :], mask=wanted, other=0.0).to(tl.float32)
    values = tl.where(wanted, values, -float("inf"))

    # The first of the largest; a NaN is larger than all.
    bad = values != values
    largest = tl.max(tl.where(bad, float("inf"), values), 0)
    best = tl.where(tl.max(bad.to(tl.int32), 0)[None, :] > 0, bad, values == largest[None, :])
    label = tl.min(tl.where(best, c, CLASSES), 0)
    share = 1.0 / tl.sum(tl.exp2((values - largest[None, :]) * log2e), 0)

    at = b * height * width + pixel
    tl.store(labels + at, label.to(tl.int64), mask=inside)
    tl.store(confidence + at, share, mask=inside)
    counted = inside
    if IGNORE:
        at = b * ignore_b + y.to(tl.int64) * ignore_y + x.to(tl.int64) * ignore_x
        counted &= tl.load(ignore + at, mask=inside, other=1) == 0
    # Confidences are not negative, so their bits are ordered as they are.
    bits = tl.where(share == share, share.to(tl.int32, bitcast=True), NAN)
    chosen = (label[None, :] == c) & counted[None, :]
    peak = tl.max(tl.where(chosen, bits[None, :], 0), 1)
    tl.atomic_max(class_peak + tl.arange(0, CLASSES), peak, mask=peak > 0, sem="relaxed")
