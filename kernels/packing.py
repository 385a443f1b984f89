"""Packed maps: what the matrix kernels read.

A map of any strides becomes (pieces, channels, positions) with channels and positions padded by zeros: channels to a
power of two of at least 16, positions to a multiple of 128. So rows are aligned, though the picture sizes of this
method are odd, and the inner loops need no masks. Query, key and value of a picture lie behind one another in one
buffer, and are packed by one kernel. Where a gate closes query positions, only the open ones are packed, in order, and
the kernels loop over their number: what is closed costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED, block_of, rounded, store
from corrmatch.kernels.launch import SIZES, UNALIGNED, launch
from corrmatch.kernels.plan import ALIGNMENT, Plan, padded

FOLDS = tl.constexpr(3)  # channels of ones in the key, for the shift in three pieces
ELEMENTS = 65536 if INTERPRETED.value else 4096  # of a block; the interpreter takes its time by the block


def block_size(channels: int) -> int:
    """Positions of a block that holds all channels of each; a divisor of ALIGNMENT."""
    return min(ALIGNMENT, max(16, ELEMENTS // channels))


def pack(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, mass: bool, open_rows: Tensor | None, packed: Tensor
) -> None:
    """Fills `packed`, as `Layout` says: query times its factor, key, value and, with the mass, a channel of ones."""
    n_q, n_k = query.shape[2] * query.shape[3], key.shape[2] * key.shape[3]
    packed_q, packed_k = padded(n_q), padded(n_k)
    block_d, block_c = block_size(plan.depth), block_size(plan.channels)
    programs = query.shape[0] * ((packed_q + packed_k) // block_d + packed_q // block_c)
    launch(
        pack_kernel,
        programs,
        (query, key, value, packed, open_rows),
        (
            n_q, n_k, packed_q, packed_k, query.shape[1], value.shape[1], query.shape[3], key.shape[3],
            plan.query_factor, *query.stride(), *key.stride(), *value.stride(),
        ),
        (open_rows is not None, plan.folded, mass, plan.kept, plan.depth, plan.channels, block_d, block_c),
    )  # fmt: skip


def pack_gradient(plan: Plan, grad: Tensor, packed: Tensor) -> None:
    """Fills `packed` (B, pieces, channels, padded positions) with grad (B, C, Hk, Wk)."""
    n_k = grad.shape[2] * grad.shape[3]
    packed_k, block = packed.shape[3], block_size(plan.channels)
    launch(
        pack_gradient_kernel,
        packed_k // block * grad.shape[0],
        (grad, packed),
        (n_k, packed_k, grad.shape[1], grad.shape[3], *grad.stride()),
        (plan.kept, plan.channels, block),
    )


@triton.jit
def pack_map(
    source,  # of this picture
    packed,  # where this picture's map goes
    open_rows,  # of this picture: flat position of each row, -1 behind the last; with GATHER
    start,  # first packed position of this block
    channels, positions, packed_positions, width,  # of the map
    stride_c, stride_y, stride_x,
    factor,  # what the numbers are multiplied by
    ONES: tl.constexpr,  # channels of ones behind the last
    GATHER: tl.constexpr,
    PIECES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a map."""
    column = start + tl.arange(0, BLOCK)
    position = column
    if GATHER:
        position = tl.load(open_rows + column)
    inside = ((position >= 0) & (position < positions))[None, :]
    channel = tl.arange(0, CHANNELS)[:, None]
    in_channel = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    at = channel.to(tl.int64) * stride_c + in_channel[None, :]
    values = tl.load(source + at, mask=inside & (channel < channels), other=0.0).to(tl.float32) * factor
    values = tl.where(inside & (channel >= channels) & (channel < channels + ONES), 1.0, values)
    pieces = rounded(values, packed.dtype.element_ty, PIECES)
    store(packed, channel * packed_positions + column[None, :], CHANNELS * packed_positions, pieces, PIECES)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def pack_kernel(
    query, key, value,  # in
    packed,  # out: (B, numbers), as `Layout` says
    open_rows,  # (B, packed_q + 1); with GATED
    n_q, n_k, packed_q, packed_k, depth, values,  # positions, padded positions, channels
    width_q, width_k,  # of the pictures
    factor,  # of the query
    query_b: tl.int64, query_c: tl.int64, query_y: tl.int64, query_x: tl.int64,  # strides
    key_b: tl.int64, key_c: tl.int64, key_y: tl.int64, key_x: tl.int64,
    value_b: tl.int64, value_c: tl.int64, value_y: tl.int64, value_x: tl.int64,
    GATED: tl.constexpr,  # whether only open rows of query and value are packed
    FOLDED: tl.constexpr,  # whether the key gets ones for the shift
    MASS: tl.constexpr,  # whether the value gets a channel of ones
    PIECES: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,  # positions of a block of query or key, and of value
):  # fmt: skip
    blocks_q, blocks_k, blocks_v = packed_q // BLOCK_D, packed_k // BLOCK_D, packed_q // BLOCK_C
    b = (tl.program_id(0) // (blocks_q + blocks_k + blocks_v)).to(tl.int64)
    block = tl.program_id(0) % (blocks_q + blocks_k + blocks_v)
    size_q, size_k = PIECES * DEPTH * packed_q.to(tl.int64), PIECES * DEPTH * packed_k.to(tl.int64)
    packed += b * (size_q + size_k + PIECES * CHANNELS * packed_q.to(tl.int64))
    if GATED:
        open_rows += b * (packed_q + 1)
    if block < blocks_q:
        pack_map(
            query + b * query_b, packed, open_rows, block * BLOCK_D, depth, n_q, packed_q, width_q,
            query_c, query_y, query_x, factor, 0, GATED, PIECES, DEPTH, BLOCK_D,
        )  # fmt: skip
    elif block < blocks_q + blocks_k:
        pack_map(
            key + b * key_b, packed + size_q, open_rows, (block - blocks_q) * BLOCK_D, depth, n_k, packed_k, width_k,
            key_c, key_y, key_x, 1.0, FOLDS if FOLDED else 0, False, PIECES, DEPTH, BLOCK_D,
        )  # fmt: skip
    else:
        pack_map(
            value + b * value_b, packed + size_q + size_k, open_rows, (block - blocks_q - blocks_k) * BLOCK_C, values,
            n_q, packed_q, width_q, value_c, value_y, value_x, 1.0, MASS, GATED, PIECES, CHANNELS, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def pack_gradient_kernel(
    source,  # in
    packed,  # out: (B, PIECES, CHANNELS, packed_k)
    n_k, packed_k, channels, width,  # positions, padded positions, channels, width of the picture
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,
    PIECES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, start = block_of(packed_k, BLOCK)
    pack_map(
        source + b * stride_b, packed + b * PIECES * CHANNELS * packed_k, None, start, channels, n_k, packed_k, width,
        stride_c, stride_y, stride_x, 1.0, 0, False, PIECES, CHANNELS, BLOCK,
    )  # fmt: skip
