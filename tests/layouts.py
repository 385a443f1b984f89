"""Copies of tensors in other memory layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def reversed_dimensions(x: Tensor) -> Tensor:
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """Every third column of every second row, from the middle of a larger tensor of NaN or the largest integer."""
    filler = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    *lead, height, width = x.shape
    large = torch.full((*lead, 2 * height + 3, 3 * width + 5), filler, dtype=x.dtype, device=x.device)
    part = large[..., 3 : 3 + 2 * height : 2, 5 : 5 + 3 * width : 3]
    part.copy_(x)
    return part


def unaligned(x: Tensor) -> Tensor:
    """A contiguous tensor that is not aligned: it begins one element later."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


ANY = {f.__name__: f for f in (transposed, reversed_dimensions, sliced, unaligned)}
MAPS = {**ANY, "channels_last": channels_last}


def wide(*shape, dtype=torch.float32) -> Tensor:
    """A tensor of any size in the memory of one number."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def moved(x: Tensor, device: str) -> Tensor:
    """Moves a tensor to the device with strides and offset. Tensor.to keeps them for dense tensors only."""
    if x.device.type == device:
        return x
    storage = x.untyped_storage().to(device=device)
    return torch.empty(0, dtype=x.dtype, device=device).set_(storage, x.storage_offset(), x.shape, x.stride())
