"""Functions on dtypes and layouts that the ops, their definition and RegionMasks share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The accumulation dtype: float64 if a tensor has it, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def accumulation(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, converted to their accumulation dtype."""
    dtype = accumulation_dtype(*tensors)
    return tuple(x.to(dtype) for x in tensors)


def confidence_gate(value: Tensor, confidence: Tensor | None, threshold: float | Tensor) -> Tensor:
    """The gate: whether each query position is open, bool (B, N_q)."""
    if confidence is None:
        confidence = accumulation(value)[0].softmax(1).amax(1)
    return accumulation(confidence)[0].flatten(1) >= threshold


def dense(name: str, x: Tensor) -> None:
    """Whether a tensor is stored by strides: it is not sparse, nested or in a layout of MKL-DNN."""
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got layout {layout}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast if it is on, else None. The meta device has no autocast."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are computed in the dtype of their factors, without autocast."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
