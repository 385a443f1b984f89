"""Tile shapes: a table for each architecture family, by class of dtype and channels. Tuning is off by default.

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
    """Tile of a block, and how blocks run.

    Attributes:
        rows: Query positions.
        columns: Key positions.
        warps: Of a block.
        stages: Of its software pipeline.
        blocks: How many keep a multiprocessor busy. Registers and shared memory have room for so many.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    blocks: int = 2


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
HOPPER_HALF = Tiles(Tile(64, 128, 4, 3, 3), Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 3, 3), Tile(64, 64, 4, 3, 3))
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
SMALLEST = 16  # positions that a tile has at least, along either axis
INTERPRETER = Tiles(*[Tile(128, 128, 1, 1)] * 4)  # it takes its time by the block
CANDIDATES = [
    Tile(rows, columns, warps, stages)
    for rows, columns in ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
    for warps in (4, 8)
    for stages in (1, 2, 3)
]
CANDIDATE_SPLITS = (1, 2, 4, 8)  # those up to what `plan.splits_for` says


class Processor(NamedTuple):
    """What tiles and grids depend on: compute capability of a GPU, 90 for 9.0, and how many multiprocessors it has."""

    arch: int
    multiprocessors: int


def processor(tensor: Tensor) -> Processor:
    """That of the tensor's device; of the interpreter all is 0."""
    return INTERPRETING if INTERPRETED.value else gpu(tensor.device)


INTERPRETING = Processor(0, 0)


@functools.cache
def gpu(device: torch.device) -> Processor:
    """That of a device."""
    properties = torch.cuda.get_device_properties(device)
    return Processor(10 * properties.major + properties.minor, properties.multi_processor_count)


def tiles_for(arch: int, single: bool, channels: int) -> Tiles:
    """For maps of float32 (`single`) or of a half type with at most so many padded channels."""
    if arch == 0:
        return INTERPRETER
    family = FAMILIES[max((least for least in FAMILIES if least <= arch), default=min(FAMILIES))]
    table = family.single if single else family.half
    return table[min((size for size in table if size >= channels), default=max(table))]
