"""Packed masks."""

from __future__ import annotations

import dataclasses
import pickle

import layouts
import numpy as np
import pytest
import torch

from corrmatch import RegionMasks

SIZES = [(1, 1), (1, 31), (1, 32), (1, 33), (4, 8), (5, 13), (8, 8), (9, 11), (33, 31)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_round_trip(size):
    bools = torch.rand(2, 3, *size) < 0.5
    masks = RegionMasks.from_bool(bools)
    assert masks.size == size
    assert masks.packed.dtype == torch.int32
    assert masks.packed.shape == (2, 3, -(-size[0] * size[1] // 32))
    assert torch.equal(masks.to_bool(), bools)
    bits = np.unpackbits(masks.packed.numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    assert np.array_equal(bits[..., : size[0] * size[1]], bools.flatten(2).numpy())
    assert not bits[..., size[0] * size[1] :].any()


@pytest.mark.parametrize("pixel", [0, 1, 7, 8, 30, 31, 32, 33, 63, 64, 98])
def test_position_of_a_bit(pixel):
    bools = torch.zeros(1, 1, 9, 11, dtype=torch.bool)
    bools[0, 0, pixel // 11, pixel % 11] = True
    words = RegionMasks.from_bool(bools).packed[0, 0].tolist()
    expected = [0, 0, 0, 0]
    expected[pixel // 32] = 1 << pixel % 32 if pixel % 32 < 31 else -(2**31)
    assert words == expected


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_area(size, density):
    bools = torch.rand(2, 3, *size) < density
    area = RegionMasks.from_bool(bools).area()
    assert area.dtype == torch.int64
    assert torch.equal(area, bools.sum((2, 3)))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_no_masks(shape):
    masks = RegionMasks.from_bool(torch.zeros(shape, dtype=torch.bool))
    assert masks.packed.shape == (*shape[:2], 1)
    assert masks.to_bool().shape == shape
    assert masks.area().shape == shape[:2]


@pytest.mark.parametrize("layout", layouts.ANY)
def test_layouts(layout):
    bools = torch.rand(2, 3, 9, 11) < 0.5
    masks = RegionMasks.from_bool(layouts.ANY[layout](bools))
    assert torch.equal(masks.to_bool(), bools)
    placed = RegionMasks(layouts.ANY[layout](masks.packed), masks.size)
    assert torch.equal(placed.to_bool(), bools)
    assert torch.equal(placed.area(), bools.sum((2, 3)))


def test_one_word_of_any_stride():
    """It counts as contiguous."""
    packed = torch.arange(9, dtype=torch.int32).view(1, 1, 9)[..., 3:6:3]
    assert packed.is_contiguous()
    masks = RegionMasks(packed, (1, 5))
    assert masks.to_bool().tolist() == [[[[True, True, False, False, False]]]]
    assert masks.area().tolist() == [[2]]


def test_pickle():
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    copied = pickle.loads(pickle.dumps(masks))
    assert copied.size == masks.size
    assert torch.equal(copied.packed, masks.packed)


def test_words_device_and_immutability():
    assert [RegionMasks.words(size) for size in ((1, 1), (4, 8), (3, 11), (321, 321))] == [1, 1, 2, 3221]
    masks = RegionMasks.from_bool(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    moved = masks.to("meta")
    assert moved.packed.device.type == "meta"
    assert moved.size == masks.size
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.size = (3, 2)
