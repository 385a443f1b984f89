"""How kernels are declared and launched.

Compiled kernels are launched directly: a launch by Triton takes longer than a small kernel runs.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from corrmatch.kernels.configs import CANDIDATE_SPLITS, CANDIDATES, Tile
from corrmatch.kernels.language import INTERPRETED
from corrmatch.kernels.plan import Pass

AUTOTUNE = os.environ.get("CORRMATCH_AUTOTUNE") == "1"  # read when this package is imported

Tensors = Sequence[Tensor | None]
Numbers = Sequence[int | float]

CHOSEN = ("splits", "SPLIT", "ROWS", "COLUMNS")  # arguments that `launch_pass` adds


class Variant(NamedTuple):
    """One form of a kernel that `inspect` compiles without a GPU.

    Attributes:
        name: Its name in the table.
        kernel: The kernel.
        constants: Values of its constant arguments, without those of the tile. Other names are ignored.
        tile: The tile of a pass over the scores; None for a kernel that is linear in the positions.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    tile: Tile | None = None


def kernel(
    *,
    unaligned: dict[str, str] | None = None,
    aligned: dict[str, str] | None = None,
    floats: Sequence[str] = (),
    padded: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Any]:
    """Declares a Triton kernel and the types of its arguments.

    Triton infers types from the tensors of a call; `inspect` compiles without tensors and reads them here. Arguments in
    capitals are constants. Arguments that are not named here are sizes and strides: integers of 32 bits, or as
    annotated. Triton does not compile a kernel again for other values of them.

    Args:
        unaligned: Pointers to tensors of a caller, which may start at any address: name and element type. The type is
            "data" (the dtype of query and logits), "packed" (the dtype of packed maps) or a name of Triton's.
        aligned: The same for pointers to memory that torch has allocated.
        floats: Names of float32 numbers.
        padded: Names of sizes that are multiples of `plan.ALIGNMENT`. The compiler makes use of that.
    """
    pointers = {**(unaligned or {}), **(aligned or {})}

    def decorate(function: Callable[..., None]) -> Any:
        known = {*pointers, *floats, *padded}
        sizes = [name for name in inspect.signature(function).parameters if not name.isupper() and name not in known]
        made = triton.jit(function, do_not_specialize=sizes, do_not_specialize_on_alignment=[*(unaligned or {})])
        made.pointers, made.floats = pointers, floats
        made.compiled = {}  # compiled kernels; Triton's own key of a kernel is slow to compute
        return made

    return decorate


def launch(
    kernel: Any, programs: int, tensors: Tensors, numbers: Numbers, constants: Sequence[Any], warps: int = 4,
    stages: int = 3,
) -> None:  # fmt: skip
    """Runs `kernel` with so many programs. Its arguments are tensors, numbers and constants, in this order."""
    if INTERPRETED.value:
        kernel[(programs,)](*tensors, *numbers, *constants)
        return
    # The key of a binary. Numbers are not part of it: kernels are not specialised for sizes, and each number has a
    # fixed type, 64 bits for strides.
    kinds = [None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors]
    key = (torch.cuda.current_device(), warps, stages, *constants, *kinds)
    compiled = kernel.compiled.get(key)
    if compiled is None:
        arguments = (*tensors, *numbers, *constants)
        kernel.compiled[key] = kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages)
    else:
        compiled[(programs, 1, 1)](*tensors, *numbers, *constants)


def launch_pass(kernel: Any, over: Pass, tensors: Tensors, numbers: Numbers, constants: Sequence[Any]) -> None:
    """Runs `kernel` with one block for each tile of the pass and each of its splits.

    The kernel takes `splits` behind its other numbers and SPLIT, ROWS and COLUMNS behind its other constants.
    """
    tile = over.tile
    if AUTOTUNE:
        names = [name for name in kernel.arg_names if name not in CHOSEN]
        arguments = dict(zip(names, (*tensors, *numbers, *constants), strict=True))
        grid = lambda chosen: (-(-over.owned // chosen[over.axis]) * over.batch * chosen["splits"],)  # noqa: E731
        tuned(kernel, over.splits)[grid](**arguments)
        return
    constants = (*constants, over.splits > 1, tile.rows, tile.columns)
    launch(kernel, over.blocks, tensors, (*numbers, over.splits), constants, tile.warps, tile.stages)


@functools.cache
def tuned(kernel: Any, splits: int) -> Any:
    """The kernel, tuned over CANDIDATES with at most `splits` splits for each problem size, dtype and set of flags."""
    candidates = [
        triton.Config(
            {"ROWS": c.rows, "COLUMNS": c.columns, "splits": count, "SPLIT": count > 1},
            num_warps=c.warps,
            num_stages=c.stages,
        )
        for c in CANDIDATES
        for count in CANDIDATE_SPLITS
        if count <= splits
    ]
    flags = [name for name in kernel.arg_names if name.isupper() and name not in CHOSEN]
    # The row kernel writes into the packed maps, and each timing needs the original ones.
    written = [name for name in ("packed",) if name in kernel.arg_names]
    return triton.autotune(candidates, key=["n_q", "n_k", *flags], restore_value=written)(kernel)
