"""Tile shapes: a table for each architecture family, by class of dtype and channels. Nothing is tuned unasked.

With CORRMATCH_AUTOTUNE=1 the first call of a kernel for a problem size times CANDIDATES instead. This takes seconds and
must not happen while a CUDA graph is captured. TRITON_PRINT_AUTOTUNING=1 prints what won.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED


class Config(NamedTuple):
    """Tile of a kernel: query positions, key positions, warps of a block and stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


class Configs(NamedTuple):
    """One configuration a kernel."""

    row: Config
    column: Config
    backward_row: Config
    backward_column: Config


class Table(NamedTuple):
    """Configurations for half types and for float32, by the most channels (padded) that they serve."""

    half: dict[int, Configs]
    single: dict[int, Configs]


# Chosen by the instructions an element that `inspect` counts, without a spill up to 32 channels; not yet timed.
SINGLE = {
    32: Configs(Config(128, 64, 8, 1), Config(64, 128, 8, 1), Config(64, 16, 4, 1), Config(32, 64, 4, 1)),
    64: Configs(Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
    256: Configs(Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1)),
}
LARGE_HALF = {
    64: Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    256: Configs(Config(64, 32, 8, 1), Config(32, 64, 8, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
}
AMPERE_HALF = Configs(Config(64, 128, 4, 2), Config(32, 128, 4, 1), Config(128, 32, 4, 2), Config(32, 128, 4, 2))
HOPPER_HALF = Configs(Config(64, 128, 4, 2), Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1))
BLACKWELL_HALF = Configs(Config(128, 128, 4, 1), Config(128, 128, 4, 1), Config(128, 128, 8, 1), Config(64, 128, 4, 1))
AMPERE = Table({32: AMPERE_HALF, **LARGE_HALF}, SINGLE)
HOPPER = Table({32: HOPPER_HALF, **LARGE_HALF}, SINGLE)
BLACKWELL = Table({32: BLACKWELL_HALF, **LARGE_HALF}, SINGLE)
FAMILIES = {80: AMPERE, 90: HOPPER, 100: BLACKWELL, 120: AMPERE}  # from this compute capability on
INTERPRETER = Configs(*[Config(64, 64, 1, 1)] * 4)
CANDIDATES = [
    Config(rows, columns, warps, stages)
    for rows, columns in ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
    for warps in (4, 8)
    for stages in (1, 2)
]


def architecture(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0; 0 under the interpreter."""
    if INTERPRETED.value:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def configs(arch: int, dtype: torch.dtype, channels: int) -> Configs:
    """For maps of `dtype` with at most so many padded channels."""
    if arch == 0:
        return INTERPRETER
    family = FAMILIES[max((least for least in FAMILIES if least <= arch), default=min(FAMILIES))]
    table = family.single if dtype == torch.float32 else family.half
    return table[min((size for size in table if size >= channels), default=max(table))]  # 256 and the mass make 512


def launch(kernel: Any, config: Config, blocks: str, positions: int, batch: int, *arguments: Any, **flags: Any) -> None:
    """Runs `kernel` with one block for each tile of `positions` along `blocks` ("ROWS" or "COLUMNS") and picture."""
    if os.environ.get("CORRMATCH_AUTOTUNE") == "1":
        tuned(kernel)[lambda chosen: (triton.cdiv(positions, chosen[blocks]) * batch,)](*arguments, **flags)
        return
    tile = {"ROWS": config.rows, "COLUMNS": config.columns}
    kernel[(triton.cdiv(positions, tile[blocks]) * batch,)](
        *arguments, **flags, **tile, num_warps=config.warps, num_stages=config.stages
    )


@functools.cache
def tuned(kernel: Any) -> Any:
    """The kernel with the fastest of CANDIDATES for each problem size, dtype and set of flags."""
    candidates = [
        triton.Config({"ROWS": c.rows, "COLUMNS": c.columns}, num_warps=c.warps, num_stages=c.stages)
        for c in CANDIDATES
    ]
    flags = [name for name in kernel.arg_names if name.isupper() and name not in ("ROWS", "COLUMNS")]
    return triton.autotune(candidates, key=["n_q", "n_k", *flags])(kernel)
