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


class Tile(NamedTuple):
    """Tile of a block: query positions and key positions, warps of the block and stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tile of every kernel over scores."""

    row: Tile
    column: Tile
    backward_row: Tile
    backward_column: Tile


class Table(NamedTuple):
    """Tiles for half types and for numbers in pieces, by the most channels (padded) that they serve."""

    half: dict[int, Tiles]
    single: dict[int, Tiles]


def by_rows(rows: int, columns: int, warps: int, stages: int = 1) -> Tiles:
    """Passes by rows with tiles of this shape, passes by columns with its transpose."""
    by_row, by_column = Tile(rows, columns, warps, stages), Tile(columns, rows, warps, stages)
    return Tiles(by_row, by_column, by_row, by_column)


# Chosen by the instructions an element that `inspect` counts, without a spill up to 32 channels; not yet timed. Wider
# ones by the shared memory that a block may have: 227 KiB on 90 and 100, 163 KiB on 80, 99 KiB on 86, 89 and 120.
AMPERE_HALF = Tiles(Tile(64, 128, 4, 2), Tile(32, 128, 4, 1), Tile(128, 32, 4, 2), Tile(32, 128, 4, 2))
HOPPER_HALF = Tiles(Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
BLACKWELL_HALF = Tiles(Tile(128, 128, 4, 1), Tile(128, 128, 4, 1), Tile(128, 128, 8, 1), Tile(64, 128, 4, 1))
WIDE_HALF = {64: by_rows(64, 64, 4, 2), 512: by_rows(64, 32, 8)}
SMALL_HALF = {64: by_rows(64, 64, 4, 2), 256: by_rows(32, 32, 8), 512: by_rows(32, 16, 8)}

AMPERE_SINGLE = Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 16, 4, 2), Tile(64, 64, 4, 2))
HOPPER_SINGLE = Tiles(Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
BLACKWELL_SINGLE = Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))
WIDE_SINGLE = {64: by_rows(64, 32, 8), 256: by_rows(32, 16, 8), 512: by_rows(16, 16, 8)}
SMALL_SINGLE = {64: by_rows(64, 32, 8), 128: by_rows(32, 16, 8), 256: by_rows(16, 16, 8)}

AMPERE = Table({32: AMPERE_HALF, **WIDE_HALF}, {32: AMPERE_SINGLE, **WIDE_SINGLE})
SMALL = Table({32: AMPERE_HALF, **SMALL_HALF}, {32: AMPERE_SINGLE, **SMALL_SINGLE})
HOPPER = Table({32: HOPPER_HALF, **WIDE_HALF}, {32: HOPPER_SINGLE, **WIDE_SINGLE})
BLACKWELL = Table({32: BLACKWELL_HALF, **WIDE_HALF}, {32: BLACKWELL_SINGLE, **WIDE_SINGLE})
FAMILIES = {80: AMPERE, 86: SMALL, 90: HOPPER, 100: BLACKWELL, 120: SMALL}  # from this compute capability on
INTERPRETER = Tiles(*[Tile(128, 128, 1, 1)] * 4)  # it takes its time by the block
CANDIDATES = [
    Tile(rows, columns, warps, stages)
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


def tiles_for(arch: int, single: bool, channels: int) -> Tiles:
    """For maps of float32 (`single`) or of a half type with at most so many padded channels."""
    if arch == 0:
        return INTERPRETER
    family = FAMILIES[max((least for least in FAMILIES if least <= arch), default=min(FAMILIES))]
    table = family.single if single else family.half
    return table[min((size for size in table if size >= channels), default=max(table))]
