"""The gate of pixel propagation: which query positions are open, and where each one goes.

The open rows of a picture are an int32 row of (B, padded N_q + 1): the flat position of each, -1 behind the last, and
in the last place their number. Nothing is read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import LOG2E, block_of
from corrmatch.kernels.launch import SIZES, UNALIGNED, launch
from corrmatch.kernels.packing import block_size

SCAN = 1024  # positions that a block counts at once


def confidence_gate(value: Tensor, threshold: Tensor) -> Tensor:
    """Where the largest softmax probability over the channels reaches the threshold: bool (B, N)."""
    batch, channels, height, width = value.shape
    gate = torch.empty(batch, height * width, dtype=torch.bool, device=value.device)
    padded_to = triton.next_power_of_2(channels)
    block = block_size(padded_to)
    launch(
        confidence_gate_kernel,
        triton.cdiv(height * width, block) * batch,
        (value, threshold, gate),
        (channels, height * width, width, *value.stride(), LOG2E),
        (padded_to, block),
    )
    return gate


def fill_open_rows(gate: Tensor, open_rows: Tensor) -> None:
    """From a bool tensor (B, N)."""
    positions, padded = gate.shape[1], open_rows.shape[1] - 1
    launch(open_rows_kernel, gate.shape[0], (gate, open_rows), (positions, padded, *gate.stride()), (SCAN,))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def open_rows_kernel(
    gate,  # in: (B, positions), bool
    open_rows,  # out: (B, kept + 1)
    positions, kept,  # of the picture, padded
    stride_b: tl.int64, stride_x: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One picture, in order."""
    b = tl.program_id(0).to(tl.int64)
    open_rows += b * (kept + 1)
    count = tl.full((), 0, tl.int32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        at = b * stride_b + position.to(tl.int64) * stride_x
        opened = tl.load(gate + at, mask=position < positions, other=0).to(tl.int32)
        tl.store(open_rows + count + tl.cumsum(opened, 0) - 1, position, mask=opened != 0)
        count += tl.sum(opened, 0)
    for start in range(0, kept, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(open_rows + row, tl.full((BLOCK,), -1, tl.int32), mask=(row >= count) & (row < kept))
    tl.store(open_rows + kept, count)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def confidence_gate_kernel(
    value,  # in
    threshold,  # in: one number, float64
    gate,  # out: (B, positions), bool
    channels, positions, width,
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,
    log2e,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, start = block_of(positions, BLOCK)
    position = start + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)[:, None]
    in_channel = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    at = b * stride_b + channel.to(tl.int64) * stride_c + in_channel[None, :]
    inside = (position < positions)[None, :] & (channel < channels)
    logits = tl.load(value + at, mask=inside, other=-float("inf")).to(tl.float32)
    largest = tl.max(logits, 0)
    # A NaN anywhere makes the sum one, and no comparison with that holds.
    confidence = 1.0 / tl.sum(tl.exp2((logits - largest[None, :]) * log2e), 0)
    least = tl.load(threshold).to(tl.float32)
    tl.store(gate + b * positions + position, confidence >= least, mask=position < positions)
