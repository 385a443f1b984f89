"""Pixel propagation, forward: Z[:, j] = sum_i g_i V[:, i] P_ij, in two passes over the scores.

The row pass owns query positions: shift and sum of each row, P_ij = 2^(factor <q_i, k_j> - shift_i) / sum_i, and,
where a gradient will be asked for, the mean key E[:, i] = sum_j P_ij key[:, j]. The column pass owns key positions and
loops over the open rows: one exponential an element, no division, Z += V P. Nothing of size N_q x N_k leaves the
registers, and each result has one owner: no atomics, the same bits from run to run.

In half types the shift is the lse and the sum 1; in bfloat16 the shift sits in spare channels of the packed query (see
`packing.fold`), so that the product of packed maps is the exponent. In float32 the lse, rounded, would cost digits: the
shift is the largest score, which its own recomputation cancels, and V is divided by the sum instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.configs import Configs, architecture, configs, launch
from corrmatch.kernels.language import LOG2E, block_of, dot, float32_precision, narrow, on_device_of
from corrmatch.kernels.packing import SPARE, Rows, confidence_gate, fold, pack, padded_channels


@dataclass(frozen=True)
class Plan:
    """How one problem is computed.

    Attributes:
        dtype: Of the packed maps: the common dtype of the inputs.
        depth: Channels of the packed query and key.
        channels: Channels of the packed value.
        query_factor: What the packed query is multiplied by.
        factor: What turns the product of packed query and key into an exponent of 2.
        exact: Whether the shift of a row is its largest score; otherwise its lse.
        folded: Whether the shift fits behind the channels of the query; otherwise the kernels subtract it.
        bias: P is 2^bias times what it is, so that the small entries of float16 keep their digits.
        precision: How the products take float32 numbers: in three tensor core products, accurate to its last place, or
            in one (tf32) where torch may do that as well.
        configs: Tile shapes.
    """

    dtype: torch.dtype
    depth: int
    channels: int
    query_factor: float
    factor: float
    exact: bool
    folded: bool
    bias: float
    precision: str
    configs: Configs

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, scale: float, mass: bool, grad_out: Tensor | None = None
    ) -> Plan:
        """For these inputs and, in the backward, this gradient; `mass`: the value gets one more channel, of ones."""
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        if dtype == torch.float16 and grad_out is not None and grad_out.dtype != dtype:
            dtype = torch.float32  # divided by the mass, a gradient leaves the range of float16
        depth, channels = padded_channels(query.shape[1]), padded_channels(value.shape[1] + mass)
        exact = dtype == torch.float32
        # A product with the query rounds once a channel, one with the score rounds it as a whole; half types cannot.
        query_factor, factor = (scale * LOG2E, 1.0) if exact else (1.0, scale * LOG2E)
        # Folding divides by the factor, and float16 ends at 65504.
        spare = depth - query.shape[1] >= SPARE.value
        folded = spare and abs(factor) >= 2**-20 and dtype == torch.bfloat16
        bias = 8.0 if dtype == torch.float16 else 0.0
        return cls(
            dtype,
            depth,
            channels,
            query_factor,
            factor,
            exact,
            folded,
            bias,
            float32_precision(),
            configs(architecture(query), dtype, max(depth, channels)),
        )


def pack_features(plan: Plan, query: Tensor, key: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Query, without its closed rows, and key."""
    ones = SPARE.value if plan.folded else 0
    packed_query = pack(query, plan.depth, plan.dtype, rows=rows, factor=plan.query_factor)
    return packed_query, pack(key, plan.depth, plan.dtype, ones=ones)


def pack_rows(
    plan: Plan, packed_query: Tensor, depth: int, value: Tensor, mass: bool, rows: Rows, normalizer: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and shift of the open rows; both with the normalizer applied, the shift to the packed query as well."""
    divisor = normalizer[:, 1] if plan.exact else None
    packed_value = pack(value, plan.channels, plan.dtype, rows=rows, ones=int(mass), divisor=divisor)
    shift = pack(normalizer[:, :1].unsqueeze(2), 1, torch.float32, rows=rows)
    if plan.bias != 0:
        shift -= plan.bias
    if plan.folded:
        fold(packed_query, depth, shift, plan.factor)
    return packed_value, shift


def forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, threshold: Tensor | None, scale: float,
    out: Tensor, normalizer: Tensor, mean_key: Tensor | None,
) -> None:  # fmt: skip
    """Fills `out` (B, C or, with the mass, C + 1, Hk, Wk), `normalizer` (B, 2, N_q) and `mean_key` (B, D, N_q).

    What they are is said in `corrmatch.ops.pixel_propagate`.
    """
    with on_device_of(query):
        depth, n_q, n_k = query.shape[1], normalizer.shape[2], key.shape[2] * key.shape[3]
        mass = out.shape[1] > value.shape[1]
        plan = Plan.of(query, key, value, scale, mass)
        if gate is None and threshold is not None:
            gate = confidence_gate(value, threshold)
        rows = Rows() if gate is None else Rows.of(gate.flatten(1))
        q, k = pack_features(plan, query, key, rows)
        shape = (n_q, n_k, q.shape[2], k.shape[2])

        if gate is not None:
            normalizer[:, 0].zero_()
            normalizer[:, 1].fill_(float("inf"))
            if mean_key is not None:
                mean_key.zero_()
        launch(
            row_kernel, plan.configs.row, "ROWS", n_q, query.shape[0],
            q, k, rows.index, rows.count, normalizer, mean_key, *shape, depth, plan.factor,
            GATED=gate is not None, EXACT=plan.exact, MEAN=mean_key is not None, DEPTH=plan.depth,
            PRECISION=plan.precision,
        )  # fmt: skip
        v, shift = pack_rows(plan, q, depth, value, mass, rows, normalizer)
        launch(
            column_kernel, plan.configs.column, "COLUMNS", n_k, query.shape[0],
            q, k, v, shift, rows.count, out, *shape, out.shape[1], plan.factor, 2.0**-plan.bias,
            GATED=gate is not None, FOLDED=plan.folded, DEPTH=plan.depth, CHANNELS=plan.channels,
            PRECISION=plan.precision,
        )  # fmt: skip


@triton.jit
def row_step(
    q, key, j0, n_k, packed_k, factor, largest, total, mean,
    LAST: tl.constexpr, MEAN: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a row's online softmax."""
    j = j0 + tl.arange(0, COLUMNS)
    k = tl.load(key + tl.arange(0, DEPTH)[:, None] * packed_k + j[None, :])
    scores = dot(q, k, tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION) * factor
    if LAST:
        scores = tl.where((j < n_k)[None, :], scores, -float("inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    p = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(p, 1)
    if MEAN:
        mean = dot(narrow(p, k.dtype), tl.trans(k), mean * shrink[:, None], PRECISION)
    return larger, total, mean


@triton.jit
def row_kernel(
    query, key, index, count, normalizer, mean_key, n_q, n_k, packed_q, packed_k, depth, factor,
    GATED: tl.constexpr, EXACT: tl.constexpr, MEAN: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Owner of ROWS query positions: shift, sum and mean key."""
    b, i0 = block_of(n_q, ROWS)
    query += b * DEPTH * packed_q
    key += b * DEPTH * packed_k
    stop = n_q
    if GATED:
        stop = tl.load(count + b)
    if i0 < stop:
        i, d = i0 + tl.arange(0, ROWS), tl.arange(0, DEPTH)
        q = tl.load(query + d[None, :] * packed_q + i[:, None])
        largest = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS, DEPTH), tl.float32)
        whole = n_k // COLUMNS * COLUMNS
        for j0 in range(0, whole, COLUMNS):
            largest, total, mean = row_step(
                q, key, j0, n_k, packed_k, factor, largest, total, mean,
                False, MEAN, DEPTH, ROWS, COLUMNS, PRECISION,
            )  # fmt: skip
        if whole < n_k:
            largest, total, mean = row_step(
                q, key, whole, n_k, packed_k, factor, largest, total, mean,
                True, MEAN, DEPTH, ROWS, COLUMNS, PRECISION,
            )  # fmt: skip
        inside = i < stop
        row = i
        if GATED:
            row = tl.load(index + b * packed_q + i)
        at = normalizer + b * 2 * n_q + row
        if EXACT:
            tl.store(at, largest, mask=inside)
            tl.store(at + n_q, total, mask=inside)
        else:
            tl.store(at, largest + tl.log2(total), mask=inside)
            tl.store(at + n_q, tl.full((ROWS,), 1.0, tl.float32), mask=inside)
        if MEAN:
            at = mean_key + b * depth * n_q + d[None, :] * n_q + row[:, None]
            tl.store(at, mean / total[:, None], mask=inside[:, None] & (d < depth)[None, :])


@triton.jit
def column_kernel(
    query, key, value, shift, count, out, n_q, n_k, packed_q, packed_k, channels, factor, unbias,
    GATED: tl.constexpr, FOLDED: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Owner of COLUMNS key positions: Z. Tiles are transposed, so that P is the operand that stays in registers."""
    b, j0 = block_of(n_k, COLUMNS)
    key += b * DEPTH * packed_k
    query += b * DEPTH * packed_q
    value += b * CHANNELS * packed_q
    shift += b * packed_q
    out += b * channels * n_k
    stop = n_q
    if GATED:
        stop = tl.load(count + b)
    j = j0 + tl.arange(0, COLUMNS)
    d, c = tl.arange(0, DEPTH), tl.arange(0, CHANNELS)
    k = tl.load(key + d[None, :] * packed_k + j[:, None])
    z = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for i0 in range(0, stop, ROWS):
        i = i0 + tl.arange(0, ROWS)
        q = tl.load(query + d[:, None] * packed_q + i[None, :])
        v = tl.load(value + c[None, :] * packed_q + i[:, None])
        scores = dot(k, q, tl.zeros((COLUMNS, ROWS), tl.float32), PRECISION) * factor
        if not FOLDED:
            scores -= tl.load(shift + i)[None, :]
        p = tl.exp2(scores)
        z = dot(narrow(p, v.dtype), v, z, PRECISION)
    at = out + c[None, :] * n_k + j[:, None]
    tl.store(at, narrow(z * unbias, out.dtype.element_ty), mask=(j < n_k)[:, None] & (c < channels)[None, :])
