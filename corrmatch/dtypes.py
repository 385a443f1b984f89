"""Dtypes and layouts: what the ops, their definition and RegionMasks share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """What to compute in: float64 if any is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def accumulation(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype to compute in."""
    dtype = accumulation_dtype(*tensors)
    return tuple(x.to(dtype) for x in tensors)


def confidence_gate(value: Tensor, confidence: Tensor | None, threshold: float | Tensor) -> Tensor:
    """Which query positions take part: bool (B, N_q)."""
    if confidence is None:
        confidence = accumulation(value)[0].softmax(1).amax(1)
    return accumulation(confidence)[0].flatten(1) >= threshold


def dense(name: str, x: Tensor) -> None:
    """A tensor whose elements lie in memory by strides: not sparse, of MKL-DNN or nested."""
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got layout {layout}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, where it is on; None elsewhere. The meta device has no autocast to be asked for."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where products are computed in the dtype of their factors; autocast would compute them in half precision."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
