"""Tile shapes of the Triton kernels: all compute the same results, and the tuner chooses one."""

from __future__ import annotations

from itertools import pairwise

import accuracy
import pytest
import torch
import triton

from corrmatch import ops
from corrmatch.kernels import configs, launch, plan
from corrmatch.kernels.configs import CANDIDATES, FAMILIES, Tile, Tiles
from corrmatch.kernels.pixel_propagate import column_kernel, row_kernel
from corrmatch.kernels.pixel_propagate_backward import backward_column_kernel, backward_row_kernel

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = [table for family in FAMILIES.values() for table in family]
SHIPPED = {config for table in TABLES for of_class in table.values() for config in of_class}


def propagate(dtype):
    """Results and gradients of a problem of several tiles with ragged edges, and the expected ones."""
    maps = [torch.randn(1, c, *size).to(dtype) for c, size in ((21, (11, 13)), (21, (14, 15)), (17, (11, 13)))]
    grad = torch.randn(1, 17, 14, 15).to(dtype)
    leaves = [x.to(DEVICE).requires_grad_() for x in maps]
    out = ops.pixel_propagate(*leaves, backend="triton")
    found = accuracy.Propagated(out, *torch.autograd.grad(out, leaves, grad.to(DEVICE)))
    exact, terms = accuracy.exact(*maps, grad)
    return found, exact, accuracy.plain(*maps, grad), terms


def distinct(configs):
    """The interpreter ignores warps and stages."""
    return sorted({c if DEVICE == "cuda" else c._replace(warps=1, stages=1) for c in configs})


@pytest.mark.parametrize("config", distinct({*SHIPPED, *CANDIDATES}), ids=lambda c: "x".join(map(str, c)))
def test_every_tile_shape_gives_the_same(monkeypatch, config):
    dtype = torch.bfloat16 if config.rows * config.columns >= 2048 else torch.float32
    monkeypatch.setattr(plan, "tiles_for", lambda *_: Tiles(*[config] * 4))
    plan._plan.cache_clear()
    accuracy.assert_all_accurate(*propagate(dtype))
    plan._plan.cache_clear()


def test_tuner_times_the_candidates_and_keeps_the_fastest(monkeypatch):
    """The tuner tries all splits that the plan allows, for each tile."""
    kernels = (row_kernel, column_kernel, backward_row_kernel, backward_column_kernel)
    candidates = [(tile, splits) for tile in CANDIDATES[-3:] for splits in (1, 2)]
    timed, best = [], candidates[3]

    def seconds(call, quantiles):
        call()
        timed.append(call)
        return [0.5 if len(timed) % len(candidates) == 4 else 1.0] * len(quantiles)

    launch.tuned.cache_clear()
    monkeypatch.setattr(launch, "CANDIDATES", CANDIDATES[-3:])
    monkeypatch.setattr(plan, "splits_for", lambda *_: 3)
    monkeypatch.setattr(triton.runtime.Autotuner, "do_bench", property(lambda self: seconds))
    monkeypatch.setattr(launch, "AUTOTUNE", True)
    for _ in range(2):  # the second call is already tuned
        accuracy.assert_all_accurate(*propagate(torch.bfloat16))
        assert len(timed) == len(kernels) * len(candidates)
    for kernel in kernels:
        chosen = launch.tuned(kernel, 3).best_config
        tile = Tile(chosen.kwargs["ROWS"], chosen.kwargs["COLUMNS"], chosen.num_warps, chosen.num_stages)
        assert (tile, chosen.kwargs["splits"]) == best
        assert chosen.kwargs["SPLIT"]
    launch.tuned.cache_clear()


def test_float32_products_are_as_exact_as_those_of_torch():
    """The setting is found through either interface of torch, which raise errors after use of the other."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x = torch.zeros(1, 3, 4, 4, device=DEVICE)

    def pieces():
        return plan.Plan.of(x, x, x, 1.0, False).pieces

    try:
        assert pieces() == 3
        matmul.fp32_precision = "tf32"
        assert pieces() == 2
        matmul.allow_tf32 = False
        assert pieces() == 3
        torch.set_float32_matmul_precision("high")
        assert pieces() == 2
        found, exact, _, terms = propagate(torch.float32)  # and the maps are packed as before
        for name in accuracy.Propagated._fields:
            error = accuracy.wide(getattr(found, name)) - getattr(exact, name)
            assert abs(error).max() < 2**-13 * abs(getattr(terms, name)).max()
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("arch", "family"), [(75, 80), (80, 80), (86, 86), (89, 86), (90, 90), (100, 100), (103, 100), (121, 120)]
)
def test_family_of_an_architecture(arch, family):
    for single, table in ((False, FAMILIES[family].half), (True, FAMILIES[family].single)):
        sizes = sorted(table)
        assert sizes[:2] == [32, 64]
        assert configs.tiles_for(arch, single, 16) == table[32]
        for size, larger in pairwise(sizes):
            assert configs.tiles_for(arch, single, size) == table[size]
            assert configs.tiles_for(arch, single, 2 * size) == table[larger]
        assert configs.tiles_for(arch, single, 2 * sizes[-1]) == table[sizes[-1]]  # sizes that `choose` refuses
