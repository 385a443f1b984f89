"""Packed maps: what the matrix kernels read.

A map of any strides becomes (B, channels, positions) with both padded by zeros: channels to a power of two of at least
16 (the least that tensor cores take), positions to a multiple of 128. So rows are aligned, though the picture sizes of
this method are odd, and the inner loops need no masks. Where a gate closes query positions, only the open ones are
packed, in order, and the kernels loop over their number: what is closed costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import LOG2E, block_of, narrow

ALIGNMENT = 128  # positions; a multiple of every block size
MOST_NUMBERS = 2**31  # of a packed picture: kernels count within one in 32 bits
SPARE = tl.constexpr(3)  # channels that hold one number in three pieces


@dataclass(frozen=True)
class Rows:
    """The open query positions of each picture.

    Attributes:
        index: int32 (B, padded positions): flat position of each row, -1 behind the last; None where all are open.
        count: int32 (B,): how many there are; None where all are open.
    """

    index: Tensor | None = None
    count: Tensor | None = None

    @classmethod
    def of(cls, gate: Tensor) -> Rows:
        """From a bool tensor (B, N). Reads nothing on the host."""
        batch, positions = gate.shape
        behind = padded(positions)
        slot = torch.where(gate, gate.cumsum(1) - 1, behind)
        index = torch.full((batch, behind + 1), -1, dtype=torch.int32, device=gate.device)
        position = torch.arange(positions, dtype=torch.int32, device=gate.device)
        index.scatter_(1, slot, position.expand(batch, -1))
        return cls(index[:, :-1].contiguous(), gate.sum(1, dtype=torch.int32))


def padded(positions: int) -> int:
    """Positions of a packed map."""
    return triton.cdiv(positions, ALIGNMENT) * ALIGNMENT


def padded_channels(channels: int) -> int:
    """Channels of a packed map."""
    return max(16, triton.next_power_of_2(channels))


def block_size(channels: int) -> int:
    """Positions of a block that holds all channels of each; a divisor of ALIGNMENT."""
    return min(ALIGNMENT, max(16, 4096 // channels))


def pack(
    source: Tensor,
    channels: int,
    dtype: torch.dtype,
    *,
    rows: Rows | None = None,
    ones: int = 0,
    factor: float = 1.0,
    divisor: Tensor | None = None,
) -> Tensor:
    """(B, C, H, W), times `factor`, as (B, channels, padded positions).

    `ones` channels behind the last are 1 at every position. All are divided by `divisor` (B, N), of stride 1 in N.
    """
    batch, width, positions = source.shape[0], source.shape[3], source.shape[2] * source.shape[3]
    if channels * padded(positions) > MOST_NUMBERS:
        raise ValueError(
            f"pixel_propagate: 'triton' takes pictures of at most 2^31 numbers, channels padded to a power of two and "
            f"positions to a multiple of {ALIGNMENT}; got {channels} x {padded(positions)}"
        )
    packed = torch.empty(batch, channels, padded(positions), dtype=dtype, device=source.device)
    index = None if rows is None else rows.index
    block = block_size(channels)
    pack_kernel[(packed.shape[2] // block * batch,)](
        source, packed, index, divisor, source.shape[1], positions, packed.shape[2], width, *source.stride(), ones,
        factor, 0 if divisor is None else divisor.stride(0),
        GATHER=index is not None, DIVIDE=divisor is not None, CHANNELS=channels, BLOCK=block,
    )  # fmt: skip
    return packed


@triton.jit
def pack_kernel(
    source, packed, index, divisor, channels, positions, packed_positions, width,
    stride_b, stride_c, stride_y, stride_x, ones, factor, stride_divisor,
    GATHER: tl.constexpr, DIVIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, start = block_of(packed_positions, BLOCK)
    packed += b * CHANNELS * packed_positions
    column = start + tl.arange(0, BLOCK)
    if GATHER:
        position = tl.load(index + b * packed_positions + column)
    else:
        position = column
    inside = ((position >= 0) & (position < positions))[None, :]
    channel = tl.arange(0, CHANNELS)[:, None]
    in_channel = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    at = b * stride_b + channel.to(tl.int64) * stride_c + in_channel[None, :]
    values = tl.load(source + at, mask=inside & (channel < channels), other=0.0)
    one = inside & (channel >= channels) & (channel < channels + ones)
    values = tl.where(one, 1.0, values.to(tl.float32) * factor)
    if DIVIDE:
        values /= tl.load(divisor + b * stride_divisor + position[None, :], mask=inside, other=1.0)
    tl.store(packed + channel * packed_positions + column[None, :], narrow(values, packed.dtype.element_ty))


def fold(query: Tensor, depth: int, shift: Tensor, factor: float) -> None:
    """Writes -shift / factor into three channels of the packed query, behind its `depth`.

    The packed key has ones there, so factor * <query, key> is the exponent of P, to within the rounding of float32:
    each channel holds the next eight bits, which every dtype keeps.
    """
    batch, channels, positions = query.shape
    fold_kernel[(positions // ALIGNMENT * batch,)](
        query, shift, positions, depth, -1 / factor, CHANNELS=channels, BLOCK=ALIGNMENT
    )


@triton.jit
def fold_kernel(query, shift, positions, depth, inverse_factor, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    b, start = block_of(positions, BLOCK)
    i = start + tl.arange(0, BLOCK)
    rest = tl.load(shift + b * positions + i) * inverse_factor
    for piece in tl.static_range(SPARE):
        part = narrow(rest, tl.bfloat16).to(tl.float32)
        tl.store(query + (b * CHANNELS + depth + piece) * positions + i, narrow(part, query.dtype.element_ty))
        rest -= part


def confidence_gate(value: Tensor, threshold: Tensor) -> Tensor:
    """Where the largest softmax probability over the channels reaches the threshold: bool (B, N)."""
    batch, channels, height, width = value.shape
    gate = torch.empty(batch, height * width, dtype=torch.bool, device=value.device)
    padded_to = triton.next_power_of_2(channels)
    block = block_size(padded_to)
    confidence_gate_kernel[(triton.cdiv(height * width, block) * batch,)](
        value, threshold, gate, channels, height * width, width, *value.stride(), LOG2E, CHANNELS=padded_to, BLOCK=block
    )
    return gate


@triton.jit
def confidence_gate_kernel(
    value, threshold, gate, channels, positions, width, stride_b, stride_c, stride_y, stride_x, log2e,
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
