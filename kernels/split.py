"""Loops that several blocks share.

If an image has few tiles, most multiprocessors of a GPU would have no block. Then the loop of a pass is cut into parts,
and each part has a block of its own. Each part stores its sums in a buffer. The part that ends last adds up the parts
of its tile in the order of the loop. Which part is last changes from run to run; the sum does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrmatch.kernels.configs import SMALLEST
from corrmatch.kernels.plan import Pass, padded


class Scratch(NamedTuple):
    """Buffers of blocks that share a loop; None if no pass is split.

    Attributes:
        parts: Float32, the sums of each part. The passes use it one after another.
        arrived: Int32, for each tile the number of parts that have ended. The packing kernel and the last part of a
            tile set it to 0.
    """

    parts: Tensor | None
    arrived: Tensor | None

    @classmethod
    def of(cls, device: torch.device, *passes: Pass) -> Scratch:
        """The scratch of passes that run one after another."""
        split = [p for p in passes if p.splits > 1]
        if not split:
            return cls(None, None)
        parts = max(p.batch * p.splits * p.numbers * padded(p.owned) for p in split)
        tiles = max(p.batch * padded(p.owned) // SMALLEST for p in split)
        return cls(
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty(tiles, dtype=torch.int32, device=device),
        )

    @property
    def tiles(self) -> int:
        """The length of `arrived`."""
        return 0 if self.arrived is None else self.arrived.shape[0]


@triton.jit
def clear(arrived, tiles, BLOCK: tl.constexpr):
    """Sets `arrived` to 0 unless it is None. The programs of a kernel share the work."""
    if arrived is not None:
        for start in range(tl.program_id(0) * BLOCK, tiles, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(arrived + at, tl.zeros((BLOCK,), tl.int32), mask=at < tiles)


@triton.jit
def tile_of(positions, splits, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """The image of this program, the first position of its tile of SIZE, and the part of the loop that it runs."""
    tile, part = tl.program_id(0), 0
    if SPLIT:
        tile, part = tl.program_id(0) // splits, tl.program_id(0) % splits
    tiles = tl.cdiv(positions, SIZE)
    return (tile // tiles).to(tl.int64), tile % tiles * SIZE, part


@triton.jit
def share(positions, part, splits, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Start and end of a part's loop over positions in steps of SIZE. The last parts may have no turn."""
    if SPLIT:
        size = tl.cdiv(tl.cdiv(positions, SIZE), splits) * SIZE
        first = part * size
        return first, tl.maximum(first, tl.minimum(first + size, positions))
    else:
        return 0, positions


@triton.jit
def is_last(arrived, splits):
    """Whether all other parts of this tile have ended. If so, their sums can be read."""
    counter = arrived + tl.program_id(0) // splits
    tl.debug_barrier()  # all threads have to store before one of them counts
    last = tl.atomic_add(counter, 1) == splits - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_parts(x, parts, at, size, splits):
    """Adds up what the parts have stored at the offsets `at`, in order. Parts lie `size` apart; x is one of them."""
    total = tl.zeros_like(x)
    for part in range(splits):
        # The first-level cache is bypassed: it may hold old values of what other multiprocessors have written.
        total += tl.load(parts + part * size + at, cache_modifier=".cg")
    return total


@triton.jit
def sum_if_last(x, parts, at, size, part, arrived, splits):
    """Stores x, the sum of this part. Returns the sum of all parts and True in the last part, x and False in others.

    Arguments are those of `sum_of_parts` and `is_last`.
    """
    tl.store(parts + part * size + at, x)
    last = is_last(arrived, splits)
    if last:
        x = sum_of_parts(x, parts, at, size, splits)
    return x, last
