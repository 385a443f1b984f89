"""Losses of logits that are enlarged bilinearly, and their gradients on the small grid.

A block owns neighbouring cells of one row of the grid, and holds the logits at their corners in registers: the pixels
of a cell lie between the same four grid points, so enlarged logits are a mixture of what is there, and their gradients
are summed where they belong. What the blocks around a grid point have for it is added up afterwards: no atomics, the
same result from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED, LOG2E, on_device_of
from corrmatch.kernels.launch import SIZES, UNALIGNED, launch

# Classes times cells of a block, so that the tiles of values and gradients, eight and more, stay in registers. The
# interpreter takes its time by the block.
ELEMENTS = 8192 if INTERPRETED.value else 256
CORNERS = 4


def loss(
    logits: Tensor, labels: Tensor | None, target: Tensor | None, weight: Tensor, loss: Tensor, pixels: Tensor,
    grad: Tensor | None,
) -> None:  # fmt: skip
    """Fills loss (), pixels (B, H, W) and, where there is one, grad (B, C, h, w); see `corrmatch.ops.pixel_loss`."""
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
    """Of a cell, with aligned corners: its first pixel, the first of the next, and how far in its first one lies.

    The last in units of 1 / (outputs - 1) grid steps: in whole numbers, where samples coincide it is 0.
    """
    steps = tl.maximum(outputs - 1, 1)
    gaps = tl.maximum(inputs - 1, 1)
    wide = cell.to(tl.int64)
    first = tl.minimum((wide * steps + gaps - 1) // gaps, outputs)
    last = tl.minimum(((wide + 1) * steps + gaps - 1) // gaps, outputs)
    last = tl.where(cell + 1 < inputs, last, outputs)
    return first.to(tl.int32), last.to(tl.int32), (first * (inputs - 1) - wide * steps).to(tl.int32)


@triton.jit
def corners(source, at, right, down, inside, RESIZE: tl.constexpr):
    """The values at a tile of cells, right of them, below and below right."""
    here = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    if not RESIZE:
        return here, here, here, here
    beside = tl.load(source + at + right, mask=inside, other=0.0).to(tl.float32)
    below = tl.load(source + at + down, mask=inside, other=0.0).to(tl.float32)
    return here, beside, below, tl.load(source + at + right + down, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def exponentials(value, known, counted, log2e):
    """Logits less their largest, the exponentials of those, and their sum; of zeros where a pixel does not count."""
    value = tl.where(counted, value, 0.0)
    value = tl.where(known, value, -float("inf"))
    value = tl.where(known, value - tl.max(value, 0)[None, :], 0.0)
    e = tl.where(known, tl.exp2(value * log2e), 0.0)
    return value, e, tl.sum(e, 0)[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def loss_kernel(
    logits, labels, target, weight,  # in; with DIVERGENCE the target, without the labels
    pixels, parts,  # out: (B, height, width); (4 or, without RESIZE, 1, B, classes, grid_height, grid_width)
    blocks, classes, grid_height, grid_width, height, width,  # blocks of a row of the grid
    corner_size: tl.int64,  # numbers of one of `parts`
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,  # of the logits
    labels_b: tl.int64, labels_y: tl.int64, labels_x: tl.int64,
    target_b: tl.int64, target_c: tl.int64, target_y: tl.int64, target_x: tl.int64,
    weight_b: tl.int64, weight_y: tl.int64, weight_x: tl.int64,
    log2e,
    RESIZE: tl.constexpr, DIVERGENCE: tl.constexpr, GRADIENT: tl.constexpr,
    CHANNELS: tl.constexpr, CELLS: tl.constexpr,  # padded classes; cells of a block
):  # fmt: skip
    """Owner of CELLS cells of a row of the grid."""
    block = tl.program_id(0)
    row = block // blocks % grid_height
    b = (block // blocks // grid_height).to(tl.int64)
    cell = block % blocks * CELLS + tl.arange(0, CELLS)
    c = tl.arange(0, CHANNELS)[:, None]
    known = c < classes
    inside = known & (cell < grid_width)[None, :]

    right = tl.where(cell + 1 < grid_width, 1, 0)[None, :]  # of the last column the last again, with weight 0
    down = tl.where(row + 1 < grid_height, 1, 0)
    wide = c.to(tl.int64)
    at = b * stride_b + wide * stride_c + row.to(tl.int64) * stride_y + cell.to(tl.int64)[None, :] * stride_x
    v00, v01, v10, v11 = corners(logits, at, right * stride_x, down * stride_y, inside, RESIZE)
    if DIVERGENCE:
        at = b * target_b + wide * target_c + row.to(tl.int64) * target_y + cell.to(tl.int64)[None, :] * target_x
        t00, t01, t10, t11 = corners(target, at, right * target_x, down * target_y, inside, RESIZE)
    g00 = tl.zeros((CHANNELS, CELLS), tl.float32)
    g01, g10, g11 = g00, g00, g00

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
            fall = (behind_y + line * (grid_height - 1)).to(tl.float32) / steps_y
            left, beside = v00 + fall * (v10 - v00), v01 + fall * (v11 - v01)
            if DIVERGENCE:
                target_left, target_beside = t00 + fall * (t10 - t00), t01 + fall * (t11 - t01)
            g_left, g_beside = tl.zeros((CHANNELS, CELLS), tl.float32), tl.zeros((CHANNELS, CELLS), tl.float32)
        for place in range(places):
            x = first_x + place
            there = x < last_x
            line_x, line_y = x.to(tl.int64), y.to(tl.int64)
            w = tl.load(weight + b * weight_b + line_y * weight_y + line_x * weight_x, mask=there, other=0.0)
            w = w.to(tl.float32)[None, :]
            counted = w != 0
            if RESIZE:
                across = ((behind_x + place * (grid_width - 1)).to(tl.float32) / steps_x)[None, :]
                value = left + across * (beside - left)
            else:
                value = v00
            value, e, total = exponentials(value, known, counted, log2e)
            if DIVERGENCE:
                if RESIZE:
                    other = target_left + across * (target_beside - target_left)
                else:
                    other = t00
                other, q, target_total = exponentials(other, known, counted, log2e)
                terms = tl.sum(tl.where(q == 0, 0.0, q * (other - value)), 0)[None, :]
                lost = terms / target_total + tl.log(total) - tl.log(target_total)
                q = q / target_total
            else:
                label_at = b * labels_b + line_y * labels_y + line_x * labels_x
                label = tl.load(labels + label_at, mask=there, other=0).to(tl.int64)[None, :]
                q = tl.where(c == label, 1.0, 0.0)
                lost = tl.log(total) - tl.sum(tl.where(c == label, value, 0.0), 0)[None, :]
            lost = tl.where(counted, w * lost, 0.0)
            pixel_at = (b * height + line_y) * width + line_x
            tl.store(pixels + pixel_at[None, :], lost, mask=there[None, :])
            if GRADIENT:
                g = w * (e / total - q)
                if RESIZE:
                    g_left += g - across * g
                    g_beside += across * g
                else:
                    g00 += g
        if RESIZE and GRADIENT:
            g00 += g_left - fall * g_left
            g01 += g_beside - fall * g_beside
            g10 += fall * g_left
            g11 += fall * g_beside

    if GRADIENT:
        size = tl.cast(corner_size, tl.int64)  # the interpreter knows no annotations
        at = ((b * classes + wide) * grid_height + row) * grid_width + cell[None, :]
        tl.store(parts + at, g00, mask=inside)
        if RESIZE:
            tl.store(parts + size + at, g01, mask=inside)
            tl.store(parts + 2 * size + at, g10, mask=inside)
            tl.store(parts + 3 * size + at, g11, mask=inside)
