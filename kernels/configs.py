"""Tile shapes: one table for each architecture family. A table is indexed by dtype class and channels.

Tuning is off by default. With CORRMATCH_AUTOTUNE=1, set before corrmatch is imported, the first call of a kernel for a
problem size times CANDIDATES instead. This takes seconds and must not happen while a CUDA graph is captured.
TRITON_PRINT_AUTOTUNING=1 prints the winner.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from corrmatch.kernels.language import INTERPRETED


class Tile(NamedTuple):
    """The tile of a block, and how the block runs.

    Attributes:
        rows: Query positions.
        columns: Key positions.
        warps: Warps of a block.
        stages: Stages of its software pipeline.
        blocks: Blocks that keep a multiprocessor busy. They fit into its registers and its shared memory.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    blocks: int = 2


class Tiles(NamedTuple):
    """The tile of each pass over the scores."""

    row: Tile
    column: Tile
    backward_row: Tile
    backward_column: Tile


class Table(NamedTuple):
    """Tiles for half types and for numbers in pieces. The index is the largest number of padded channels they serve."""

    half: dict[int, Tiles]
    single: dict[int, Tiles]


def by_rows(rows: int, columns: int, warps: int, stages: int = 1) -> Tiles:
    """Row passes use tiles of this shape, column passes use its transpose."""
    by_row, by_column = Tile(rows, columns, warps, stages), Tile(columns, rows, warps, stages)
    return Tiles(by_row, by_column, by_row, by_column)


# The tiles up to 32 channels have the fewest instructions an element that `inspect` counts without a spill. They are
# not timed yet. Tiles for more channels fit the shared memory of a block: 227 KiB on 90 and 100, 163 KiB on 80, 99 KiB
# on 86, 89 and 120.
AMPERE_HALF = Tiles(Tile(64, 128, 4, 2), Tile(32, 128, 4, 1), Tile(128, 32, 4, 2), Tile(32, 128, 4, 2))
HOPPER_HALF = Tiles(Tile(64, 128, 4, 3, 3), Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 3, 3))
BLACKWELL_HALF = Tiles(Tile(128, 128, 4, 1), Tile(128, 128, 4, 1), Tile(128, 128, 8, 1), Tile(64, 128, 4, 1))
WIDE_HALF = {64: by_rows(64, 64, 4, 2), 512: by_rows(64, 32, 8)}
SMALL_HALF = {64: by_rows(64, 64, 4, 2), 256: by_rows(32, 32, 8), 512: by_rows(32, 16, 8)}

AMPERE_SINGLE = Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 16, 4, 2), Tile(64, 64, 4, 2))
HOPPER_SINGLE = Tiles(Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
BLACKWELL_SINGLE = Tiles(Tile(64, 128, 4, 1), Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))
WIDE_SINGLE = {64: by_rows(64, 32, 8), 256: by_rows(32, 16, 8), 512: by_rows(16, 16, 8)}
SMALL_SINGLE = {64: by_rows(64, 32, 8), 128: by_rows(32, 16, 8), 256: by_rows(16, 16, 8)}

AMPERE = Table({32: AMPERE_HALF, **WIDE_HALF}, {32: AMPERE_SINGLE, **WIDE_SINGLE})
SMALL = Table({32: AMPERE_HALF, **SMALL_HALF}, {32: AMPERE_SINGLE, **SMALL_SINGLE})
HOPPER = Table({32: HOPPER_HALF, **WIDE_HALF}, {32: HOPPER_SINGLE, **WIDE_SINGLE})
BLACKWELL = Table({32: BLACKWELL_HALF, **WIDE_HALF}, {32: BLACKWELL_SINGLE, **WIDE_SINGLE})
FAMILIES = {80: AMPERE, 86: SMALL, 90: HOPPER, 100: BLACKWELL, 120: SMALL}  # by lowest compute capability
SMALLEST = 16  # the least positions of a tile along either axis
INTERPRETER = Tiles(*[Tile(128, 128, 1, 1)] * 4)  # which wants few blocks
CANDIDATES = [
    Tile(rows, columns, warps, stages)
    for rows, columns in ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
    for warps in (4, 8)
    for stages in (1, 2, 3)
]
CANDIDATE_SPLITS = (1, 2, 4, 8)  # candidates above `plan.splits_for` are left out


class Processor(NamedTuple):
    """Compute capability of a GPU (90 for 9.0) and its number of multiprocessors: tiles and grids depend on them."""

    arch: int
    multiprocessors: int


def processor(tensor: Tensor) -> Processor:
    """The processor of the tensor's device. Both numbers are 0 for the interpreter."""
    return INTERPRETING if INTERPRETED.value else gpu(tensor.device)


INTERPRETING = Processor(0, 0)


@functools.cache
def gpu(device: torch.device) -> Processor:
    """The processor of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Processor(10 * properties.major + properties.minor, properties.multi_processor_count)


def tiles_for(arch: int, single: bool, channels: int) -> Tiles:
    """Tiles for maps of float32 (`single`) or of a half type, with so many padded channels at most."""
    if arch == 0:
        return INTERPRETER
    family = FAMILIES[max((least for least in FAMILIES if least <= arch), default=min(FAMILIES))]
    table = family.single if single else family.half
    return table[min((size for size in table if size >= channels), default=max(table))]
