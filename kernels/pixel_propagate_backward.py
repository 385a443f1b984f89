"""Gradients of pixel propagation, in two passes over the scores.

Let G = dL/dZ and t_ij = <V_i, G_j>. The row pass owns query positions: U_i = sum_j P_ij G_j, A_i = sum_j P_ij t_ij
key_j and delta_i = <V_i, U_i>, so that dV_i = U_i and dquery_i = scale (A_i - delta_i E_i), with the mean key E of the
forward. The column pass owns key positions: dkey_j = scale sum_i P_ij (t_ij - delta_i) query_i. Closed rows are not
packed; their gradients are 0. In float32, V and the delta of the column pass are divided by the row's sum instead of P,
as in the forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.configs import launch
from corrmatch.kernels.language import LOG2E, block_of, dot, narrow, on_device_of
from corrmatch.kernels.packing import Rows, pack
from corrmatch.kernels.pixel_propagate import Plan, pack_features, pack_rows


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, normalizer: Tensor, mean_key: Tensor | None,
    gated: bool, scale: float, dquery: Tensor | None, dkey: Tensor | None, dvalue: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradients that are given. `normalizer` and `mean_key` are the forward's; dquery needs the latter."""
    with on_device_of(query):
        mass = grad_out.shape[1] > value.shape[1]
        plan = Plan.of(query, key, value, scale, mass, grad_out)
        rows = Rows.of(normalizer[:, 1] != float("inf")) if gated else Rows()
        depth = query.shape[1]
        q, k = pack_features(plan, query, key, rows)
        v, shift = pack_rows(plan, q, depth, value, mass, rows, normalizer)
        grad = pack(grad_out, plan.channels, plan.dtype)
        n_q, n_k = normalizer.shape[2], key.shape[2] * key.shape[3]
        delta = torch.zeros_like(shift)
        if gated:
            for gradient in (dquery, dvalue):
                if gradient is not None:
                    gradient.zero_()
        shape = (n_q, n_k, q.shape[2], k.shape[2])
        flags = {
            "GATED": gated,
            "FOLDED": plan.folded,
            "DEPTH": plan.depth,
            "CHANNELS": plan.channels,
            "PRECISION": plan.precision,
        }
        launch(
            backward_row_kernel, plan.configs.backward_row, "ROWS", n_q, query.shape[0],
            q, k, v, grad, shift, rows.index, rows.count, normalizer, mean_key, delta, dquery, dvalue,
            *shape, depth, value.shape[1], plan.factor, 2.0**-plan.bias, scale,
            DQUERY=dquery is not None, DVALUE=dvalue is not None, **flags,
        )  # fmt: skip
        if dkey is None:
            return
        launch(
            backward_column_kernel, plan.configs.backward_column, "COLUMNS", n_k, query.shape[0],
            q, k, v, grad, shift, rows.count, delta, dkey,
            *shape, depth, plan.factor, 2.0**-plan.bias * (1 / LOG2E if plan.exact else scale), **flags,
        )  # fmt: skip


@triton.jit
def backward_row_kernel(
    query, key, value, grad, shift, index, count, normalizer, mean_key, delta, dquery, dvalue,
    n_q, n_k, packed_q, packed_k, depth, values, factor, unbias, scale,
    DQUERY: tl.constexpr, DVALUE: tl.constexpr, GATED: tl.constexpr, FOLDED: tl.constexpr,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Owner of ROWS query positions: delta, dquery and dvalue."""
    b, i0 = block_of(n_q, ROWS)
    query += b * DEPTH * packed_q
    value += b * CHANNELS * packed_q
    key += b * DEPTH * packed_k
    grad += b * CHANNELS * packed_k
    shift += b * packed_q
    delta += b * packed_q
    stop = n_q
    if GATED:
        stop = tl.load(count + b)
    if i0 < stop:
        i, d, c = i0 + tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, CHANNELS)
        q = tl.load(query + d[None, :] * packed_q + i[:, None])
        v = tl.load(value + c[None, :] * packed_q + i[:, None])
        u = tl.zeros((ROWS, CHANNELS), tl.float32)
        a = tl.zeros((ROWS, DEPTH), tl.float32)
        if not FOLDED:
            of_row = tl.load(shift + i)
        for j0 in range(0, n_k, COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)
            k = tl.load(key + d[:, None] * packed_k + j[None, :])
            g = tl.load(grad + c[:, None] * packed_k + j[None, :])
            scores = dot(q, k, tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION) * factor
            if not FOLDED:
                scores = tl.where((j < n_k)[None, :], scores - of_row[:, None], -float("inf"))
            p = tl.exp2(scores)
            u = dot(narrow(p, g.dtype), tl.trans(g), u, PRECISION)
            if DQUERY:
                t = dot(v, g, tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION)
                a = dot(narrow(p * t, k.dtype), tl.trans(k), a, PRECISION)
        inside = i < stop
        row = i
        if GATED:
            row = tl.load(index + b * packed_q + i)
        total = tl.load(normalizer + (b * 2 + 1) * n_q + row, mask=inside, other=1.0)
        u *= unbias
        own = tl.sum(u * v.to(tl.float32), 1)
        tl.store(delta + i, tl.where(inside, own / total, 0.0))
        u /= total[:, None]
        if DVALUE:
            at = dvalue + b * values * n_q + c[None, :] * n_q + row[:, None]
            tl.store(at, narrow(u, dvalue.dtype.element_ty), mask=inside[:, None] & (c < values)[None, :])
        if DQUERY:
            wanted = inside[:, None] & (d < depth)[None, :]
            mean = tl.load(mean_key + b * depth * n_q + d[None, :] * n_q + row[:, None], mask=wanted, other=0.0)
            constant = own[:, None] * mean
            # With a single key P is 1 whatever the query, and nothing but rounding is left.
            dq = scale * (tl.where(n_k > 1, a * unbias, constant) - constant)
            tl.store(
                dquery + b * depth * n_q + d[None, :] * n_q + row[:, None],
                narrow(dq, dquery.dtype.element_ty),
                mask=wanted,
            )


@triton.jit
def backward_column_kernel(
    query, key, value, grad, shift, count, delta, dkey,
    n_q, n_k, packed_q, packed_k, depth, factor, unbias,
    GATED: tl.constexpr, FOLDED: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Owner of COLUMNS key positions: dkey."""
    b, j0 = block_of(n_k, COLUMNS)
    key += b * DEPTH * packed_k
    grad += b * CHANNELS * packed_k
    query += b * DEPTH * packed_q
    value += b * CHANNELS * packed_q
    dkey += b * depth * n_k
    shift += b * packed_q
    delta += b * packed_q
    stop = n_q
    if GATED:
        stop = tl.load(count + b)
    j = j0 + tl.arange(0, COLUMNS)
    d, c = tl.arange(0, DEPTH), tl.arange(0, CHANNELS)
    k = tl.load(key + d[None, :] * packed_k + j[:, None])
    g = tl.load(grad + c[None, :] * packed_k + j[:, None])
    dk = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for i0 in range(0, stop, ROWS):
        i = i0 + tl.arange(0, ROWS)
        q = tl.load(query + d[:, None] * packed_q + i[None, :])
        v = tl.load(value + c[:, None] * packed_q + i[None, :])
        own = tl.load(delta + i)
        scores = dot(k, q, tl.zeros((COLUMNS, ROWS), tl.float32), PRECISION) * factor
        if not FOLDED:
            scores -= tl.load(shift + i)[None, :]
        p = tl.exp2(scores)
        t = dot(g, v, tl.zeros((COLUMNS, ROWS), tl.float32), PRECISION)
        w = p * (t - own[None, :])
        dk = dot(narrow(w, q.dtype), tl.trans(q), dk, PRECISION)
    at = dkey + d[None, :] * n_k + j[:, None]
    tl.store(at, narrow(dk * unbias, dkey.dtype.element_ty), mask=(j < n_k)[:, None] & (d < depth)[None, :])
