"""Pixel propagation: the column aggregation of a correlation map."""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch import _C, reference
from corrmatch.dtypes import accumulation_dtype, autocast_dtype, confidence_gate, without_autocast
from corrmatch.ops import checks
from corrmatch.ops.backend import HALF_AND_SINGLE, call, choose, implementation, kernels, run_on_cpu
from corrmatch.ops.borrowing import borrow
from corrmatch.ops.registration import register


def pixel_propagate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    confidence: Tensor | None = None,
    threshold: float | Tensor | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Spreads values along a correlation map that is never stored.

    .. math::
        Z[:, j] = \sum_i g_i \, V[:, i] \, P_{ij}, \qquad
        P_{ij} = \operatorname{softmax}_j (\mathrm{scale} \, \langle q_i, k_j \rangle)

    Each query position i distributes its value over the key positions j, with weights that sum to 1. This is the
    transpose of attention. The gate g_i is 1 without a threshold, else 1 where confidence_i >= threshold and 0
    elsewhere. Closed positions cost nothing.

    Args:
        query: (B, D, Hq, Wq) or (B, D, N_q); float16, bfloat16, float32, or float64 on a CPU; any strides.
        key: (B, D, Hk, Wk) or (B, D, N_k).
        value: (B, C, Hq, Wq) or (B, C, N_q). Its dtype may differ from that of query and key.
        scale: Factor of the scores; 1 / sqrt(D) if None.
        confidence: (B, Hq, Wq) or (B, N_q), compared with the threshold in float32 (float64 if it is float64). If
            None, the largest softmax probability over the C channels of value, computed inside the kernel.
        threshold: Number or 0-d tensor (read on the device). With None all gates are open.
        normalize: Divide by the mass sum_i g_i P_ij that arrives at j; the result is 0 where the mass is 0.
        backend: "cpu", "triton", "reference", or None for the best available.

    Returns:
        (B, C, Hk, Wk), or (B, C, N_k) for such a key, in the dtype of value. Accumulated in float32 (float64 if an
        input is float64). Memory beyond inputs and outputs is linear in N_q + N_k; results are the same from run to
        run and, on a CPU, for any number of threads. Under autocast query, key and value are cast to its dtype.

    Gradients flow to query, key and value, not through the gate. Second and forward-mode derivatives raise
    RuntimeError, and so do gradients under the transforms of torch.func; vmap calls the op once an element, and gives
    no gradient of query.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device or backend; the message names the argument.

    Source: CorrMatch (CVPR 2024, arXiv 2306.04300), "pixel propagation".
    """
    checks.query_key(query, key)
    checks.feature_map("value", value, query)
    if value.shape[2:] != query.shape[2:]:
        raise ValueError(
            f"value: expected positions {tuple(query.shape[2:])} as in query, got {tuple(value.shape[2:])}"
        )
    if threshold is not None:
        threshold = checks.threshold_tensor(threshold, query)
    if confidence is not None:
        checks.tensor("confidence", confidence, checks.FLOATING, query)
        if confidence.shape != query.shape[:1] + query.shape[2:]:
            expected = tuple(query.shape[:1] + query.shape[2:])
            raise ValueError(f"confidence: expected shape {expected}, got {tuple(confidence.shape)}")
        if threshold is None:
            raise ValueError("threshold: expected one along with confidence, got None")
    scale, normalize = checks.scale(scale, query), checks.flag("normalize", normalize)
    backend = choose("pixel_propagate", backend, query, key, value)
    query, key, value = _autocast_maps(query, key, value)
    if backend == "reference":
        return call("pixel_propagate", backend, query, key, value, scale, confidence, threshold, normalize)

    checks.backward_only(query=query, key=key, value=value)
    gate = None
    if confidence is not None and threshold is not None:
        gate = confidence_gate(value, confidence, threshold).view(-1, 1, *_as_map(query).shape[2:])
        threshold = None
    maps = (_as_map(query), _as_map(key), _as_map(value))
    gradient = torch.is_grad_enabled() and query.requires_grad
    out, *_ = torch.ops.corrmatch.pixel_propagate(*maps, gate, threshold, scale, normalize, gradient, backend)
    if normalize:
        out, mass = out[:, :-1], out[:, -1:]
        none = mass == 0  # the mass is NaN
        out = (out / mass.masked_fill(none, 1)).masked_fill(none, 0).to(value.dtype)
    return out if key.dim() == 4 else out.flatten(2)


def _autocast_maps(*maps: Tensor) -> tuple[Tensor, ...]:
    """Casts the maps to the dtype of autocast, as matrix products do. float64 stays."""
    dtype = autocast_dtype(maps[0].device)
    if dtype is None:
        return maps
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in maps)


@implementation("pixel_propagate", "reference")
def _reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, confidence: Tensor | None, threshold: Tensor | None,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """Called outside of the registered op, so that autograd differentiates it."""
    with without_autocast(query.device):
        return reference.pixel_propagate(
            query, key, value, scale=scale, confidence=confidence, threshold=threshold, normalize=normalize
        )


def _as_map(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 3 else x


def pixel_propagate_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    threshold: Tensor | None,
    scale: float,
    mass: bool,
    gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of 4-d maps. `gradient` tells whether the query will get a gradient.

    The first result is out: (B, C, Hk, Wk) in the dtype of value. With `mass` it is (B, C + 1, Hk, Wk) in the
    accumulation dtype, and the mass is its last channel. The other results are for the backward; those that a backend
    does not need are empty.

    "cpu" returns the normalizer (B, 2, N_q), shift and sum of each row: P_ij = 2^(log2(e) S_ij - shift_i) / sum_i. The
    sum is +inf where the gate is closed. The normalizer of "triton" has the open rows alone and, with `gradient`, their
    mean key sum_j P_ij key_j. "triton" also returns the packed maps and, with a gate, the open rows
    (`kernels.plan.Layout`): 3 x 32 numbers a position at 21 channels, of two bytes in half types and of six in float32.
    """
    gated = gate is not None or threshold is not None
    results = _empty_results(query, key, value, gated, mass, gradient, backend)
    if query.shape[0] > 0:
        call("pixel_propagate", backend, query, key, value, gate, threshold, scale, *results)
    return results


@implementation("pixel_propagate", "cpu")
def _cpu(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, threshold: Tensor | None, scale: float, out: Tensor,
    normalizer: Tensor, packed: Tensor, open_rows: Tensor,
) -> None:  # fmt: skip
    run_on_cpu(
        _C.cpu.pixel_propagate_forward, borrow(query), borrow(key), borrow(value), borrow(gate), borrow(threshold),
        scale, borrow(out), borrow(normalizer),
    )  # fmt: skip


@implementation("pixel_propagate", "triton", dtypes=HALF_AND_SINGLE, channels=256, narrow=128, capability=80)
def _triton(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, threshold: Tensor | None, scale: float, out: Tensor,
    normalizer: Tensor, packed: Tensor, open_rows: Tensor,
) -> None:  # fmt: skip
    rows = open_rows if open_rows.numel() > 0 else None
    forward = kernels("pixel_propagate").forward
    forward(query, key, value, gate, threshold, scale, out, packed, normalizer, rows)


def _empty_results(
    query: Tensor, key: Tensor, value: Tensor, gated: bool, mass: bool, gradient: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(query, key, value)
    shape = (value.shape[0], value.shape[1] + int(mass), *key.shape[2:])
    out = torch.empty(shape, dtype=dtype if mass else value.dtype, device=value.device)
    if backend != "triton":
        normalizer = out.new_empty((query.shape[0], 2, query.shape[2] * query.shape[3]), dtype=dtype)
        return out, normalizer, out.new_empty(0), out.new_empty(0, dtype=torch.int32)
    layout = kernels("plan").Layout.of(query, key, value, mass, gradient)
    open_rows = (query.shape[0], layout.rows[2] + 1) if gated else (0,)
    return (
        out,
        out.new_empty(layout.rows, dtype=dtype),
        out.new_empty(layout.packed, dtype=layout.dtype),
        out.new_empty(open_rows, dtype=torch.int32),
    )


def _fake(query, key, value, gate, threshold, scale, mass, gradient, backend):
    return _empty_results(query, key, value, gate is not None or threshold is not None, mass, gradient, backend)


def pixel_propagate_backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Tensor,
    packed: Tensor,
    open_rows: Tensor,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Those that `needs` leaves out are empty tensors."""
    grads = _empty_gradients(query, key, value, needs)
    if grad_out.numel() == 0:
        return grads
    dquery, dkey, dvalue = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    if backend == "triton":
        gated = open_rows if open_rows.numel() > 0 else None
        backward = kernels("pixel_propagate_backward").backward
        backward(grad_out, query, key, value, packed, normalizer, gated, scale, dquery, dkey, dvalue)
    else:
        run_on_cpu(
            _C.cpu.pixel_propagate_backward, borrow(grad_out), borrow(query), borrow(key), borrow(value),
            borrow(normalizer), scale, borrow(dquery), borrow(dkey), borrow(dvalue),
        )  # fmt: skip
    return grads


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip((query, key, value), needs, strict=True)
    )
    return dquery, dkey, dvalue


def _fake_backward(grad_out, query, key, value, normalizer, packed, open_rows, scale, needs, backend):
    return _empty_gradients(query, key, value, needs)


def _save(ctx, inputs, output):
    query, key, value, _, _, ctx.scale, _, ctx.gradient, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, *output[1:])
    ctx.set_materialize_grads(False)  # only the first result has a gradient; zeros for the others would take time


def _backward(ctx, grad_out, *_):
    needs = list(ctx.needs_input_grad[:3])
    if grad_out is None:
        return (None,) * 9
    if needs[0] and not ctx.gradient:
        raise RuntimeError(
            "query: a gradient is asked for, but the op was called with gradient=False, as vmap calls it"
        )
    grads = torch.ops.corrmatch.pixel_propagate_backward(grad_out, *ctx.saved_tensors, ctx.scale, needs, ctx.backend)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 6


def _refuse(ctx, *grads):
    raise RuntimeError("pixel_propagate has no second derivatives; backend='reference' has them")


register("pixel_propagate", pixel_propagate_op, fake=_fake, save=_save, backward=_backward)
register("pixel_propagate_backward", pixel_propagate_backward_op, fake=_fake_backward, backward=_refuse)


def _register_autocast(device_type: str) -> None:
    def autocast(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, ...]:
        maps = _autocast_maps(query, key, value)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.corrmatch.pixel_propagate(*maps, *rest)

    torch.library.impl("corrmatch::pixel_propagate", f"Autocast{device_type.upper()}", func=autocast)


for _device_type in ("cpu", "cuda"):
    _register_autocast(_device_type)
