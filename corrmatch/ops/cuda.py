"""How the ops call the CUDA kernels: on the tensor's device and its current stream, with scratch memory from torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from corrmatch import _C
from corrmatch.ops.borrowing import borrow

# The kernels, None where there are none, and whether they run on CPU tensors; `backend.use_emulator` sets both.
KERNELS: Any = getattr(_C, "cuda", None)
EMULATED = False


def launch(kernel: Callable[..., None], like: Tensor, scratch_bytes: Callable[[], int], *arguments: Any) -> None:
    """Calls a kernel for tensors on the device of `like`; scratch memory and stream come last.

    How much memory that is depends on the device, and so is asked for on it.
    """
    with torch.cuda.device(like.device if like.is_cuda else -1):  # -1: no device
        scratch = torch.empty(scratch_bytes(), dtype=torch.uint8, device=like.device)
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        kernel(*arguments, borrow(scratch), stream)
