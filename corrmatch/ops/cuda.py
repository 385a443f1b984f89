"""How the ops call the CUDA kernels: on the tensor's device and its current stream, with scratch memory from torch.

CORRMATCH_EMULATOR names a module that tests/emulator/build.py makes: the same kernels, run on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from corrmatch import _C
from corrmatch.ops.borrowing import borrow


def _load() -> tuple[Any, bool]:
    """The kernels, None where there are none, and whether they are emulated."""
    path = os.environ.get("CORRMATCH_EMULATOR")
    if not path:
        return getattr(_C, "cuda", None), False
    spec = importlib.util.spec_from_file_location("corrmatch_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"CORRMATCH_EMULATOR: expected the path of an extension module, got {path!r}")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda, True


KERNELS, EMULATED = _load()


def launch(kernel: Callable[..., None], like: Tensor, scratch_bytes: Callable[[], int], *arguments: Any) -> None:
    """Calls a kernel for tensors on the device of `like`; scratch memory and stream come last.

    How much memory that is depends on the device, and so is asked for on it.
    """
    with torch.cuda.device(like.device if like.is_cuda else -1):  # -1: no device
        scratch = torch.empty(scratch_bytes(), dtype=torch.uint8, device=like.device)
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        kernel(*arguments, borrow(scratch), stream)
