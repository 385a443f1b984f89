"""Pixel propagation and other ways to compute it, forward and backward.

Peers have the arguments of the op, for maps (B, channels, H, W).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness.case import TOLERANCE, Benchmark, Case, Setting, largest_relative_error
from harness.measure import Contender
from torch import Tensor

from corrmatch import ops, reference

ROWS = (64, 128, 256)  # of the row-chunked peer
Propagate = Callable[[Tensor, Tensor, Tensor], Tensor]


def published(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published formulation: it stores the whole map, in the dtype of the inputs."""
    q, k, v = query.flatten(2), key.flatten(2), value.flatten(2)
    p = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
    return (v @ p).view(*v.shape[:2], *key.shape[2:])


class _RowChunked(torch.autograd.Function):
    """Stores a few rows of the map at a time, and computes them again in the backward."""

    @staticmethod
    def forward(ctx, query, key, value, rows):  # type: ignore[no-untyped-def]
        q, k, v = query.flatten(2), key.flatten(2), value.flatten(2)
        scale, out = 1 / math.sqrt(q.shape[1]), torch.zeros_like(v)
        for i in range(0, q.shape[2], rows):
            p = (q[:, :, i : i + rows].mT @ k).mul_(scale).softmax(-1)
            out.baddbmm_(v[:, :, i : i + rows], p)
        ctx.save_for_backward(query, key, value)
        ctx.rows = rows
        return out.view(*v.shape[:2], *key.shape[2:])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        q, k, v, g = (x.flatten(2) for x in (query, key, value, grad))
        scale, rows = 1 / math.sqrt(q.shape[1]), ctx.rows
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.empty_like(v)
        for i in range(0, q.shape[2], rows):
            at = slice(i, i + rows)
            p = (q[:, :, at].mT @ k).mul_(scale).softmax(-1)
            if ctx.needs_input_grad[2]:
                dv[:, :, at] = g @ p.mT
            t = v[:, :, at].mT @ g
            t.sub_((p * t).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dq[:, :, at] = k @ t.mT
            dk.baddbmm_(q[:, :, at], t)
        return dq.view_as(query), dk.view_as(key), dv.view_as(value) if ctx.needs_input_grad[2] else None, None


def row_chunked(rows: int) -> Propagate:
    """Row-chunked eager PyTorch with recomputation in the backward."""
    return lambda query, key, value: _RowChunked.apply(query, key, value, rows)


Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def attention_composition(attention: Attention, *, power_of_two: bool = False) -> Propagate:
    """Two calls of an existing attention. The result is differentiable if the lse of `attention` is.

    The first call yields lse_i. The second swaps query and key, with -lse_i in spare channels, so its softmax over i is
    proportional to P_ij. A factor, the exponential of its own lse, undoes its normalisation.

    Args:
        attention: Function of query, key, value, each (B, 1, N, channels), and scale. It returns the result and the lse
            (B, 1, N).
        power_of_two: Whether the number of channels must be a power of two.
    """

    def propagate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(2).mT.unsqueeze(1) for x in (query, key, value))
        scale, exact = 1 / math.sqrt(q.shape[-1]), q.dtype in (torch.float32, torch.float64)
        pieces = 1 if exact else 3  # an lse in half precision needs three channels
        channels = max(q.shape[-1] + pieces, v.shape[-1])
        if power_of_two:
            channels = max(16, 1 << (channels - 1).bit_length())

        def widen(*columns: Tensor) -> Tensor:
            x = torch.cat(columns, -1)
            return F.pad(x, (0, channels - x.shape[-1]))

        _, lse = attention(widen(q), widen(k), widen(k), scale)
        rest, folded = -lse.unsqueeze(-1), []
        for _ in range(pieces):
            folded.append(rest.to(q.dtype))
            rest = (rest - folded[-1]).detach()  # the first piece carries the gradient
        out, mass = attention(widen(k, *[torch.ones_like(k[..., :1])] * pieces), widen(q * scale, *folded), widen(v), 1)
        out = out[..., : v.shape[-1]] * mass.unsqueeze(-1).exp().to(v.dtype)
        return out.squeeze(1).mT.reshape(*value.shape[:2], *key.shape[2:])

    return propagate


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention of PyTorch on a CPU, forward only, because its lse has no gradient."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return out, lse.reshape(query.shape[:-1])


@functools.cache
def flex_attention() -> Attention:
    """Compiled FlexAttention: flash attention on a GPU whose lse has a gradient."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, aux = compiled(query, key, value, scale=scale, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return attention


def cases(s: Setting) -> Iterator[Case]:
    """The peers, forward and backward."""
    generator, (height, width) = s.generator(), s.grid
    query, key, value, upstream = (
        torch.randn(s.batch, s.channels, height, width, generator=generator).to(s.device, s.dtype) for _ in range(4)
    )
    leaves = [query, key, value] if s.value_grad else [query, key]
    for leaf in leaves:
        leaf.requires_grad_()

    def contender(name: str, f: Propagate, backward: bool = True, **rest: Any) -> Contender:
        grads = {"leaves": tuple(leaves), "upstream": upstream} if backward else {}
        return Contender(name, lambda: f(query, key, value), **grads, **rest)

    contenders = [contender("corrmatch", ops.pixel_propagate, ours=True)]
    contenders += [contender(f"row-chunked, {rows} rows", row_chunked(rows), family="row-chunked") for rows in ROWS]
    if s.device == "cpu":
        composition = attention_composition(cpu_attention)
        contenders.append(contender("attention composition", composition, backward=False))
    else:
        composition = attention_composition(flex_attention(), power_of_two=True)
        contenders.append(_compiled(contender("FlexAttention composition", composition)))
    contenders.append(contender("published eager", published))
    if s.compiled or s.device == "cuda":
        compiled = torch.compile(published, dynamic=False)
        contenders.append(_compiled(contender("published, compiled", compiled)))

    def expected() -> tuple[Tensor, ...]:
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (query, key, value)]
        out = reference.pixel_propagate(*exact)
        wanted = [x for x in exact if x.requires_grad]
        return out.detach(), *torch.autograd.grad(out, wanted, upstream.double())

    positions = height * width
    yield Case(
        "pixel_propagate", f"{height}x{width}, B = {s.batch}", s.batch * positions**2, "elements of the map",
        f"N = {positions}, D = C = {s.channels}", contenders, expected, largest_relative_error, TOLERANCE[s.dtype],
        positions, s.batch,
        oracle_bytes=6 * 8 * s.batch * positions**2,
        exponentials={"forward": 2 * s.batch * positions**2, "both": 4 * s.batch * positions**2},
    )  # fmt: skip


def _compiled(contender: Contender) -> Contender:
    """A compiled contender. Both forms, with and without gradients, are compiled when it is compared with the oracle.

    Torch keeps eight forms of a function, and each size has several. So `torch.compiler.reset()` is called before each
    size.
    """

    def answer() -> tuple[Any, ...]:
        with torch.no_grad():
            contender.forward()
        return contender.both()

    contender.answer, contender.compiles = answer, True
    return contender


def notes(device: str, compiled: bool) -> list[str]:
    """The notes below the tables."""
    found = []
    if device == "cpu":
        found.append("The attention composition has no backward on a CPU: its lse carries no gradient there.")
    found.append("Row-chunked is the fastest of 64, 128 and 256 rows at each size; it recomputes in the backward.")
    if not compiled and device == "cpu":
        found.append("Left out: the published form under torch.compile. Add it with --compile.")
    return found


BENCHMARK = Benchmark(
    "pixel_propagate",
    "Z[:, j] = sum_i V[:, i] softmax_j(<q_i, k_j> / sqrt(D))",
    cases,
    sizes=((41, 41), (65, 65), (101, 101)),
    share=4.0,
    backward=True,
    notes=notes,
)
