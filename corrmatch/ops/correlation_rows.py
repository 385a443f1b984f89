"""Rows of a correlation map."""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch.dtypes import accumulation, accumulation_dtype, without_autocast
from corrmatch.ops import checks
from corrmatch.ops.registration import register


def correlation_rows(query: Tensor, key: Tensor, index: Tensor, *, scale: float | None = None) -> Tensor:
    r"""Softmax rows of the correlation map at some query positions.

    .. math:: P_{rj} = \operatorname{softmax}_j (\mathrm{scale} \, \langle q_r, k_j \rangle)

    Args:
        query: (B, D, Hq, Wq) or (B, D, N_q); float16, bfloat16, float32 or float64; any strides.
        key: (B, D, Hk, Wk) or (B, D, N_k), same dtype.
        index: int64 (K,), shared by the batch, or (B, K): flat query positions.
        scale: Factor of the scores; 1 / sqrt(D) if None.

    Returns:
        (B, K, Hk, Wk), or (B, K, N_k) for such a key, in the dtype of query; computed in float32 or better.

    Gradients flow to query and key. The rows themselves are the result, so there is nothing to fuse: on any device
    this is a matrix product and a softmax.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape or device; an index out of range (on a CPU, elsewhere with
            CORRMATCH_CHECK=1). The message names the argument.
    """
    checks.query_key(query, key)
    if key.dtype != query.dtype:
        raise TypeError(f"key: expected {query.dtype} as query, got {key.dtype}")
    checks.row_index(index, query)
    checks.backward_only(query=query, key=key)
    index = index.expand(query.shape[0], -1)
    rows = torch.ops.corrmatch.correlation_rows(query.flatten(2), key.flatten(2), index, checks.scale(scale, query))
    return rows.view(*rows.shape[:2], *key.shape[2:])


def correlation_rows_op(query: Tensor, key: Tensor, index: Tensor, scale: float) -> Tensor:
    """Rows (B, K, N_k) of flat maps, for an index (B, K)."""
    checks.positions(index, query.shape[2])
    q, k = accumulation(query.gather(2, _channels(index, query)), key)
    with without_autocast(query.device):
        return (scale * (q.mT @ k)).softmax(2).to(query.dtype)


def _channels(index: Tensor, query: Tensor) -> Tensor:
    """The index (B, D, K) of the positions in every channel. Unchecked positions are clamped to the bounds."""
    return index.clamp(0, query.shape[2] - 1).unsqueeze(1).expand(-1, query.shape[1], -1)


def _fake(query, key, index, scale):
    return query.new_empty(query.shape[0], index.shape[1], key.shape[2])


def _save(ctx, inputs, output):
    query, key, index, ctx.scale = inputs
    ctx.save_for_backward(query, key, index, output)


def _backward(ctx, grad):
    query, key, index, rows = ctx.saved_tensors
    dtype = accumulation_dtype(query, key)
    rows, grad = rows.to(dtype), grad.to(dtype)
    scores = ctx.scale * rows * (grad - (grad * rows).sum(2, keepdim=True))
    at = _channels(index, query)
    dquery = dkey = None
    with without_autocast(query.device):  # backward() may be called within it
        if ctx.needs_input_grad[0]:
            parts = key.to(dtype) @ scores.mT
            dquery = torch.zeros_like(query, dtype=dtype).scatter_add(2, at, parts).to(query.dtype)
        if ctx.needs_input_grad[1]:
            dkey = (query.gather(2, at).to(dtype) @ scores).to(key.dtype)
    return dquery, dkey, None, None


register("correlation_rows", correlation_rows_op, fake=_fake, save=_save, backward=_backward)
