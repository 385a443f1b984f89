"""Descriptions of tensors for the extension."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from corrmatch import _C


@overload
def borrow(tensor: Tensor) -> _C.Tensor: ...
@overload
def borrow(tensor: Tensor | None) -> _C.Tensor | None: ...
def borrow(tensor: Tensor | None) -> _C.Tensor | None:
    """Describes a tensor for the extension. The caller has to keep the tensor alive during the call."""
    if tensor is None:
        return None
    return _C.Tensor(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.stride())
