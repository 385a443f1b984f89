"""How kernels are declared and launched.

Launches are straight, once a kernel is compiled: Triton's own way takes longer than small kernels run.
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

AUTOTUNE = os.environ.get("CORRMATCH_AUTOTUNE") == "1"  # when this package is first imported

Tensors = Sequence[Tensor | None]
Numbers = Sequence[int | float]

CHOSEN = ("splits", "SPLIT", "ROWS", "COLUMNS")  # arguments that `launch_pass` adds


class Variant(NamedTuple):
    """One form of a kernel that `inspect` compiles without a GPU.

    Attributes:
        name: What the table calls it.
        kernel: The kernel.
        constants: Values of its arguments in capitals but for those of the tile; others are ignored.
        tile: The tile of a kernel over scores; None for a kernel that is linear in the positions.
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
    """Makes a Triton kernel of a function, with the types of its arguments.

    Triton reads the types off the tensors of a call; `inspect` compiles without tensors and reads them here. Arguments
    in capitals are constants. All others that are not named here are sizes and strides, integers of 32 bits or as
    annotated, for which Triton must not compile anew.

    Args:
        unaligned: Pointers to a caller's tensors, which may start at any address: name and type of the numbers, "data"
            (the dtype of query and logits), "packed" (that of packed maps) or as Triton calls it.
        aligned: The same, pointers to memory that torch has allocated.
        floats: Numbers of float32.
        padded: Sizes that are multiples of `plan.ALIGNMENT`, which the compiler makes use of.
    """
    pointers = {**(unaligned or {}), **(aligned or {})}

    def decorate(function: Callable[..., None]) -> Any:
        known = {*pointers, *floats, *padded}
        sizes = [name for name in inspect.signature(function).parameters if not name.isupper() and name not in known]
        made = triton.jit(function, do_not_specialize=sizes, do_not_specialize_on_alignment=[*(unaligned or {})])
        made.pointers, made.floats = pointers, floats
        made.compiled = {}  # binaries, by what they depend on; Triton takes its time to hash a kernel
        return made

    return decorate


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
    """The kernel with the fastest of CANDIDATES for each problem size, dtype and set of flags, in at most `splits`."""
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
    written = [name for name in ("packed",) if name in kernel.arg_names]  # in place: a second run would find other maps
    return triton.autotune(candidates, key=["n_q", "n_k", *flags], restore_value=written)(kernel)
