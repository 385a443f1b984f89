"""Pseudo-labels: the most probable class of each pixel, its softmax probability, and the peak of each class.

A thread owns a pixel and enlarges the logits of its classes one after another: only the results are stored. The peak of
a class is an atomic maximum over the blocks, which does not depend on their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED, LOG2E, block_of, on_device_of
from corrmatch.kernels.launch import Variant, kernel, launch
from corrmatch.kernels.plan import Plan

NAN = tl.constexpr(0x7FC00000)  # as an integer it is larger than every confidence
UNROLL = tl.constexpr(4)  # classes that are loaded at the same time
CHUNK = tl.constexpr(32)  # classes whose peaks a block computes at the same time
BLOCK = 1024 if INTERPRETED.value else 128  # pixels; the interpreter wants few blocks


def label(logits: Tensor, ignore: Tensor | None, labels: Tensor, confidence: Tensor, class_peak: Tensor) -> None:
    """Fills the results of `corrmatch.ops.pseudo_label`: labels and confidence (B, H, W), class_peak (C,)."""
    batch, classes, grid_height, grid_width = logits.shape
    height, width = labels.shape[1:]
    with on_device_of(logits):
        class_peak.zero_()
        resize = (height, width) != (grid_height, grid_width)
        wide = max(height * grid_height, width * grid_width) >= 2**31
        launch(
            label_kernel,
            triton.cdiv(height * width, BLOCK) * batch,
            (logits, ignore, labels, confidence, class_peak.view(torch.int32)),
            (
                classes, grid_height, grid_width, height, width, *logits.stride(),
                *((0, 0, 0) if ignore is None else ignore.stride()), LOG2E,
            ),
            (resize, wide, ignore is not None, BLOCK),
        )  # fmt: skip


@triton.jit
def cell(position, inputs, outputs, WIDE: tl.constexpr):
    """The input samples on both sides of output `position` with aligned corners, and the weight of the second."""
    steps = tl.maximum(outputs - 1, 1)
    if WIDE:  # a division of 64 bits calls a subroutine
        position = position.to(tl.int64)
    scaled = position * (inputs - 1)  # a whole number: the weight is 0 where an output is a sample
    low = scaled // steps
    high = tl.minimum(low + 1, inputs - 1)
    return low.to(tl.int64), high.to(tl.int64), (scaled % steps).to(tl.float32) / steps


@kernel(
    unaligned={"logits": "data", "ignore": "i1"},
    aligned={"labels": "i64", "confidence": "fp32", "class_peak": "i32"},
    floats=("log2e",),
)
def label_kernel(
    logits,  # in: (B, classes, grid_height, grid_width)
    ignore,  # in: (B, height, width), bool; read with IGNORE only
    labels,  # out: (B, height, width)
    confidence,  # out: (B, height, width)
    class_peak,  # in and out: (classes,), the bits of float32 numbers; zeros at first
    classes,  # number of classes
    grid_height, grid_width,  # of the logits
    height, width,  # of the results
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,  # strides of the logits
    ignore_b: tl.int64, ignore_y: tl.int64, ignore_x: tl.int64,  # strides of `ignore`
    log2e,  # log2(e), which makes exp2 an exponential
    RESIZE: tl.constexpr,  # whether the logits are enlarged
    WIDE: tl.constexpr,  # whether products of image and grid sizes need more than 31 bits
    IGNORE: tl.constexpr,  # whether there is `ignore`
    BLOCK: tl.constexpr,  # pixels of a block
):  # fmt: skip
    """A program owns BLOCK pixels."""
    b, start = block_of(height * width, BLOCK)
    pixel = start + tl.arange(0, BLOCK)
    inside = pixel < height * width
    y, x = pixel // width, pixel % width
    logits += b * stride_b
    if RESIZE:
        top, bottom, down = cell(y, grid_height, height, WIDE)
        left, right, across = cell(x, grid_width, width, WIDE)
        top, bottom, left, right = top * stride_y, bottom * stride_y, left * stride_x, right * stride_x
    else:
        at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x

    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    label = tl.zeros((BLOCK,), tl.int32)
    for c in tl.range(0, classes, loop_unroll_factor=UNROLL):
        if RESIZE:
            near = tl.load(logits + top + left, mask=inside, other=0.0).to(tl.float32)
            near += down * (tl.load(logits + bottom + left, mask=inside, other=0.0).to(tl.float32) - near)
            far = tl.load(logits + top + right, mask=inside, other=0.0).to(tl.float32)
            far += down * (tl.load(logits + bottom + right, mask=inside, other=0.0).to(tl.float32) - far)
            value = near + across * (far - near)
        else:
            value = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        logits += stride_c
        # A NaN counts as larger than all but an earlier NaN. The difference of two equal infinities would be NaN.
        better = ((value > largest) | (value != value)) & (largest == largest)
        smaller = tl.exp2(-tl.abs(tl.where(value == largest, 0.0, value - largest)) * log2e)
        total = tl.where(better, total * smaller + 1, total + smaller)
        largest = tl.where(better, value, largest)
        label = tl.where(better, c, label)
    share = tl.where(largest - largest == 0, 1 / total, float("nan"))

    at = b * height * width + pixel
    tl.store(labels + at, label.to(tl.int64), mask=inside)
    tl.store(confidence + at, share, mask=inside)
    counted = inside
    if IGNORE:
        at = b * ignore_b + y.to(tl.int64) * ignore_y + x.to(tl.int64) * ignore_x
        counted &= tl.load(ignore + at, mask=inside, other=1) == 0
    # Confidences are not negative, so their bits have the same order.
    bits = tl.where(share == share, share.to(tl.int32, bitcast=True), NAN)
    bits = tl.where(counted, bits, 0)
    for first in range(0, classes, CHUNK):
        member = first + tl.arange(0, CHUNK)
        peak = tl.max(tl.where(label[None, :] == member[:, None], bits[None, :], 0), 1)
        tl.atomic_max(class_peak + member, peak, mask=peak > 0, sem="relaxed")


def variants(plan: Plan, classes: int) -> Iterator[Variant]:
    """The forms that `inspect` compiles."""
    yield Variant("label", label_kernel, {"RESIZE": True, "WIDE": False, "IGNORE": True, "BLOCK": BLOCK})
