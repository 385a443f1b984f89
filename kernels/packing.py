"""Packed maps: the form in which the passes over the scores read query, key, value and gradient.

A map of any strides becomes (pieces, channels, positions). Zeros pad the channels to a power of two of at least 16, and
the positions to a multiple of 128. So rows are aligned, although the image sizes of this method are odd, and inner
loops need no masks. One kernel packs query, key and value of an image behind one another in one buffer. With a gate it
packs only the open query positions, in order, and the passes loop over these: closed positions cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED, block_of, rounded, store
from corrmatch.kernels.launch import Variant, kernel, launch
from corrmatch.kernels.plan import ALIGNMENT, Plan, padded
from corrmatch.kernels.split import Scratch, clear

FOLDS = tl.constexpr(3)  # channels of ones in the key; the query holds the shift there, in three pieces
ELEMENTS = 65536 if INTERPRETED.value else 4096  # of a block; the interpreter wants few blocks


def block_size(channels: int) -> int:
    """Positions of a block, which holds all channels. It divides ALIGNMENT."""
    return min(ALIGNMENT, max(16, ELEMENTS // channels))


def pack(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, mass: bool, open_rows: Tensor | None, packed: Tensor,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Fills `packed`, described by `plan.Layout`, with query times its factor, key and value.

    With the mass the value gets a channel of ones. The kernel also prepares the scratch of the passes.
    """
    n_q, n_k = query.shape[2] * query.shape[3], key.shape[2] * key.shape[3]
    packed_q, packed_k = padded(n_q), padded(n_k)
    block_d, block_c = block_size(plan.depth), block_size(plan.channels)
    programs = query.shape[0] * ((packed_q + packed_k) // block_d + packed_q // block_c)
    launch(
        pack_kernel,
        programs,
        (query, key, value, packed, open_rows, scratch.arrived),
        (
            n_q, n_k, packed_q, packed_k, query.shape[1], value.shape[1], query.shape[3], key.shape[3],
            scratch.tiles, plan.query_factor, *query.stride(), *key.stride(), *value.stride(),
        ),
        (open_rows is not None, plan.folded, mass, plan.kept, plan.depth, plan.channels, block_d, block_c),
    )  # fmt: skip


def pack_gradient(plan: Plan, grad: Tensor, packed: Tensor, scratch: Scratch) -> None:
    """Fills `packed` (B, pieces, channels, padded positions) with grad (B, C, Hk, Wk) and prepares the scratch."""
    n_k = grad.shape[2] * grad.shape[3]
    packed_k, block = packed.shape[3], block_size(plan.channels)
    launch(
        pack_gradient_kernel,
        packed_k // block * grad.shape[0],
        (grad, packed, scratch.arrived),
        (n_k, packed_k, grad.shape[1], grad.shape[3], scratch.tiles, *grad.stride()),
        (plan.kept, plan.channels, block),
    )


@triton.jit
def pack_map(
    source,  # the map of the image
    packed,  # the packed map of the image
    open_rows,  # flat position of each open row of the image, then -1; read with GATHER only
    start,  # first packed position of the block
    channels, positions, packed_positions, width,  # sizes of the map
    stride_c, stride_y, stride_x,  # strides of the map
    factor,  # multiplied with the map
    ONES: tl.constexpr,  # number of channels of ones behind the last
    GATHER: tl.constexpr,  # whether only open rows are packed
    PIECES: tl.constexpr,  # pieces of a packed number
    CHANNELS: tl.constexpr,  # padded channels
    BLOCK: tl.constexpr,  # positions of the block
):  # fmt: skip
    """Packs one block of a map."""
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


@triton.jit
def maps_of(packed, b, packed_q, packed_k, PIECES: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers to the packed query, key and value of an image."""
    size_q, size_k = PIECES * DEPTH * packed_q.to(tl.int64), PIECES * DEPTH * packed_k.to(tl.int64)
    query = packed + b * (size_q + size_k + PIECES * CHANNELS * packed_q.to(tl.int64))
    key = query + size_q
    return query, key, key + size_k


@kernel(
    unaligned={"query": "data", "key": "data", "value": "data"},
    aligned={"packed": "packed", "open_rows": "i32", "arrived": "i32"},
    floats=("factor",),
    padded=("packed_q", "packed_k"),
)
def pack_kernel(
    query, key, value,  # in: (B, depth, n_q), (B, depth, n_k), (B, values, n_q)
    packed,  # out: (B, numbers), described by `plan.Layout`
    open_rows,  # in: (B, packed_q + 1), described in gate.py; read with GATED only
    arrived,  # out: (tiles), zeros; None where no pass is split
    n_q, n_k,  # query positions and key positions
    packed_q, packed_k,  # the same, padded
    depth, values,  # channels of query and key, and of value
    width_q, width_k,  # widths of the maps
    tiles,  # length of `arrived`
    factor,  # multiplied with the query
    query_b: tl.int64, query_c: tl.int64, query_y: tl.int64, query_x: tl.int64,  # strides of the query
    key_b: tl.int64, key_c: tl.int64, key_y: tl.int64, key_x: tl.int64,  # strides of the key
    value_b: tl.int64, value_c: tl.int64, value_y: tl.int64, value_x: tl.int64,  # strides of the value
    GATED: tl.constexpr,  # whether only open rows of query and value are packed
    FOLDED: tl.constexpr,  # whether the key gets channels of ones for the shift
    MASS: tl.constexpr,  # whether the value gets a channel of ones
    PIECES: tl.constexpr,  # pieces of a packed number
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr,  # padded channels of query and key, and of value
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,  # positions of a block of query or key, and of value
):  # fmt: skip
    """A program packs one block of one of the three maps."""
    clear(arrived, tiles, BLOCK_D)
    blocks_q, blocks_k, blocks_v = packed_q // BLOCK_D, packed_k // BLOCK_D, packed_q // BLOCK_C
    b = (tl.program_id(0) // (blocks_q + blocks_k + blocks_v)).to(tl.int64)
    block = tl.program_id(0) % (blocks_q + blocks_k + blocks_v)
    packed_query, packed_key, packed_value = maps_of(packed, b, packed_q, packed_k, PIECES, DEPTH, CHANNELS)
    if GATED:
        open_rows += b * (packed_q + 1)
    if block < blocks_q:
        pack_map(
            query + b * query_b, packed_query, open_rows, block * BLOCK_D, depth, n_q, packed_q, width_q,
            query_c, query_y, query_x, factor, 0, GATED, PIECES, DEPTH, BLOCK_D,
        )  # fmt: skip
    elif block < blocks_q + blocks_k:
        pack_map(
            key + b * key_b, packed_key, open_rows, (block - blocks_q) * BLOCK_D, depth, n_k, packed_k, width_k,
            key_c, key_y, key_x, 1.0, FOLDS if FOLDED else 0, False, PIECES, DEPTH, BLOCK_D,
        )  # fmt: skip
    else:
        pack_map(
            value + b * value_b, packed_value, open_rows, (block - blocks_q - blocks_k) * BLOCK_C, values,
            n_q, packed_q, width_q, value_c, value_y, value_x, 1.0, MASS, GATED, PIECES, CHANNELS, BLOCK_C,
        )  # fmt: skip


@kernel(unaligned={"source": "data"}, aligned={"packed": "packed", "arrived": "i32"}, padded=("packed_k",))
def pack_gradient_kernel(
    source,  # in: (B, channels, n_k), the gradient of the result
    packed,  # out: (B, PIECES, CHANNELS, packed_k)
    arrived,  # out: (tiles), zeros; None where no pass is split
    n_k, packed_k,  # key positions, and padded
    channels, width,  # sizes of the gradient
    tiles,  # length of `arrived`
    stride_b: tl.int64, stride_c: tl.int64, stride_y: tl.int64, stride_x: tl.int64,  # strides of the gradient
    PIECES: tl.constexpr,  # pieces of a packed number
    CHANNELS: tl.constexpr,  # padded channels
    BLOCK: tl.constexpr,  # positions of a block
):  # fmt: skip
    """A program packs BLOCK positions."""
    clear(arrived, tiles, BLOCK)
    b, start = block_of(packed_k, BLOCK)
    pack_map(
        source + b * stride_b, packed + b * PIECES * CHANNELS * packed_k, None, start, channels, n_k, packed_k, width,
        stride_c, stride_y, stride_x, 1.0, 0, False, PIECES, CHANNELS, BLOCK,
    )  # fmt: skip


def variants(plan: Plan, channels: int) -> Iterator[Variant]:
    """The forms that `inspect` compiles."""
    constants = plan.constants | {"PIECES": plan.kept}
    blocks = {"BLOCK_D": block_size(plan.depth), "BLOCK_C": block_size(plan.channels)}
    yield Variant("pack", pack_kernel, constants | blocks | {"GATED": True, "MASS": False})
    yield Variant("pack gradient", pack_gradient_kernel, constants | {"BLOCK": block_size(plan.channels)})
