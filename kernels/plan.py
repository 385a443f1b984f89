"""The plan of a problem: dtypes, padded sizes and tiles, from the shapes and dtypes of the inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrmatch.kernels.configs import Processor, Tile, Tiles, processor, tiles_for
from corrmatch.kernels.language import LOG2E

ALIGNMENT = 128  # positions; a multiple of every block size
MOST_NUMBERS = 2**31  # of a packed map of one image: kernels use offsets of 32 bits in it
MOST_SPLITS = 8  # adding up more parts would take as long as the turns they save
LEAST_TURNS = 3  # of the loop of a part: storing and adding up a part takes as long as two or three turns
SPARE = 3  # channels that hold a number in three pieces


def padded(positions: int) -> int:
    """The number of positions of a packed map."""
    return (positions + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def padded_channels(channels: int) -> int:
    """The number of channels of a packed map: a power of two, at least 16 for tensor cores."""
    size = 16
    while size < channels:  # of a symbolic number this needs only the range
        size *= 2
    return size


@functools.cache
def packed_form(query: torch.dtype, key: torch.dtype, value: torch.dtype, mass: bool) -> tuple[torch.dtype, int]:
    """The dtype of packed maps, and the number of pieces of a number in them.

    A float32 number is three pieces of bfloat16. Half types have one piece of their own dtype. An exception is float16
    with the mass, because gradients that are divided by the mass leave its range: two pieces of bfloat16 hold its 11
    bits.
    """
    dtype = torch.promote_types(torch.promote_types(query, key), value)
    if dtype == torch.float32:
        return torch.bfloat16, 3
    return (torch.bfloat16, 2) if dtype == torch.float16 and mass else (dtype, 1)


@dataclass(frozen=True)
class Plan:
    """The plan of one problem.

    Attributes:
        dtype: Dtype of the packed maps.
        kept: Pieces of a number in the packed maps.
        pieces: Pieces that products use: fewer than `kept` where torch may multiply float32 in tf32, which has 11 bits.
        depth: Channels of the packed query and key.
        channels: Channels of the packed value.
        query_factor: Multiplied with the query when it is packed.
        factor: Turns the product of packed query and key into an exponent of 2.
        exact: Whether the shift of a row is its largest score and V is divided by its sum; else the shift is the lse.
        folded: Whether spare channels of the query hold the shift; else the kernels subtract it.
        bias: P is stored multiplied by 2^bias, which keeps small entries out of float16's subnormal range.
        tiles: Tile shapes.
        multiprocessors: Multiprocessors of the device.
    """

    dtype: torch.dtype
    kept: int
    pieces: int
    depth: int
    channels: int
    query_factor: float
    factor: float
    exact: bool
    folded: bool
    bias: float
    tiles: Tiles
    multiprocessors: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, scale: float, mass: bool) -> Plan:
        """The plan for these inputs. With `mass` the value gets one more channel, of ones."""
        # allow_tf32 raises after a program has set fp32_precision. This attribute can always be read.
        rough = torch.backends.cuda.matmul.fp32_precision == "tf32"
        dtypes = (query.dtype, key.dtype, value.dtype)
        return _plan(dtypes, query.shape[1], value.shape[1], scale, mass, rough, processor(query))

    @classmethod
    def on(cls, arch: int, dtype: torch.dtype, channels: int) -> Plan:
        """The plan for so many channels of query and of value, of one dtype, on an architecture that may be absent."""
        return _plan((dtype,) * 3, channels, channels, channels**-0.5, False, False, Processor(arch, 0))

    @property
    def constants(self) -> dict[str, Any]:
        """Constant arguments of the kernels over packed maps, by name."""
        return {
            "KEPT": self.kept, "PIECES": self.pieces, "DEPTH": self.depth, "CHANNELS": self.channels,
            "EXACT": self.exact, "FOLDED": self.folded,
        }  # fmt: skip


def splits_for(blocks: int, turns: int, resident: int) -> int:
    """The number of blocks that share a loop of `turns` turns, where a pass has `blocks` such loops.

    `resident` blocks keep the device busy; more would compete for the same units and gain nothing. With 396 of them (3
    for each multiprocessor of an H100) and 27 turns the result is 7 for 27 blocks, 3 for 108 and 1 for 216.
    """
    splits = max(1, min(MOST_SPLITS, turns // LEAST_TURNS, resident // blocks))
    longest = -(-turns // splits)
    return -(-turns // longest)  # without parts that would have no turn


class Pass(NamedTuple):
    """One pass over the scores of a batch.

    Attributes:
        tile: The tile of a block.
        axis: The axis whose positions a block owns, "ROWS" or "COLUMNS".
        owned: Positions of an image along this axis.
        summed: Positions of an image along the other axis, over which a block loops.
        batch: Number of images.
        numbers: Numbers that a block sums up for each of its positions.
        splits: Number of blocks that share a loop.
    """

    tile: Tile
    axis: str
    owned: int
    summed: int
    batch: int
    numbers: int
    splits: int

    @classmethod
    def of(
        cls, multiprocessors: int, tile: Tile, axis: str, owned: int, summed: int, batch: int, numbers: int
    ) -> Pass:  # fmt: skip
        """A pass with as many splits as keep the device busy."""
        size, step = tile[:2] if axis == "ROWS" else (tile.columns, tile.rows)
        splits = splits_for(-(-owned // size) * batch, -(-summed // step), tile.blocks * multiprocessors)
        return cls(tile, axis, owned, summed, batch, numbers, splits)

    @property
    def blocks(self) -> int:
        """The number of blocks, with splits."""
        size = self.tile.rows if self.axis == "ROWS" else self.tile.columns
        return -(-self.owned // size) * self.batch * self.splits


@functools.lru_cache(maxsize=256)
def _plan(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], depth: int, values: int, scale: float, mass: bool,
    rough: bool, processor: Processor,
) -> Plan:  # fmt: skip
    dtype, kept = packed_form(*dtypes, mass)
    padded_depth, channels = padded_channels(depth), padded_channels(values + mass)
    exact = kept > 1
    # The scale is multiplied with a float32 query: each channel is rounded once, and the errors average out. A query of
    # a half type would lose digits, so there it is multiplied with the score.
    query_factor, factor = (scale * LOG2E, 1.0) if exact else (1.0, scale * LOG2E)
    # The folded shift is divided by the factor, and could exceed 65504, the largest float16 number.
    folded = padded_depth - depth >= SPARE and abs(factor) >= 2**-20 and dtype == torch.bfloat16 and not exact
    return Plan(
        dtype,
        kept,
        min(kept, 2) if rough else kept,
        padded_depth,
        channels,
        query_factor,
        factor,
        exact,
        folded,
        8.0 if dtype == torch.float16 else 0.0,
        tiles_for(processor.arch, exact, max(padded_depth, channels)),
        processor.multiprocessors,
    )


class Layout(NamedTuple):
    """Shapes of the tensors that the forward keeps for the backward. They depend on the inputs' shapes alone.

    Attributes:
        packed: (B, numbers) in `dtype`: query, key and value of an image behind one another, each (pieces, channels,
            padded positions).
        rows: (B, 2, padded N_q) float32, shift and sum; with the mean key behind them (B, 2 + D, padded N_q).
        dtype: Dtype of the packed maps.
    """

    packed: tuple[int, int]
    rows: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, mass: bool, mean: bool) -> Layout:
        """The layout for these inputs. Raises ValueError if an image is too large."""
        dtype, pieces = packed_form(query.dtype, key.dtype, value.dtype, mass)
        n_q, n_k = padded(query.shape[2] * query.shape[3]), padded(key.shape[2] * key.shape[3])
        # int: torch 2.11 cannot add a bool to a symbolic size.
        depth, channels = padded_channels(query.shape[1]), padded_channels(value.shape[1] + int(mass))
        for name, count, positions in (("query", depth, n_q), ("key", depth, n_k), ("value", channels, max(n_q, n_k))):
            if pieces * count * positions > MOST_NUMBERS:
                raise ValueError(
                    f"{name}: 'triton' takes images of at most 2^31 numbers, channels padded to a power of two and "
                    f"positions to a multiple of {ALIGNMENT}; got {pieces * count} x {positions}"
                )
        numbers = pieces * (depth * (n_q + n_k) + channels * n_q)
        rows = 2 + query.shape[1] if mean else 2
        return cls((query.shape[0], numbers), (query.shape[0], rows, n_q), dtype)
