"""Gradients of pixel propagation, in two passes over the scores.

Let G = dL/dZ and t_ij = <V_i, G_j>. A block of the row pass owns query positions. It computes U_i = sum_j P_ij G_j,
A_i = sum_j P_ij t_ij key_j and delta_i = <V_i, U_i>. Then dV_i = U_i and dquery_i = scale (A_i - delta_i E_i), with the
mean key E of the forward. A block of the column pass owns key positions: dkey_j = scale sum_i P_ij (t_ij - delta_i)
query_i. G is packed first, so these are three launches; query, key and value have been packed by the forward. Closed
rows are not packed, and their gradients are 0. In float32, V and the delta of the column pass are divided by the row
sum instead of P, as in the forward.

In the code u, a and t are U, A and t of a tile, dk is dkey, and `delta` is delta before this division.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.gate import end_of_rows
from corrmatch.kernels.language import (
    LOG2E,
    added_product,
    added_transposed_product,
    joined,
    load,
    narrow,
    on_device_of,
    product,
    split,
    transposed,
    transposed_product,
)  # fmt: skip
from corrmatch.kernels.launch import Variant, kernel, launch_pass
from corrmatch.kernels.packing import maps_of, pack_gradient
from corrmatch.kernels.plan import Pass, Plan, padded
from corrmatch.kernels.split import Scratch, is_last, share, sum_if_last, sum_of_parts, tile_of


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, packed: Tensor, rows: Tensor, open_rows: Tensor | None,
    scale: float, dquery: Tensor | None, dkey: Tensor | None, dvalue: Tensor | None,
) -> None:  # fmt: skip
    """Fills those of dquery, dkey and dvalue that are not None; dquery needs the mean key.

    `packed`, `rows` and `open_rows` come from the forward. Only shapes, dtypes and device of query, key and value are
    read.
    """
    with on_device_of(query):
        plan = Plan.of(query, key, value, scale, grad_out.shape[1] > value.shape[1])
        batch, n_q, n_k = query.shape[0], query.shape[2] * query.shape[3], key.shape[2] * key.shape[3]
        packed_q, packed_k = rows.shape[2], padded(n_k)
        grad = torch.empty(batch, plan.kept, plan.channels, packed_k, dtype=plan.dtype, device=query.device)
        of_row = plan.channels + plan.depth
        by_rows = Pass.of(plan.multiprocessors, plan.tiles.backward_row, "ROWS", packed_q, n_k, batch, of_row)
        tile = plan.tiles.backward_column
        by_columns = Pass.of(plan.multiprocessors, tile, "COLUMNS", n_k, n_q, batch, plan.depth)
        scratch = Scratch.of(query.device, by_rows, by_columns)
        pack_gradient(plan, grad_out, grad, scratch)
        delta = torch.empty(batch, packed_q, dtype=torch.float32, device=query.device)
        gated = open_rows is not None
        if gated:
            for gradient in (dquery, dvalue):
                if gradient is not None:
                    gradient.zero_()
        shape = (n_q, n_k, packed_q, packed_k, rows.shape[1], query.shape[1])
        unbias = 2.0**-plan.bias
        form = (gated, plan.folded, plan.kept, plan.pieces, plan.depth, plan.channels)
        launch_pass(
            backward_row_kernel, by_rows,
            (packed, grad, rows, open_rows, delta, dquery, dvalue, *scratch),
            (*shape, value.shape[1], plan.factor, unbias, scale),
            (dquery is not None, dvalue is not None, plan.exact, *form),
        )  # fmt: skip
        if dkey is None:
            return
        launch_pass(
            backward_column_kernel, by_columns,
            (packed, grad, rows, open_rows, delta, dkey, *scratch),
            (*shape, plan.factor, unbias * (1 / LOG2E if plan.exact else scale)),
            form,
        )  # fmt: skip


@triton.jit
def maps_and_rows(
    packed, grad, rows, delta, open_rows, b, n_q, packed_q, packed_k, kept,
    GATED: tl.constexpr, KEPT: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pointers to query, key, value, gradient, rows and delta of an image, and its number of packed rows."""
    query, key, value = maps_of(packed, b, packed_q, packed_k, KEPT, DEPTH, CHANNELS)
    grad += b * KEPT * CHANNELS * packed_k
    rows += b * kept * packed_q
    delta += b * packed_q
    return query, key, value, grad, rows, delta, end_of_rows(open_rows, b, n_q, packed_q, GATED)


@triton.jit
def backward_row_step(
    q, v, shift,  # queries, values and shifts of the block
    key, grad,  # the packed keys and gradients of the image
    j0,  # first key position of the tile
    n_k, packed_k,  # number of key positions, and padded
    factor,  # turns scores into exponents of P
    u, a,  # the sums up to this tile
    LAST: tl.constexpr,  # whether the tile extends beyond the last key
    DQUERY: tl.constexpr,  # whether `a` is wanted
    FOLDED: tl.constexpr, PIECES: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # see the kernel
):  # fmt: skip
    """Adds one tile to U and A."""
    j = j0 + tl.arange(0, COLUMNS)
    k = load(key, tl.arange(0, DEPTH)[:, None] * packed_k + j[None, :], DEPTH * packed_k, PIECES)
    g = load(grad, tl.arange(0, CHANNELS)[:, None] * packed_k + j[None, :], CHANNELS * packed_k, PIECES)
    scores = product(q, k, tl.zeros((ROWS, COLUMNS), tl.float32), PIECES) * factor
    if not FOLDED:
        scores -= shift[:, None]
    if LAST:
        scores = tl.where((j < n_k)[None, :], scores, -float("inf"))
    p = tl.exp2(scores)
    u = added_transposed_product(split(p, g[0].dtype, PIECES), transposed(g, PIECES), u, PIECES)
    if DQUERY:
        t = product(v, g, tl.zeros((ROWS, COLUMNS), tl.float32), PIECES)
        a = added_product(split(p * t, k[0].dtype, PIECES), transposed(k, PIECES), a, PIECES)
    return u, a


@kernel(
    aligned={
        "packed": "packed", "grad": "packed", "rows": "fp32", "open_rows": "i32", "delta": "fp32", "dquery": "data",
        "dvalue": "data", "parts": "fp32", "arrived": "i32",
    },
    floats=("factor", "unbias", "scale"),
    padded=("packed_q", "packed_k"),
)  # fmt: skip
def backward_row_kernel(
    packed,  # in: the packed maps
    grad,  # in: (B, KEPT, CHANNELS, packed_k), the packed gradient of the result
    rows, open_rows,  # in: written by the forward; `open_rows` is read with GATED only
    delta,  # out: (B, packed_q), zeros behind the last row
    dquery,  # out: (B, depth, n_q); written with DQUERY only
    dvalue,  # out: (B, values, n_q); written with DVALUE only
    parts, arrived,  # scratch, described by `split.Scratch`; used with SPLIT only
    n_q, n_k,  # numbers of query positions and of key positions
    packed_q, packed_k,  # the same, padded
    kept,  # numbers of `rows` for each query position
    depth, values,  # numbers of channels of query and key, and of value
    factor,  # turns scores into exponents of P
    unbias,  # 2^-bias, multiplied with sums of P
    scale,  # scale of the scores
    splits,  # number of blocks that share a loop
    DQUERY: tl.constexpr, DVALUE: tl.constexpr,  # whether these gradients are wanted
    EXACT: tl.constexpr,  # whether P still has to be divided by the sum of its row
    GATED: tl.constexpr,  # whether there are `open_rows`
    FOLDED: tl.constexpr,  # whether the query holds the shift
    KEPT: tl.constexpr, PIECES: tl.constexpr,  # pieces of a packed number, and those that products use
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr,  # padded channels of query and key, and of value
    SPLIT: tl.constexpr,  # whether several blocks share a loop
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # the tile: query positions and key positions
):  # fmt: skip
    """A program owns ROWS query positions: delta, dquery and dvalue."""
    b, i0, part = tile_of(packed_q, splits, ROWS, SPLIT)
    query, key, value, grad, rows, delta, stop = maps_and_rows(
        packed, grad, rows, delta, open_rows, b, n_q, packed_q, packed_k, kept, GATED, KEPT, DEPTH, CHANNELS
    )
    i, d, c = i0 + tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, CHANNELS)
    if i0 < stop:
        q = load(query, d[None, :] * packed_q + i[:, None], DEPTH * packed_q, PIECES)
        v = load(value, c[None, :] * packed_q + i[:, None], CHANNELS * packed_q, PIECES)
        u = tl.zeros((ROWS, CHANNELS), tl.float32)
        a = tl.zeros((ROWS, DEPTH), tl.float32)
        shift = tl.load(rows + i)
        first, end = share(n_k, part, splits, COLUMNS, SPLIT)
        whole = end // COLUMNS * COLUMNS
        for j0 in range(first, whole, COLUMNS):
            u, a = backward_row_step(
                q, v, shift, key, grad, j0, n_k, packed_k, factor, u, a,
                False, DQUERY, FOLDED, PIECES, DEPTH, CHANNELS, ROWS, COLUMNS,
            )  # fmt: skip
        if whole < end:
            u, a = backward_row_step(
                q, v, shift, key, grad, whole, n_k, packed_k, factor, u, a,
                True, DQUERY, FOLDED, PIECES, DEPTH, CHANNELS, ROWS, COLUMNS,
            )  # fmt: skip
        last = True
        if SPLIT:
            size = (CHANNELS + DEPTH) * packed_q
            parts += b * splits * size
            at_u = i[:, None] * CHANNELS + c[None, :]
            at_a = CHANNELS * packed_q + i[:, None] * DEPTH + d[None, :]
            tl.store(parts + part * size + at_u, u)
            if DQUERY:
                tl.store(parts + part * size + at_a, a)
            last = is_last(arrived, splits)
            if last:
                u = sum_of_parts(u, parts, at_u, size, splits)
                if DQUERY:
                    a = sum_of_parts(a, parts, at_a, size, splits)
        if last:
            inside = i < stop
            row = i
            if GATED:
                row = tl.load(open_rows + b * (packed_q + 1) + i)
            u *= unbias
            row_delta = tl.sum(u * joined(v, PIECES), 1)
            if EXACT:
                total = tl.load(rows + packed_q + i)
                u /= total[:, None]
                tl.store(delta + i, tl.where(inside, row_delta / total, 0.0))
            else:
                tl.store(delta + i, tl.where(inside, row_delta, 0.0))
            if DVALUE:
                at = dvalue + b * values * n_q + c[None, :] * n_q + row[:, None]
                tl.store(at, narrow(u, dvalue.dtype.element_ty), mask=inside[:, None] & (c < values)[None, :])
            if DQUERY:
                wanted = inside[:, None] & (d < depth)[None, :]
                mean = tl.load(rows + (2 + d[None, :]) * packed_q + i[:, None], mask=wanted, other=0.0)
                constant = row_delta[:, None] * mean
                # With a single key P is 1 for any query. The gradient is 0, without rounding errors.
                dq = scale * (tl.where(n_k > 1, a * unbias, constant) - constant)
                at = dquery + b * depth * n_q + d[None, :] * n_q + row[:, None]
                tl.store(at, narrow(dq, dquery.dtype.element_ty), mask=wanted)
    else:
        tl.store(delta + i, tl.zeros((ROWS,), tl.float32))


@kernel(
    aligned={
        "packed": "packed", "grad": "packed", "rows": "fp32", "open_rows": "i32", "delta": "fp32", "dkey": "data",
        "parts": "fp32", "arrived": "i32",
    },
    floats=("factor", "unbias"),
    padded=("packed_q", "packed_k"),
)  # fmt: skip
def backward_column_kernel(
    packed, grad, rows, open_rows, delta,  # in: written by the other kernels
    dkey,  # out: (B, depth, n_k)
    parts, arrived,  # scratch, described by `split.Scratch`; used with SPLIT only
    n_q, n_k,  # numbers of query positions and of key positions
    packed_q, packed_k,  # the same, padded
    kept,  # numbers of `rows` for each query position
    depth,  # number of channels of query and key
    factor,  # turns scores into exponents of P
    unbias,  # 2^-bias times the scale of the scores, multiplied with the result
    splits,  # number of blocks that share a loop
    GATED: tl.constexpr,  # whether there are `open_rows`
    FOLDED: tl.constexpr,  # whether the query holds the shift
    KEPT: tl.constexpr, PIECES: tl.constexpr,  # pieces of a packed number, and those that products use
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr,  # padded channels of query and key, and of value
    SPLIT: tl.constexpr,  # whether several blocks share a loop
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # the tile: query positions and key positions
):  # fmt: skip
    """A program owns COLUMNS key positions of dkey."""
    b, j0, part = tile_of(n_k, splits, COLUMNS, SPLIT)
    query, key, value, grad, rows, delta, stop = maps_and_rows(
        packed, grad, rows, delta, open_rows, b, n_q, packed_q, packed_k, kept, GATED, KEPT, DEPTH, CHANNELS
    )
    dkey += b * depth * n_k
    j = j0 + tl.arange(0, COLUMNS)
    d, c = tl.arange(0, DEPTH), tl.arange(0, CHANNELS)
    k = load(key, d[None, :] * packed_k + j[:, None], DEPTH * packed_k, PIECES)
    g = load(grad, c[None, :] * packed_k + j[:, None], CHANNELS * packed_k, PIECES)
    dk = tl.zeros((COLUMNS, DEPTH), tl.float32)
    first, end = share(stop, part, splits, ROWS, SPLIT)
    for i0 in range(first, end, ROWS):
        i = i0 + tl.arange(0, ROWS)
        q = load(query, d[:, None] * packed_q + i[None, :], DEPTH * packed_q, PIECES)
        v = load(value, c[:, None] * packed_q + i[None, :], CHANNELS * packed_q, PIECES)
        row_delta = tl.load(delta + i)
        scores = transposed_product(k, q, tl.zeros((COLUMNS, ROWS), tl.float32), PIECES) * factor
        if not FOLDED:
            scores -= tl.load(rows + i)[None, :]
        p = tl.exp2(scores)
        t = transposed_product(g, v, tl.zeros((COLUMNS, ROWS), tl.float32), PIECES)
        weights = split(p * (t - row_delta[None, :]), packed.dtype.element_ty, PIECES)
        dk = added_product(weights, transposed(q, PIECES), dk, PIECES)
    last = True
    if SPLIT:
        size = DEPTH * packed_k
        parts += b * splits * size
        at_sum = j[:, None] * DEPTH + d[None, :]
        dk, last = sum_if_last(dk, parts, at_sum, size, part, arrived, splits)
    if last:
        at = dkey + d[None, :] * n_k + j[:, None]
        tl.store(at, narrow(dk * unbias, dkey.dtype.element_ty), mask=(j < n_k)[:, None] & (d < depth)[None, :])


def variants(plan: Plan, channels: int) -> Iterator[Variant]:
    """The forms that `inspect` compiles."""
    constants = plan.constants | {"GATED": False, "DQUERY": True, "DVALUE": True}
    for name, several in (("", False), (", split", True)):
        form = constants | {"SPLIT": several}
        yield Variant(f"backward row{name}", backward_row_kernel, form, plan.tiles.backward_row)
        yield Variant(f"backward column{name}", backward_column_kernel, form, plan.tiles.backward_column)
