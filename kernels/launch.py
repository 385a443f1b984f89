"""How kernels are launched: straight, once they are compiled; Triton's own way takes longer than small kernels run."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from corrmatch.kernels.configs import CANDIDATES, Config
from corrmatch.kernels.language import INTERPRETED

AUTOTUNE = os.environ.get("CORRMATCH_AUTOTUNE") == "1"  # when this package is first imported

# Names of arguments that Triton must not compile anew for: sizes and strides. Pointers to inputs, which need not be
# aligned, are in UNALIGNED. What is left are padded sizes, multiples of 128, and memory that torch allocated.
SIZES = (
    "n_q", "n_k", "depth", "values", "channels", "classes", "positions", "width", "width_q", "width_k", "kept",
    "blocks", "height", "grid_height", "grid_width", "corner_size", "stride_b", "stride_c", "stride_y", "stride_x",
    *(f"{x}_{axis}" for x in ("query", "key", "value", "labels", "target", "weight", "ignore") for axis in "bcyx"),
)  # fmt: skip
UNALIGNED = ("query", "key", "value", "source", "gate", "threshold", "logits", "ignore", "labels", "target", "weight")

Tensors = Sequence[Tensor | None]
Numbers = Sequence[int | float]

_compiled: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any, programs: int, tensors: Tensors, numbers: Numbers, constants: Sequence[Any], warps: int = 4,
    stages: int = 3,
) -> None:  # fmt: skip
    """Runs `kernel` in so many programs. Its arguments are tensors, numbers and constants, in that order."""
    if INTERPRETED.value:
        kernel[(programs,)](*tensors, *numbers, *constants)
        return
    # What a binary depends on. Numbers are no part of it: kernels are not compiled for sizes, and the type of each is
    # fixed, strides being annotated as 64 bits.
    kinds = [None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors]
    key = (kernel, torch.cuda.current_device(), warps, stages, *constants, *kinds)
    compiled = _compiled.get(key)
    if compiled is None:
        arguments = (*tensors, *numbers, *constants)
        _compiled[key] = kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages)
    else:
        compiled[(programs, 1, 1)](*tensors, *numbers, *constants)


def launch_tiles(
    kernel: Any, config: Config, blocks: str, positions: int, batch: int, tensors: Tensors, numbers: Numbers,
    constants: Sequence[Any],
) -> None:  # fmt: skip
    """Runs `kernel` with one block for each tile of `positions` along `blocks` ("ROWS" or "COLUMNS") and picture.

    The kernel takes ROWS and COLUMNS behind its other constants.
    """
    if AUTOTUNE:
        grid = lambda chosen: (-(-positions // chosen[blocks]) * batch,)  # noqa: E731
        tuned(kernel)[grid](*tensors, *numbers, *constants)
        return
    size = config.rows if blocks == "ROWS" else config.columns
    programs = (positions + size - 1) // size * batch  # triton.cdiv takes ten times as long
    launch(kernel, programs, tensors, numbers, (*constants, config.rows, config.columns), config.warps, config.stages)


@functools.cache
def tuned(kernel: Any) -> Any:
    """The kernel with the fastest of CANDIDATES for each problem size, dtype and set of flags."""
    candidates = [
        triton.Config({"ROWS": c.rows, "COLUMNS": c.columns}, num_warps=c.warps, num_stages=c.stages)
        for c in CANDIDATES
    ]
    flags = [name for name in kernel.arg_names if name.isupper() and name not in ("ROWS", "COLUMNS")]
    written = [name for name in ("packed",) if name in kernel.arg_names]  # in place: a second run would find other maps
    return triton.autotune(candidates, key=["n_q", "n_k", *flags], restore_value=written)(kernel)
