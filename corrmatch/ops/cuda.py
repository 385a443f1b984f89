"""Calls of the CUDA operators: on the tensor's device and current stream, with scratch memory from torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from corrmatch import _C
from corrmatch.ops.borrowing import borrow

# The CUDA operators (csrc/cuda/ops.def), None if they were not built, and whether they take CPU tensors.
# `backend.use_emulator` sets both.
EXTENSION: Any = getattr(_C, "cuda", None)
EMULATED = False


def launch(operator: Callable[..., None], like: Tensor, scratch_bytes: Callable[[], int], *arguments: Any) -> None:
    """Calls an operator for tensors on the device of `like`. Its last arguments are scratch memory and stream.

    The size of the memory depends on the device, so `scratch_bytes` is called while this device is the current one.
    """
    with torch.cuda.device(like.device if like.is_cuda else -1):  # -1: no device
        scratch = torch.empty(scratch_bytes(), dtype=torch.uint8, device=like.device)
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        operator(*arguments, borrow(scratch), stream)
