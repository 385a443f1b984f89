"""Tile shapes: a table for each architecture family, by class of dtype and channels. Nothing is tuned unasked.

With CORRMATCH_AUTOTUNE=1, set before corrmatch is imported, the first call of a kernel for a problem size times
CANDIDATES instead. This takes seconds and must not happen while a CUDA graph is captured. TRITON_PRINT_AUTOTUNING=1
prints what won.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
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
    """Configurations for half types and for numbers in pieces, by the most channels (padded) that they serve."""

    half: dict[int, Configs]
    single: dict[int, Configs]


def tiles(rows: int, columns: int, warps: int, stages: int = 1) -> Configs:
    """Passes by rows with tiles of this shape, passes by columns with its transpose."""
    by_row, by_column = Config(rows, columns, warps, stages), Config(columns, rows, warps, stages)
    return Configs(by_row, by_column, by_row, by_column)


# Chosen by the instructions an element that `inspect` counts, without a spill up to 32 channels; not yet timed. Wider
# ones by the shared memory that a block may have: 227 KiB on 90 and 100, 163 KiB on 80, 99 KiB on 86, 89 and 120.
AMPERE_HALF = Configs(Config(64, 128, 4, 2), Config(32, 128, 4, 1), Config(128, 32, 4, 2), Config(32, 128, 4, 2))
HOPPER_HALF = Configs(Config(64, 128, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3))
BLACKWELL_HALF = Configs(Config(128, 128, 4, 1), Config(128, 128, 4, 1), Config(128, 128, 8, 1), Config(64, 128, 4, 1))
WIDE_HALF = {64: tiles(64, 64, 4, 2), 512: tiles(64, 32, 8)}
SMALL_HALF = {64: tiles(64, 64, 4, 2), 256: tiles(32, 32, 8), 512: tiles(32, 16, 8)}

AMPERE_SINGLE = Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 16, 4, 2), Config(64, 64, 4, 2))
HOPPER_SINGLE = Configs(Config(64, 128, 4, 2), Config(128, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2))
BLACKWELL_SINGLE = Configs(Config(128, 64, 4, 1), Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1))
WIDE_SINGLE = {64: tiles(64, 32, 8), 256: tiles(32, 16, 8), 512: tiles(16, 16, 8)}
SMALL_SINGLE = {64: tiles(64, 32, 8), 128: tiles(32, 16, 8), 256: tiles(16, 16, 8)}

AMPERE = Table({32: AMPERE_HALF, **WIDE_HALF}, {32: AMPERE_SINGLE, **WIDE_SINGLE})
SMALL = Table({32: AMPERE_HALF, **SMALL_HALF}, {32: AMPERE_SINGLE, **SMALL_SINGLE})
HOPPER = Table({32: HOPPER_HALF, **WIDE_HALF}, {32: HOPPER_SINGLE, **WIDE_SINGLE})
BLACKWELL = Table({32: BLACKWELL_HALF, **WIDE_HALF}, {32: BLACKWELL_SINGLE, **WIDE_SINGLE})
FAMILIES = {80: AMPERE, 86: SMALL, 90: HOPPER, 100: BLACKWELL, 120: SMALL}  # from this compute capability on
INTERPRETER = Configs(*[Config(128, 128, 1, 1)] * 4)  # it takes its time by the block
CANDIDATES = [
    Config(rows, columns, warps, stages)
    for rows, columns in ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
    for warps in (4, 8)
    for stages in (1, 2, 3)
]


def architecture(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0; 0 under the interpreter."""
    return 0 if INTERPRETED.value else compute_capability(tensor.device)


@functools.cache
def compute_capability(device: torch.device) -> int:
    """90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configs(arch: int, single: bool, channels: int) -> Configs:
    """For maps of float32 (`single`) or of a half type with at most so many padded channels."""
    if arch == 0:
        return INTERPRETER
    family = FAMILIES[max((least for least in FAMILIES if least <= arch), default=min(FAMILIES))]
    table = family.single if single else family.half
    return table[min((size for size in table if size >= channels), default=max(table))]
