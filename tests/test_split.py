"""Passes whose loops several blocks share: their results, the number of splits, and their memory."""

from __future__ import annotations

import json
import random

import accuracy
import pytest
import torch
from test_launch import BACKWARD, FORWARD, INTERPRETED, launches, stubbed

from corrmatch import ops
from corrmatch.kernels import plan
from corrmatch.kernels.configs import FAMILIES, HOPPER_HALF, SMALLEST, Tile, Tiles
from corrmatch.kernels.plan import Pass, splits_for
from corrmatch.kernels.split import Scratch

__all__ = ["launches"]  # a fixture
pytestmark = pytest.mark.slow  # the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile(64, 64, 4, 1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def split(monkeypatch):
    """Sets the number of splits of all following passes, and small tiles."""

    def into(splits):
        monkeypatch.setattr(plan, "splits_for", lambda *_: splits)
        monkeypatch.setattr(plan, "tiles_for", lambda *_: Tiles(*[TILE] * 4))
        plan._plan.cache_clear()

    yield into
    plan._plan.cache_clear()


def problem(dtype):
    """Maps of two images with 5 tiles of rows and 4 of columns, both ragged, and the gradient of the result."""
    maps = [torch.randn(2, c, *size).to(dtype) for c, size in ((21, (17, 16)), (21, (14, 15)), (17, (17, 16)))]
    return maps, torch.randn(2, 17, 14, 15).to(dtype)


def propagate(maps, grad, gate=None, normalize=False):
    options = {} if gate is None else {"confidence": gate.float().to(DEVICE), "threshold": 0.5}
    leaves = [x.to(DEVICE).requires_grad_() for x in maps]
    out = ops.pixel_propagate(*leaves, normalize=normalize, backend="triton", **options)
    return accuracy.Propagated(out, *torch.autograd.grad(out, leaves, grad.to(DEVICE)))


@pytest.mark.parametrize("splits", [2, 3, 8])  # of 4 tiles: 2 + 2, 2 + 2 + 0 and one each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["all rows", "gate"])
def test_equal_to_the_oracle(split, splits, dtype, gated):
    maps, grad = problem(dtype)
    options = {"gate": torch.rand(2, 17, 16) < 0.4, "normalize": True} if gated else {}
    split(splits)
    exact, terms = accuracy.exact(*maps, grad, **options)
    accuracy.assert_all_accurate(propagate(maps, grad, **options), exact, accuracy.plain(*maps, grad, **options), terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_that_closes_all_rows_of_an_image(split, dtype):
    maps, grad = problem(dtype)
    gate = torch.rand(2, 17, 16) < 0.4
    gate[0] = False
    split(3)
    found = propagate(maps, grad, gate)
    for x in found:
        assert (x[0] == 0).all()
        assert (x[1] != 0).any()


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_whatever_order_the_parts_end(split, dtype, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    place = InterpreterBuilder.set_grid_idx
    maps, grad = problem(dtype)
    maps, grad = [x[:1].detach() for x in maps], grad[:1]
    split(3)
    first = propagate(maps, grad)
    for order in (lambda n: list(range(n))[::-1], lambda n: random.Random(n).sample(range(n), n)):
        monkeypatch.setattr(
            InterpreterBuilder,
            "set_grid_idx",
            lambda self, x, y, z, order=order: place(self, order(self.grid_dim[0])[x], y, z),
        )
        for a, b in zip(first, propagate(maps, grad), strict=True):
            assert torch.equal(a, b)


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_launches_each_way(split, launches, dtype):
    maps, grad = problem(dtype)
    split(4)
    propagate(maps, grad)
    assert launches == FORWARD + BACKWARD


def test_wide_scores_stay_finite(split):
    """The largest scores of the parts of a row are very different."""
    maps, grad = problem(torch.float32)
    maps[1][..., 7:, :] *= 60
    split(3)
    exact, terms = accuracy.exact(*maps, grad)
    accuracy.assert_all_accurate(propagate(maps, grad), exact, accuracy.plain(*maps, grad), terms)


@pytest.mark.parametrize(
    ("blocks", "turns", "resident", "splits"),
    [
        (27, 27, 396, 7),  # 41 x 41, one image: 4 turns for 27
        (54, 27, 396, 7),
        (108, 27, 396, 3),
        (216, 27, 396, 1),  # 8 images
        (67, 67, 396, 5),  # 65 x 65
        (134, 67, 396, 2),
        (536, 67, 396, 1),
        (160, 160, 396, 2),  # 101 x 101
        (16, 16, 396, 4),  # 32 x 32: no fewer than 3 turns, evened out
        (9, 67, 396, 8),
        (3, 5, 396, 1),
        (1, 1000, 396, 8),
        (27, 27, 0, 1),  # the interpreter
    ],
)
def test_number_of_splits(blocks, turns, resident, splits):
    assert splits_for(blocks, turns, resident) == splits


def test_splits_fit_the_device_and_have_work():
    for blocks in (*range(1, 60), 131, 132, 133, 1000):
        for turns in range(1, 80):
            for resident in (0, 1, 264, 396):
                splits = splits_for(blocks, turns, resident)
                assert splits >= 1
                if splits > 1:
                    longest = -(-turns // splits)
                    assert blocks * splits <= resident
                    assert longest >= plan.LEAST_TURNS
                    assert (splits - 1) * longest < turns, "the last part has nothing to do"


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("positions", [25, 1024, 1681, 4225, 10201, 40000])
def test_scratch_is_no_larger_than_the_device(batch, positions):
    """For any size it has at most a tile for every block that the device holds at once."""
    for tile, axis in zip(HOPPER_HALF, ("ROWS", "COLUMNS") * 2, strict=True):
        over = Pass.of(132, tile, axis, positions, positions, batch, 64)
        scratch = Scratch.of(torch.device("cpu"), over)
        if over.splits == 1:
            assert scratch == (None, None)
            assert scratch.tiles == 0
            continue
        held, size = 132 * tile.blocks, tile.rows if axis == "ROWS" else tile.columns
        assert over.blocks <= held
        assert scratch.parts.numel() <= held * (size + plan.ALIGNMENT) * 64
        assert scratch.tiles >= over.blocks // over.splits


def test_no_tile_is_smaller_than_scratch_counts_on():
    for family in FAMILIES.values():
        for table in family:
            for tiles in table.values():
                assert min(min(tile.rows, tile.columns) for tile in tiles) >= SMALLEST


SIZES = """
asked = set()

def note(*, key, fn, **rest):  # compiles nothing
    asked.add((fn.name.split(".")[-1], str(key)))
    return True

triton.knobs.runtime.jit_cache_hook = note
from corrmatch.kernels import plan
chosen, splits_for = set(), plan.splits_for

def noted(*sizes):
    chosen.add(splits_for(*sizes))
    return splits_for(*sizes)

plan.splits_for = noted
for i in range(50):
    leaves = [torch.randn(1 + i % 5, 21, 9 + i, 40).bfloat16().requires_grad_() for _ in range(3)]
    z = ops.pixel_propagate(*leaves, backend="triton")
    torch.autograd.grad(z, leaves, torch.randn_like(z))
names = [name for name, _ in asked]
print(json.dumps([{name: names.count(name) for name in names}, sorted(chosen)]))
"""


def test_images_of_fifty_sizes_compile_with_and_without_splits():
    counts, chosen = json.loads(stubbed(SIZES))
    assert len(chosen) > 3
    assert 1 in chosen
    assert counts.keys() == {*FORWARD, *BACKWARD}
    assert max(counts.values()) <= 2
