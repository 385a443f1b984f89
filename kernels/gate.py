"""The gate of pixel propagation: the open query positions of each image.

`open_rows` is int32 (B, padded N_q + 1). A row lists the flat positions of the open rows of an image, then -1, and in
the last place their number. The host reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import LOG2E, block_of
from corrmatch.kernels.launch import Variant, kernel, launch
from corrmatch.kernels.packing import block_size
from corrmatch.kernels.plan import Plan

SCAN = 1024  # positions that a block counts in one turn


def confidence_gate(value: Tensor, threshold: Tensor) -> Tensor:
    """The gate, bool (B, N): whether the largest softmax probability over the channels reaches the threshold."""
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
    """Fills `open_rows` from a gate, bool (B, N)."""
    positions, padded = gate.shape[1], open_rows.shape[1] - 1
    launch(open_rows_kernel, gate.shape[0], (gate, open_rows), (positions, padded, *gate.stride()), (SCAN,))


@kernel(unaligned={"gate": "i1"}, aligned={"open_rows": "i32"})
def open_rows_kernel(
    gate,  # in: (B, positions), bool
    open_rows,  # out: (B, kept + 1), flat position of each open row, -1 behind the last, their number in the last place
    positions,  # number of positions of the image
    kept,  # padded positions
    stride_b: tl.int64, stride_x: tl.int64,  # strides of the gate
    BLOCK: tl.constexpr,  # positions that are counted in one turn
):  # fmt: skip
    """One program lists the open rows of one image, in order."""
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


@kernel(unaligned={"value": "data", "threshold": "fp64", "gate": "i1"}, floats=("log2e",))
def confidence_gate_kernel(
    value,  # in: (B, channels, positions), logits
    threshold,  # in: one number
    gate,  # out: (B, positions), bool
    channels, positions,  # sizes of the value
    width,  # width of the image
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,  # strides of the value
    log2e,  # log2(e), which makes exp2 an exponential
    CHANNELS: tl.constexpr,  # padded channels
    BLOCK: tl.constexpr,  # positions of a block
):  # fmt: skip
    """A program owns BLOCK positions. It compares their largest softmax probability with the threshold."""
    b, start = block_of(positions, BLOCK)
    position = start + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)[:, None]
    in_channel = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    at = b * stride_b + channel.to(tl.int64) * stride_c + in_channel[None, :]
    inside = (position < positions)[None, :] & (channel < channels)
    logits = tl.load(value + at, mask=inside, other=-float("inf")).to(tl.float32)
    largest = tl.max(logits, 0)
    # One NaN makes the sum NaN. Comparisons with NaN are false, so the position is closed.
    confidence = 1.0 / tl.sum(tl.exp2((logits - largest[None, :]) * log2e), 0)
    least = tl.load(threshold).to(tl.float32)
    tl.store(gate + b * positions + position, confidence >= least, mask=position < positions)


@triton.jit
def end_of_rows(open_rows, b, n_q, packed_q, GATED: tl.constexpr):
    """Number of packed rows of an image: its open rows, or all rows without a gate."""
    if GATED:
        return tl.load(open_rows + b * (packed_q + 1) + packed_q)
    else:
        return n_q


def variants(plan: Plan, channels: int) -> Iterator[Variant]:
    """The forms that `inspect` compiles."""
    constants = {"CHANNELS": plan.channels, "BLOCK": block_size(plan.channels)}
    yield Variant("gate", confidence_gate_kernel, constants)
    yield Variant("open rows", open_rows_kernel, {"BLOCK": SCAN})
