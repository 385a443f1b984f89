"""Pixel propagation and its gradients in wide arithmetic, written from the formulas, and the tolerances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from ops.pixel_propagate import published
from torch import Tensor


class Propagated(NamedTuple):
    """Result and gradients as flat maps (B, channels, N). The oracle has arrays, others have tensors."""

    z: np.ndarray | Tensor
    dquery: np.ndarray | Tensor
    dkey: np.ndarray | Tensor
    dvalue: np.ndarray | Tensor


def wide(x: Tensor, dtype: type = np.float64) -> np.ndarray:
    """Converts a map to an array (B, channels, N)."""
    return x.detach().cpu().double().numpy().reshape(x.shape[0], x.shape[1], -1).astype(dtype)


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    *,
    scale: float | None = None,
    gate: Tensor | None = None,
    normalize: bool = False,
) -> tuple[Propagated, Propagated]:
    """The oracle, in float64, or in long double if an input is float64.

    Returns the results and, for each, the sum of the sizes of its terms: rounding errors are proportional to it.
    """
    dtype = np.longdouble if any(x.dtype == torch.float64 for x in (query, key, value)) else np.float64
    q, k, v, dz = (wide(x, dtype) for x in (query, key, value, grad))
    scale = 1 / np.sqrt(dtype(q.shape[1])) if scale is None else dtype(scale)
    g = np.ones((q.shape[0], 1, q.shape[2]), dtype)
    if gate is not None:
        g = gate.cpu().numpy().reshape(g.shape).astype(dtype)

    s = scale * np.einsum("bdi,bdj->bij", q, k)
    p = np.exp(s - s.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)

    weighted = v * g
    z = np.einsum("bci,bij->bcj", weighted, p)
    z_terms = np.einsum("bci,bij->bcj", abs(weighted), p)
    if normalize:
        mass = np.einsum("bxi,bij->bxj", g, p)
        inverse = np.where(mass > 0, 1 / np.where(mass > 0, mass, 1), 0)
        z, z_terms = z * inverse, z_terms * inverse
        dmass = -(dz * z).sum(1, keepdims=True) * inverse
        dz = dz * inverse
    t = np.einsum("bci,bcj->bij", weighted, dz)
    t_terms = np.einsum("bci,bcj->bij", abs(weighted), abs(dz))
    if normalize:
        t = t + g.transpose(0, 2, 1) * dmass
        t_terms = t_terms + abs(g.transpose(0, 2, 1) * dmass)
    ds = p * (t - (p * t).sum(2, keepdims=True))
    ds_terms = p * (t_terms + (p * t_terms).sum(2, keepdims=True))
    results = Propagated(
        z,
        scale * np.einsum("bij,bdj->bdi", ds, k),
        scale * np.einsum("bij,bdi->bdj", ds, q),
        g * np.einsum("bij,bcj->bci", p, dz),
    )
    terms = Propagated(
        z_terms,
        abs(scale) * np.einsum("bij,bdj->bdi", ds_terms, abs(k)),
        abs(scale) * np.einsum("bij,bdi->bdj", ds_terms, abs(q)),
        g * np.einsum("bij,bcj->bci", p, abs(dz)),
    )
    return results, terms


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    *,
    scale: float | None = None,
    gate: Tensor | None = None,
    normalize: bool = False,
) -> Propagated:
    """The published formulation in the dtype of the inputs, on the CPU, differentiated by autograd.

    Images whose float16 computation overflows are computed in bfloat16, which has the range.
    """
    results = _published(query, key, value, grad, scale, gate, normalize)
    if torch.float16 in (query.dtype, value.dtype) and not all(x.isfinite().all() for x in results):
        inputs = (x.bfloat16() if x.dtype == torch.float16 else x for x in (query, key, value, grad))
        wider = _published(*inputs, scale, gate, normalize)
        finite = [x.isfinite().all(2, keepdim=True).all(1, keepdim=True) for x in results]
        results = Propagated(
            *(torch.where(f, x, w.to(x.dtype)) for f, x, w in zip(finite, results, wider, strict=True))
        )
    return results


def _published(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float | None, gate: Tensor | None, normalize: bool
) -> Propagated:
    maps = [x.detach().cpu().requires_grad_() for x in (query, key, value)]
    q, k, v = maps
    if scale is not None:
        q = q * (scale * q.shape[1] ** 0.5)
    opened = torch.ones_like(v[:, :1]) if gate is None else gate.cpu().reshape(v[:, :1].shape).to(v.dtype)
    if normalize:
        both = published(q, k, torch.cat([v * opened, opened], 1))
        arrived = both[:, -1:] > 0
        z = torch.where(arrived, both[:, :-1] / torch.where(arrived, both[:, -1:], 1), 0)
    else:
        z = published(q, k, v * opened)
    gradients = torch.autograd.grad(z, maps, grad.cpu().to(z.dtype))
    return Propagated(*(x.detach().flatten(2) for x in (z, *gradients)))


def assert_accurate(name: str, actual: Tensor, oracle: np.ndarray, peer: Tensor, terms: np.ndarray, factor: float):
    """Asserts that the error (Frobenius norm) is at most `factor` times the error of the plain formulation.

    The plain formulation may be exact: with a single key P is 1 and its gradients are 0. So the limit is at least half
    a unit in the last place of the terms, in the accumulation dtype, plus that of the result, in its dtype. No fused
    kernel is better, because it rounds the exponential, the sum and their quotient.
    """
    dtype = oracle.dtype.type
    accumulation = torch.promote_types(actual.dtype, torch.float32)
    error, peer_error = (_norm(wide(x, dtype) - oracle) for x in (actual, peer))
    floor = torch.finfo(accumulation).eps * _norm(terms) / 2 + torch.finfo(actual.dtype).eps * _norm(oracle) / 2
    limit = max(floor, factor * peer_error)
    assert error <= limit, f"{name}: error {error:.2e} of {_norm(oracle):.2e}, limit {limit:.2e}"


def assert_all_accurate(actual: Propagated, oracle: Propagated, peer: Propagated, terms: Propagated):
    """Asserts that results have at most twice, gradients three times the error of the plain formulation."""
    for name, factor in zip(Propagated._fields, (2, 3, 3, 3), strict=True):
        assert_accurate(name, *(getattr(x, name) for x in (actual, oracle, peer, terms)), factor)


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))
