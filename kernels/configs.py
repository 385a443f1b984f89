"""Tile shapes: one small table for each class of dtypes and channels. Nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

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


# By the larger of the padded channel counts: up to 32, up to 64, beyond. Chosen so that nothing spills up to 32
# channels on sm_80, sm_90 and sm_100 (see `inspect`); not yet timed on a GPU.
HALF = {
    32: Configs(Config(64, 128, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    64: Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    256: Configs(Config(64, 32, 8, 1), Config(32, 64, 8, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
}
SINGLE = {
    32: Configs(Config(64, 64, 4, 2), Config(32, 64, 4, 2), Config(64, 16, 4, 1), Config(32, 64, 4, 1)),
    64: Configs(Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
    256: Configs(Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1)),
}
INTERPRETER = Configs(*[Config(64, 64, 1, 1)] * 4)


def configs(dtype: torch.dtype, channels: int) -> Configs:
    """For maps of `dtype` with at most so many padded channels."""
    if INTERPRETED.value:
        return INTERPRETER
    table = SINGLE if dtype == torch.float32 else HALF
    return table[min((size for size in table if size >= channels), default=max(table))]  # 256 and the mass make 512
