"""Pixel propagation, forward: Z[:, j] = sum_i g_i V[:, i] P_ij, in two passes over the scores.

A block of the row pass owns query positions. It computes the shift and the sum of each row of
P_ij = 2^(factor <q_i, k_j> - shift_i) / sum_i and, if the backward needs it, the mean key
E[:, i] = sum_j P_ij key[:, j]. A block of the column pass owns key positions. It loops over the open rows and adds up
Z += V P, with one exponential and no division an element. No array of size N_q x N_k leaves the registers. Each result
has one owner, so there are no atomics and the bits are the same from run to run. With the packing of the three maps
these are three launches. The backward uses the packed maps again.

For float16 and bfloat16 the row pass stores the row's log-sum-exp as the shift, and 1 as the sum. For bfloat16 it also
writes the shift into three unused channels of the packed query, so that the matrix product is the exponent itself. For
float32 a rounded log-sum-exp would lose digits. There the shift is the largest score of the row, which cancels exactly
when it is computed again, and V is divided by the row sum. The row pass writes these into its rows of the packed maps.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.gate import confidence_gate, end_of_rows, fill_open_rows
from corrmatch.kernels.language import (
    added_transposed_product,
    dot,
    dot_alone,
    joined,
    load,
    narrow,
    on_device_of,
    product,
    rounded,
    split,
    store,
    transposed,
    transposed_product,
    transposed_small_products,
)  # fmt: skip
from corrmatch.kernels.launch import Variant, kernel, launch_pass
from corrmatch.kernels.packing import FOLDS, maps_of, pack
from corrmatch.kernels.plan import Pass, Plan, padded
from corrmatch.kernels.split import Scratch, is_last, share, sum_if_last, tile_of

CHUNK = tl.constexpr(16)  # channels of the value that the row pass divides in one turn


def forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, threshold: Tensor | None, scale: float,
    out: Tensor, packed: Tensor, rows: Tensor, open_rows: Tensor | None,
) -> None:  # fmt: skip
    """Fills `out` (B, C or, with the mass, C + 1, Hk, Wk) and the tensors that the backward needs.

    `plan.Layout` describes `packed` and `rows`. The mean key is computed if `rows` has room for it. `open_rows`, int32
    (B, padded N_q + 1), is None if there is neither a gate nor a threshold.
    """
    with on_device_of(query):
        mass = out.shape[1] > value.shape[1]
        plan = Plan.of(query, key, value, scale, mass)
        if gate is None and threshold is not None:
            gate = confidence_gate(value, threshold)
        if gate is not None and open_rows is not None:
            fill_open_rows(gate.flatten(1), open_rows)
        batch, n_q, n_k = query.shape[0], query.shape[2] * query.shape[3], key.shape[2] * key.shape[3]
        packed_q, packed_k = rows.shape[2], padded(n_k)
        shape, gated, mean = (n_q, n_k, packed_q, packed_k), open_rows is not None, rows.shape[1] > 2
        of_row = 2 + plan.depth if mean else 2
        by_rows = Pass.of(plan.multiprocessors, plan.tiles.row, "ROWS", packed_q, n_k, batch, of_row)
        by_columns = Pass.of(plan.multiprocessors, plan.tiles.column, "COLUMNS", n_k, n_q, batch, plan.channels)
        scratch = Scratch.of(query.device, by_rows, by_columns)
        pack(plan, query, key, value, mass, open_rows, packed, scratch)
        launch_pass(
            row_kernel, by_rows,
            (packed, rows, open_rows, *scratch), (*shape, query.shape[1], plan.factor, plan.bias),
            (gated, plan.exact, plan.folded, mean, plan.kept, plan.pieces, plan.depth, plan.channels),
        )  # fmt: skip
        launch_pass(
            column_kernel, by_columns,
            (packed, rows, open_rows, out, *scratch),
            (*shape, rows.shape[1], out.shape[1], plan.factor, 2.0**-plan.bias),
            (gated, plan.folded, plan.kept, plan.pieces, plan.depth, plan.channels),
        )  # fmt: skip


@triton.jit
def row_step(
    q,  # the queries of the block
    key,  # the packed keys of the image
    j0,  # first key position of the tile
    n_k, packed_k,  # number of key positions, and padded
    factor,  # turns scores into exponents of P
    largest, total, mean,  # of each row, up to this tile: largest score, sum of exponentials, sum of keys
    LAST: tl.constexpr,  # whether the tile extends beyond the last key
    MEAN: tl.constexpr,  # whether the mean key is wanted
    PIECES: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # see the kernel
):  # fmt: skip
    """Adds one tile to the online softmax of the rows."""
    j = j0 + tl.arange(0, COLUMNS)
    k = load(key, tl.arange(0, DEPTH)[:, None] * packed_k + j[None, :], DEPTH * packed_k, PIECES)
    scores = product(q, k, tl.zeros((ROWS, COLUMNS), tl.float32), PIECES) * factor
    if LAST:
        scores = tl.where((j < n_k)[None, :], scores, -float("inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    p = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(p, 1)
    if MEAN:
        mean = mean * shrink[:, None]
        mean = added_transposed_product(split(p, k[0].dtype, PIECES), transposed(k, PIECES), mean, PIECES)
    return larger, total, mean


@triton.jit
def rows_of_parts(
    parts,  # of this tile: each part has (packed_q, 2 + DEPTH) numbers, the mean last; without MEAN (packed_q, 2)
    size,  # numbers between the starts of two parts
    i, packed_q,  # the rows, and the number of padded query positions
    splits,  # number of parts
    MEAN: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,  # see the kernel
):  # fmt: skip
    """Combines largest score, sum and mean of the rows over all parts, in order."""
    at = 2 * packed_q + i[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    largest = tl.load(parts + i, cache_modifier=".cg")  # the first part is never empty
    total = tl.load(parts + packed_q + i, cache_modifier=".cg")
    mean = tl.zeros((ROWS, DEPTH), tl.float32)
    if MEAN:
        mean = tl.load(parts + at, cache_modifier=".cg")
    for _ in range(1, splits):
        parts += size
        its_largest = tl.load(parts + i, cache_modifier=".cg")
        larger = tl.maximum(largest, its_largest)
        shrink, its_shrink = tl.exp2(largest - larger), tl.exp2(its_largest - larger)
        total = total * shrink + tl.load(parts + packed_q + i, cache_modifier=".cg") * its_shrink
        if MEAN:
            its_mean = tl.load(parts + at, cache_modifier=".cg")
            mean = mean * shrink[:, None] + its_mean * its_shrink[:, None]
        largest = larger
    return largest, total, mean


@kernel(
    aligned={"packed": "packed", "rows": "fp32", "open_rows": "i32", "parts": "fp32", "arrived": "i32"},
    floats=("factor", "bias"),
    padded=("packed_q", "packed_k"),
)
def row_kernel(
    packed,  # in and out: the packed maps; shifts go into the query, sums into the value
    rows,  # out: (B, 2, packed_q), shift and sum; with MEAN (B, 2 + depth, packed_q), then the mean key
    open_rows,  # in: (B, packed_q + 1), described in gate.py; read with GATED only
    parts, arrived,  # scratch, described by `split.Scratch`; used with SPLIT only
    n_q, n_k,  # numbers of query positions and of key positions
    packed_q, packed_k,  # the same, padded
    depth,  # number of channels of query and key
    factor,  # turns scores into exponents of P
    bias,  # P is stored multiplied by 2^bias
    splits,  # number of blocks that share a loop
    GATED: tl.constexpr,  # whether there are `open_rows`
    EXACT: tl.constexpr,  # whether the shift is the largest score and V is divided by the sum; else it is the lse
    FOLDED: tl.constexpr,  # whether the shift is written into the query
    MEAN: tl.constexpr,  # whether the mean key is wanted
    KEPT: tl.constexpr, PIECES: tl.constexpr,  # pieces of a packed number, and those that products use
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr,  # padded channels of query and key, and of value
    SPLIT: tl.constexpr,  # whether several blocks share a loop
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # the tile: query positions and key positions
):  # fmt: skip
    """A program owns ROWS query positions: shift, sum, mean key. It writes finite numbers behind the last row, too."""
    b, i0, part = tile_of(packed_q, splits, ROWS, SPLIT)
    query, key, value = maps_of(packed, b, packed_q, packed_k, KEPT, DEPTH, CHANNELS)
    rows += b * (2 + depth if MEAN else 2) * packed_q
    stop = end_of_rows(open_rows, b, n_q, packed_q, GATED)
    i, d = i0 + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    if i0 < stop:
        q = load(query, d[None, :] * packed_q + i[:, None], DEPTH * packed_q, PIECES)
        largest = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS, DEPTH), tl.float32)
        first, end = share(n_k, part, splits, COLUMNS, SPLIT)
        whole = end // COLUMNS * COLUMNS
        for j0 in range(first, whole, COLUMNS):
            largest, total, mean = row_step(
                q, key, j0, n_k, packed_k, factor, largest, total, mean, False, MEAN, PIECES, DEPTH, ROWS, COLUMNS
            )
        if whole < end:
            largest, total, mean = row_step(
                q, key, whole, n_k, packed_k, factor, largest, total, mean, True, MEAN, PIECES, DEPTH, ROWS, COLUMNS
            )
        last = True
        if SPLIT:
            size = (2 + DEPTH if MEAN else 2) * packed_q
            parts += b * splits * size
            mine = parts + part * size
            tl.store(mine + i, largest)
            tl.store(mine + packed_q + i, total)
            if MEAN:
                tl.store(mine + 2 * packed_q + i[:, None] * DEPTH + d[None, :], mean)
            last = is_last(arrived, splits)
            if last:
                largest, total, mean = rows_of_parts(parts, size, i, packed_q, splits, MEAN, DEPTH, ROWS)
        if last:
            inside = i < stop
            shift = largest if EXACT else largest + tl.log2(total) - bias
            shift = tl.where(inside, shift, 0.0)
            tl.store(rows + i, shift)
            tl.store(rows + packed_q + i, tl.where(inside, total, 1.0))
            if MEAN:
                tl.store(
                    rows + (2 + d[None, :]) * packed_q + i[:, None], mean / total[:, None], mask=(d < depth)[None, :]
                )
            if FOLDED:  # each channel holds the next eight bits, so the three together hold a float32 number
                rest = -shift / factor
                for piece in tl.static_range(FOLDS):
                    digits = narrow(rest, query.dtype.element_ty)
                    tl.store(query + (depth + piece) * packed_q + i, digits)
                    rest -= digits.to(tl.float32)
            if EXACT:
                for c0 in range(0, CHANNELS, CHUNK):
                    at = (c0 + tl.arange(0, CHUNK))[:, None] * packed_q + i[None, :]
                    v = joined(load(value, at, CHANNELS * packed_q, KEPT), KEPT)
                    v = tl.where(inside[None, :], v / total[None, :], 0.0)
                    store(value, at, CHANNELS * packed_q, rounded(v, value.dtype.element_ty, KEPT), KEPT)
    else:
        for number in range(2 + depth if MEAN else 2):
            tl.store(rows + number * packed_q + i, tl.zeros((ROWS,), tl.float32))


@kernel(
    aligned={
        "packed": "packed", "rows": "fp32", "open_rows": "i32", "out": "data", "parts": "fp32", "arrived": "i32",
    },
    floats=("factor", "unbias"),
    padded=("packed_q", "packed_k"),
)  # fmt: skip
def column_kernel(
    packed, rows, open_rows,  # in: written by the row kernel
    out,  # out: (B, channels, n_k)
    parts, arrived,  # scratch, described by `split.Scratch`; used with SPLIT only
    n_q, n_k,  # numbers of query positions and of key positions
    packed_q, packed_k,  # the same, padded
    kept,  # numbers of `rows` for each query position
    channels,  # number of channels of the result
    factor,  # turns scores into exponents of P
    unbias,  # 2^-bias, multiplied with the result
    splits,  # number of blocks that share a loop
    GATED: tl.constexpr,  # whether there are `open_rows`
    FOLDED: tl.constexpr,  # whether the query holds the shift
    KEPT: tl.constexpr, PIECES: tl.constexpr,  # pieces of a packed number, and those that products use
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr,  # padded channels of query and key, and of value
    SPLIT: tl.constexpr,  # whether several blocks share a loop
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # the tile: query positions and key positions
):  # fmt: skip
    """A program owns COLUMNS key positions of Z. Tiles are transposed, so that P stays in registers as an operand."""
    b, j0, part = tile_of(n_k, splits, COLUMNS, SPLIT)
    query, key, value = maps_of(packed, b, packed_q, packed_k, KEPT, DEPTH, CHANNELS)
    rows += b * kept * packed_q
    out += b * channels * n_k
    stop = end_of_rows(open_rows, b, n_q, packed_q, GATED)
    j = j0 + tl.arange(0, COLUMNS)
    d, c = tl.arange(0, DEPTH), tl.arange(0, CHANNELS)
    k = load(key, d[None, :] * packed_k + j[:, None], DEPTH * packed_k, PIECES)
    z = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    small = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    first, end = share(stop, part, splits, ROWS, SPLIT)
    for i0 in range(first, end, ROWS):
        i = i0 + tl.arange(0, ROWS)
        q = load(query, d[:, None] * packed_q + i[None, :], DEPTH * packed_q, PIECES)
        v = load(value, c[None, :] * packed_q + i[:, None], CHANNELS * packed_q, PIECES)
        scores = transposed_product(k, q, tl.zeros((COLUMNS, ROWS), tl.float32), PIECES) * factor
        if not FOLDED:
            scores -= tl.load(rows + i)[None, :]
        p = split(tl.exp2(scores), v[0].dtype, PIECES)
        if PIECES == 1:
            z = dot(p[0], v[0], z)
        else:
            small = transposed_small_products(p, v, small, PIECES)
            z += dot_alone(p[0], v[0])
    if PIECES > 1:  # with an infinite value the small products may be NaN; the large product is right
        z += tl.where(small - small == 0, small, 0.0)
    last = True
    if SPLIT:
        size = CHANNELS * packed_k
        parts += b * splits * size
        at_sum = j[:, None] * CHANNELS + c[None, :]
        z, last = sum_if_last(z, parts, at_sum, size, part, arrived, splits)
    if last:
        at = out + c[None, :] * n_k + j[:, None]
        tl.store(at, narrow(z * unbias, out.dtype.element_ty), mask=(j < n_k)[:, None] & (c < channels)[None, :])


def variants(plan: Plan, channels: int) -> Iterator[Variant]:
    """The forms that `inspect` compiles."""
    constants = plan.constants | {"GATED": False}
    for name, several in (("", False), (", split", True)):
        form = constants | {"SPLIT": several}
        yield Variant(f"row{name}", row_kernel, form | {"MEAN": False}, plan.tiles.row)
        yield Variant(f"row, mean key{name}", row_kernel, form | {"MEAN": True}, plan.tiles.row)
        yield Variant(f"column{name}", column_kernel, form, plan.tiles.column)
