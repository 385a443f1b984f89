"""Validation of arguments. Each message names the argument, the expected and the actual value."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from corrmatch.dtypes import dense

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_PIXELS = 2**31 - 1024  # of an image: kernels count them in 32 bits, some of them by whole blocks
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Checks a tensor: one of these dtypes, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(x.dtype).removeprefix('torch.')}")
    dense(name, x)
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as the others, got {x.device}")


def backward_only(**maps: Tensor) -> None:
    """Refuses derivatives other than those of backward() and torch.autograd.grad.

    Torch would take derivatives in forward mode for 0. For those of torch.func its message would name a missing method.
    """
    forward, functions = forward_ad._current_level >= 0, torch._C._are_functorch_transforms_active()
    if not (forward or functions):
        return
    for name, x in maps.items():
        if forward and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{name}: forward-mode derivatives are not supported; corrmatch.reference has them")
        if functions and _within_func_grad(x):
            raise RuntimeError(
                f"{name}: derivatives of torch.func (grad, vjp, jacrev) are not supported; corrmatch.reference has them"
            )


def _within_func_grad(x: Tensor) -> bool:
    """Whether a transform of torch.func needs the gradient of x, possibly around a vmap."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    stack = functorch.get_interpreter_stack() or ()
    wanted = torch.is_grad_enabled() and x.requires_grad
    return wanted and any(level.key() == functorch.TransformType.Grad for level in stack)


def feature_map(name: str, x: Any, like: Tensor | None = None, *, flat: bool = True) -> None:
    """Checks a floating map: (B, channels, H, W) or, if `flat`, (B, channels, N), with channels and positions."""
    tensor(name, x, FLOATING, like)
    if x.dim() != 4 and not (flat and x.dim() == 3):
        shapes = "(B, channels, H, W)" + (" or (B, channels, N)" if flat else "")
        raise ValueError(f"{name}: expected shape {shapes}, got {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected at least one channel and one position, got shape {tuple(x.shape)}")
    if like is not None and x.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: expected a batch of {like.shape[0]} as the others, got {x.shape[0]}")
    if not flat:
        pixels(name, x.shape[2], x.shape[3])


def query_key(query: Any, key: Any, *, flat: bool = True) -> None:
    """Checks that two maps have the same batch and channels."""
    feature_map("query", query, flat=flat)
    feature_map("key", key, query, flat=flat)
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key: expected {query.shape[1]} channels as in query, got {key.shape[1]}")


def image(name: str, x: Any, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Checks that a tensor has the shape of `like`, (B, H, W)."""
    tensor(name, x, dtypes, like)
    if x.dim() != 3:
        raise ValueError(f"{name}: expected shape (B, H, W), got {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(x.shape)}")
    pixels(name, x.shape[1], x.shape[2])


def pixels(name: str, height: int, width: int) -> None:
    """Checks that the kernels can count the pixels of an image."""
    if height * width > MOST_PIXELS:
        raise ValueError(f"{name}: expected an image of at most {MOST_PIXELS} pixels, got {height} x {width}")


def row_index(index: Any, query: Tensor) -> None:
    """Checks an index: int64, (K,) or (B, K), on the device of the query."""
    tensor("index", index, (torch.int64,), query)
    if index.dim() not in (1, 2) or (index.dim() == 2 and index.shape[0] != query.shape[0]):
        raise ValueError(f"index: expected shape (K,) or ({query.shape[0]}, K), got {tuple(index.shape)}")


def image_size(size: Any) -> tuple[int, int]:
    """Checks a size (H, W): both at least 1."""
    try:
        height, width = size
    except (TypeError, ValueError):
        raise TypeError(f"size: expected (H, W), got {size!r}") from None
    if not (type(height) is int and type(width) is int):
        if not (isinstance(height, Integral | torch.SymInt) and isinstance(width, Integral | torch.SymInt)):
            raise TypeError(f"size: expected two integers (H, W), got {size!r}")
        height, width = (x if isinstance(x, torch.SymInt) else int(x) for x in (height, width))
    if height < 1 or width < 1:
        raise ValueError(f"size: expected at least 1 x 1, got {size!r}")
    pixels("size", height, width)
    return height, width


def real(name: str, x: Any) -> float:
    """Checks a finite Python number."""
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not -math.inf < float(x) < math.inf:  # true of NaN, too; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return float(x)


def values_wanted(x: Tensor) -> bool:
    """Whether values are checked: always on a CPU, elsewhere on request, because a check synchronises with the host."""
    return x.device.type == "cpu" or os.environ.get("CORRMATCH_CHECK") == "1"


def classes(labels: Tensor, counted: Tensor, num_classes: int, where: str) -> None:
    """Checks that labels of pixels that count lie in [0, num_classes), if values are checked."""
    if not values_wanted(labels):
        return
    values = labels[counted]
    low, high = (int(x) for x in values.aminmax()) if values.numel() > 0 else (0, 0)
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"labels: expected values in [0, {num_classes - 1}] {where}, got {wrong}")


def positions(index: Tensor, count: int) -> None:
    """Checks that flat positions lie in [0, count), if values are checked."""
    if index.numel() > 0 and values_wanted(index):
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"index: expected values in [0, {count - 1}], got {low if low < 0 else high}")


def scale(x: Any, query: Tensor) -> float:
    """The given scale, or 1 / sqrt(D)."""
    return 1 / math.sqrt(query.shape[1]) if x is None else real("scale", x)


def threshold_tensor(x: Any, like: Tensor) -> Tensor:
    """The threshold as a 0-d float64 tensor on the device of `like`. The host never reads a tensor."""
    if isinstance(x, Tensor):
        dense("threshold", x)
        if x.dim() != 0 or not x.dtype.is_floating_point:
            raise ValueError(f"threshold: expected a number or a 0-d floating tensor, got {tuple(x.shape)} {x.dtype}")
        if x.device not in (like.device, torch.device("cpu")):
            raise ValueError(f"threshold: expected a tensor on {like.device} as the others, got {x.device}")
        return x.detach().to(like.device, torch.float64)
    return torch.full((), real("threshold", x), dtype=torch.float64, device=like.device)


def choice(name: str, x: Any, choices: tuple[Any, ...]) -> None:
    """Checks that a value is one of the choices."""
    plain = x is None or isinstance(x, str | Integral | torch.SymInt)  # == of a tensor returns a tensor
    if not plain or x not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {x!r}")


def flag(name: str, x: Any) -> bool:
    """Checks that a value is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected a bool, got {type(x).__name__}")
    return x


def integer(name: str, x: Any, low: int, high: int) -> int:
    """Checks that a value is an integer in [low, high]."""
    if isinstance(x, bool) or not isinstance(x, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__}")
    if not low <= int(x) <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {x}")
    return int(x)
