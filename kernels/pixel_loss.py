"""Losses of bilinearly enlarged logits, and their gradients on the small grid.

A block owns neighbouring cells of one row of the grid and holds the logits at their corners in registers. The pixels of
a cell lie between the same four grid points, so their enlarged logits are mixtures of these corners, and the block sums
up the gradients of the corners. The sums of the blocks around a grid point are added in a second step. There are no
atomics, and results are the same from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED, LOG2E, on_device_of
from corrmatch.kernels.launch import Variant, kernel, launch
from corrmatch.kernels.plan import Plan

# Classes times cells of a block. Eight and more tiles of values and gradients of this size fit in registers. The
# interpreter wants few blocks.
ELEMENTS = 8192 if INTERPRETED.value else 256
CORNERS = 4


def loss(
    logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor, loss: Tensor, pixels: Tensor,
    grad: Tensor | None,
) -> None:  # fmt: skip
    """Fills loss (), pixels (B, H, W) and, unless it is None, grad (B, C, h, w); see `corrmatch.ops.pixel_loss`."""
    batch, classes, grid_height, grid_width = logits.shape
    height, width = weight.shape[1:]
    resize = (height, width) != (grid_height, grid_width)
    channels, cells = tile(classes)
    blocks = triton.cdiv(grid_width, cells)
    parts = None
    if grad is not None:
        parts = grad.new_empty(CORNERS, *grad.shape) if resize else grad.unsqueeze(0)
    with on_device_of(logits):
        launch(
            loss_kernel,
            blocks * grid_height * batch,
            (logits, labels, target, weight, pixels, parts),
            (
                blocks, classes, grid_height, grid_width, height, width, logits.numel(),
                *logits.stride(), *((0, 0, 0) if labels is None else labels.stride()),
                *((0, 0, 0, 0) if target is None else target.stride()), *weight.stride(), LOG2E,
            ),
            (resize, target is not None, grad is not None, channels, cells),
        )  # fmt: skip
        if grad is not None and parts is not None and resize:
            grad.copy_(parts[0])
            grad[..., 1:] += parts[1, ..., :-1]
            grad[..., 1:, :] += parts[2, ..., :-1, :]
            grad[..., 1:, 1:] += parts[3, ..., :-1, :-1]
        torch.sum(pixels, (0, 1, 2), out=loss)


def tile(classes: int) -> tuple[int, int]:
    """Padded classes, and cells of a block."""
    channels = max(2, triton.next_power_of_2(classes))
    return channels, max(1, ELEMENTS // channels)


@triton.jit
def pixels_of(cell, inputs, outputs):
    """The first pixel of a cell with aligned corners, that of the next cell, and the offset of the first in the cell.

    The offset is in units of 1 / (outputs - 1) grid steps. It is a whole number, and 0 where a pixel is a grid point.
    """
    steps = tl.maximum(outputs - 1, 1)
    gaps = tl.maximum(inputs - 1, 1)
    wide = cell.to(tl.int64)
    first = tl.minimum((wide * steps + gaps - 1) // gaps, outputs)
    last = tl.minimum(((wide + 1) * steps + gaps - 1) // gaps, outputs)
    last = tl.where(cell + 1 < inputs, last, outputs)
    return first.to(tl.int32), last.to(tl.int32), (first * (inputs - 1) - wide * steps).to(tl.int32)


@triton.jit
def load_corners(source, at, right, down, inside, RESIZE: tl.constexpr):
    """The logits at the corners of a tile of cells: here, right, below, diagonal. Without RESIZE all are the first."""
    here = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    if not RESIZE:
        return here, here, here, here
    beside = tl.load(source + at + right, mask=inside, other=0.0).to(tl.float32)
    below = tl.load(source + at + down, mask=inside, other=0.0).to(tl.float32)
    return here, beside, below, tl.load(source + at + right + down, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def edges(corners, down):
    """Logits on the left and right edges of cells, at an image row that lies `down` of the way to the next grid row."""
    here, right, below, diagonal = corners
    return here + down * (below - here), right + down * (diagonal - right)


@triton.jit
def exponentials(value, known, counted, log2e):
    """Logits minus their maximum, their exponentials, and the sum of these. All are 0 where a pixel does not count."""
    value = tl.where(counted, value, 0.0)
    value = tl.where(known, value, -float("inf"))
    value = tl.where(known, value - tl.max(value, 0)[None, :], 0.0)
    e = tl.where(known, tl.exp2(value * log2e), 0.0)
    return value, e, tl.sum(e, 0)[None, :]


@triton.jit
def cross_entropy_terms(value, label, c, known, counted, log2e):
    """The loss of each pixel and its gradient with respect to the logits."""
    value, e, total = exponentials(value, known, counted, log2e)
    chosen = c == label
    loss = tl.log(total) - tl.sum(tl.where(chosen, value, 0.0), 0)[None, :]
    return loss, e / total - tl.where(chosen, 1.0, 0.0)


@triton.jit
def divergence_terms(value, target, known, counted, log2e):
    """The loss of each pixel and its gradient with respect to the logits."""
    value, e, total = exponentials(value, known, counted, log2e)
    target, q, target_total = exponentials(target, known, counted, log2e)
    difference = tl.sum(tl.where(q == 0, 0.0, q * (target - value)), 0)[None, :]
    loss = difference / target_total + tl.log(total) - tl.log(target_total)
    return loss, e / total - q / target_total


@triton.jit
def spread(gradient, way):
    """Distributes the gradient of a value that lies `way` between two others to these two."""
    return gradient - way * gradient, way * gradient


@kernel(
    unaligned={"logits": "data", "labels": "i64", "target": "data", "weight": "fp32"},
    aligned={"pixels": "fp32", "parts": "fp32"},
    floats=("log2e",),
)
def loss_kernel(
    logits,  # in: (B, classes, grid_height, grid_width)
    labels,  # in: (B, height, width), integers; read without DIVERGENCE only
    target,  # in: like the logits; read with DIVERGENCE only
    weight,  # in: (B, height, width)
    pixels,  # out: (B, height, width), the weighted loss
    parts,  # out: (4 or, without RESIZE, 1, B, classes, grid_height, grid_width), gradients of the corners of the cells
    blocks,  # number of blocks of a row of the grid
    classes,  # number of classes
    grid_height, grid_width,  # sizes of the logits
    height, width,  # sizes of the image
    corner_size: tl.int64,  # numbers of one of `parts`
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,  # strides of the logits
    labels_b: tl.int64, labels_y: tl.int64, labels_x: tl.int64,  # strides of the labels
    target_b: tl.int64, target_c: tl.int64, target_y: tl.int64, target_x: tl.int64,  # strides of the target
    weight_b: tl.int64, weight_y: tl.int64, weight_x: tl.int64,  # strides of the weight
    log2e,  # log2(e), which makes exp2 an exponential
    RESIZE: tl.constexpr,  # whether the logits are enlarged
    DIVERGENCE: tl.constexpr,  # whether the loss is the divergence from the target; else cross-entropy
    GRADIENT: tl.constexpr,  # whether `parts` are wanted
    CHANNELS: tl.constexpr,  # padded classes
    CELLS: tl.constexpr,  # cells of a block
):  # fmt: skip
    """A program owns CELLS cells of a grid row. It computes their pixels and the gradients of their corners."""
    block = tl.program_id(0)
    row = block // blocks % grid_height
    b = (block // blocks // grid_height).to(tl.int64)
    cell = block % blocks * CELLS + tl.arange(0, CELLS)
    c = tl.arange(0, CHANNELS)[:, None]
    known = c < classes
    inside = known & (cell < grid_width)[None, :]

    right = tl.where(cell + 1 < grid_width, 1, 0)[None, :]  # the last column is its own neighbour
    down = tl.where(row + 1 < grid_height, 1, 0)
    wide = c.to(tl.int64)
    at = b * stride_b + wide * stride_c + row.to(tl.int64) * stride_y + cell.to(tl.int64)[None, :] * stride_x
    values = load_corners(logits, at, right * stride_x, down * stride_y, inside, RESIZE)
    if DIVERGENCE:
        at = b * target_b + wide * target_c + row.to(tl.int64) * target_y + cell.to(tl.int64)[None, :] * target_x
        targets = load_corners(target, at, right * target_x, down * target_y, inside, RESIZE)
    grad_here = tl.zeros((CHANNELS, CELLS), tl.float32)
    grad_right, grad_below, grad_diagonal = grad_here, grad_here, grad_here

    if RESIZE:
        first_y, last_y, behind_y = pixels_of(row, grid_height, height)
        first_x, last_x, behind_x = pixels_of(cell, grid_width, width)
        steps_y, steps_x = tl.maximum(height - 1, 1), tl.maximum(width - 1, 1)
    else:
        first_y, last_y, first_x, last_x = row, row + 1, cell, cell + 1
    last_x = tl.where(cell < grid_width, last_x, first_x)
    places = tl.max(last_x - first_x, 0)
    for line in range(last_y - first_y):
        y = first_y + line
        if RESIZE:
            way_y = (behind_y + line * (grid_height - 1)).to(tl.float32) / steps_y
            left_edge, right_edge = edges(values, way_y)
            if DIVERGENCE:
                target_left, target_right = edges(targets, way_y)
            grad_left_edge = tl.zeros((CHANNELS, CELLS), tl.float32)
            grad_right_edge = tl.zeros((CHANNELS, CELLS), tl.float32)
        for place in range(places):
            x = first_x + place
            there = x < last_x
            pixel_x, pixel_y = x.to(tl.int64), y.to(tl.int64)
            w = tl.load(weight + b * weight_b + pixel_y * weight_y + pixel_x * weight_x, mask=there, other=0.0)
            w = w.to(tl.float32)[None, :]
            counted = w != 0
            if RESIZE:
                way_x = ((behind_x + place * (grid_width - 1)).to(tl.float32) / steps_x)[None, :]
                value = left_edge + way_x * (right_edge - left_edge)
            else:
                value = values[0]
            if DIVERGENCE:
                if RESIZE:
                    target_value = target_left + way_x * (target_right - target_left)
                else:
                    target_value = targets[0]
                loss, gradient = divergence_terms(value, target_value, known, counted, log2e)
            else:
                label_at = b * labels_b + pixel_y * labels_y + pixel_x * labels_x
                label = tl.load(labels + label_at, mask=there, other=0).to(tl.int64)[None, :]
                loss, gradient = cross_entropy_terms(value, label, c, known, counted, log2e)
            pixel_at = (b * height + pixel_y) * width + pixel_x
            tl.store(pixels + pixel_at[None, :], tl.where(counted, w * loss, 0.0), mask=there[None, :])
            if GRADIENT:
                gradient *= w
                if RESIZE:
                    to_left, to_right = spread(gradient, way_x)
                    grad_left_edge += to_left
                    grad_right_edge += to_right
                else:
                    grad_here += gradient
        if RESIZE and GRADIENT:
            to_here, to_below = spread(grad_left_edge, way_y)
            to_right, to_diagonal = spread(grad_right_edge, way_y)
            grad_here += to_here
            grad_right += to_right
            grad_below += to_below
            grad_diagonal += to_diagonal

    if GRADIENT:
        size = tl.cast(corner_size, tl.int64)  # the interpreter ignores annotations
        at = ((b * classes + wide) * grid_height + row) * grid_width + cell[None, :]
        tl.store(parts + at, grad_here, mask=inside)
        if RESIZE:
            tl.store(parts + size + at, grad_right, mask=inside)
            tl.store(parts + 2 * size + at, grad_below, mask=inside)
            tl.store(parts + 3 * size + at, grad_diagonal, mask=inside)


def variants(plan: Plan, classes: int) -> Iterator[Variant]:
    """The forms that `inspect` compiles."""
    channels, cells = tile(classes)
    constants = {"RESIZE": True, "GRADIENT": True, "CHANNELS": channels, "CELLS": cells}
    yield Variant("cross-entropy", loss_kernel, constants | {"DIVERGENCE": False})
    yield Variant("divergence", loss_kernel, constants | {"DIVERGENCE": True})
