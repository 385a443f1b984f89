"""Assumptions of the operators in the extension, for the tables CONTRACT of `support`."""

from __future__ import annotations

from backends import FLOATING
from random_inputs import INTEGERS
from torch import Tensor

__all__ = ["FLOATING", "INTEGERS", "lent"]


def lent(x: Tensor, dtypes: tuple, *shape: int, contiguous: bool = False) -> None:
    """Asserts the shape, and that all elements lie in memory that the tensor owns."""
    assert x.device.type == "cpu"
    assert x.dtype in dtypes
    assert tuple(x.shape) == shape
    assert x.is_contiguous() or not contiguous
    assert min(x.stride(), default=0) >= 0
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    assert x.numel() == 0 or (last + 1) * x.element_size() <= x.untyped_storage().nbytes()
