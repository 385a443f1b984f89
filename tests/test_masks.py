"""Packed masks."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import accelerate
import layouts
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from corrmatch import RegionMasks, ops

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


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_nothing(shape):
    masks = RegionMasks.from_bool(torch.zeros(shape, dtype=torch.bool))
    assert masks.packed.shape == (*shape[:2], RegionMasks.words(shape[2:]))
    assert masks == RegionMasks.from_bool(masks.to_bool())
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
    """The tensor counts as contiguous."""
    packed = torch.arange(9, dtype=torch.int32).view(1, 1, 9)[..., 3:6:3]
    assert packed.is_contiguous()
    masks = RegionMasks(packed, (1, 5))
    assert masks.to_bool().tolist() == [[[[True, True, False, False, False]]]]
    assert masks.area().tolist() == [[2]]


@pytest.mark.parametrize("size", [(9, 11), [9, 11], torch.Size([9, 11]), np.array([9, 11])], ids=repr)
def test_any_sequence_is_a_size(size):
    packed = RegionMasks.from_bool(torch.rand(1, 2, 9, 11) < 0.5).packed
    masks = RegionMasks(packed, size)
    assert (type(masks.size), *map(type, masks.size)) == (tuple, int, int)
    labels, flags = torch.zeros(1, 9, 11, dtype=torch.int64), torch.ones(1, 9, 11, dtype=torch.bool)
    assert torch.equal(ops.region_propagate(labels, flags, masks, 0.5, num_classes=2)[0], labels)


def test_equality():
    bools = torch.rand(2, 3, 4, 8) < 0.5
    masks, flipped = RegionMasks.from_bool(bools), bools.clone()
    flipped[1, 2, 3, 7] ^= True
    same = [copy.deepcopy(masks), RegionMasks(masks.packed.mT.contiguous().mT, [4, 8]), RegionMasks.from_bool(bools)]
    others = [
        RegionMasks.from_bool(flipped), RegionMasks(masks.packed, (8, 4)), RegionMasks.from_bool(bools[:1]),
        RegionMasks.from_bool(bools[:, :0]), masks.to("meta"), RegionMasks(masks.packed.long(), (4, 8)), masks.packed,
        None, "masks",
    ]  # fmt: skip
    for other in same:
        assert (masks == other) is True
        assert (masks != other) is False
        assert hash(masks) == hash(other)
    for other in others:
        assert (masks == other) is False or isinstance(other, torch.Tensor)
        assert (masks != other) is True or isinstance(other, torch.Tensor)
    assert masks in [None, others[0], same[0]]
    assert masks not in [None, *others[:4]]
    assert len({masks, *same, *others[:3]}) == 4
    without_data = masks.to("meta")
    assert without_data == without_data  # and nothing else: there are no bits
    assert without_data != masks.to("meta")


@pytest.mark.parametrize("weights_only", [True, False])
def test_save_and_load(weights_only):
    """Masks are saved alone, and as a part of a checkpoint."""
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    file = io.BytesIO()
    torch.save({"step": 3, "queue": [masks, (masks, None)]}, file)
    file.seek(0)
    found = torch.load(file, weights_only=weights_only)
    assert found == {"step": 3, "queue": [masks, (masks, None)]}
    assert found["queue"][0].size == (5, 7)
    file.seek(0)
    moved = torch.load(file, weights_only=weights_only, map_location="meta")
    assert moved["queue"][0].device.type == "meta"


def test_pickle():
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    copied = pickle.loads(pickle.dumps(masks))
    assert copied.size == masks.size
    assert torch.equal(copied.packed, masks.packed)


def test_moves():
    """Masks have the methods of a tensor that torch's data loader and trainers call."""
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    assert masks.device == torch.device("cpu")
    for moved in (masks.to("cpu", non_blocking=True), masks.to(torch.device("cpu")), masks.cpu()):
        assert moved == masks
        assert moved.packed.data_ptr() == masks.packed.data_ptr()
    assert masks.to("cpu", copy=True).packed.data_ptr() != masks.packed.data_ptr()
    assert not masks.is_pinned()
    with pytest.raises(TypeError):
        masks.to(torch.int64)  # they are bits


@pytest.mark.parametrize("call", ["pin_memory", "cuda"])
def test_moves_reach_the_tensor(call):
    """Methods that need a GPU are called too. Without a GPU torch raises its error."""
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    if torch.cuda.is_available():
        moved = getattr(masks, call)()
        assert isinstance(moved, RegionMasks)
        assert moved.is_pinned() == (call == "pin_memory")
        assert moved.cpu() == masks
    else:
        with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|accelerator|NVIDIA"):
            getattr(masks, call)()


def test_data_loader_moves_them(monkeypatch):
    """torch calls pin_memory() of all parts of a batch."""
    pinned = []
    monkeypatch.setattr(RegionMasks, "pin_memory", lambda masks: pinned.append(masks) or masks)
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    batch = torch.utils.data._utils.pin_memory.pin_memory({"masks": masks, "more": [masks]})
    assert batch == {"masks": masks, "more": [masks]}
    assert len(pinned) == 2
    assert accelerate.utils.send_to_device(batch, "meta", non_blocking=True)["masks"].device.type == "meta"


def test_tree():
    """The pytree has one leaf. Its size is a part of the structure, and a file keeps it."""
    masks = RegionMasks.from_bool(torch.rand(2, 3, 5, 7) < 0.5)
    (leaf,), structure = pytree.tree_flatten({"a": masks})
    assert leaf is masks.packed
    assert pytree.tree_unflatten([leaf], structure) == {"a": masks}
    ((path, _),), _ = pytree.tree_flatten_with_path({"a": masks})
    assert pytree.keystr(path) == "['a'].packed"
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    assert structure != pytree.tree_structure({"a": RegionMasks(masks.packed, (7, 5))})
    mapped = pytree.tree_map(lambda x: x.flip(0), [masks, (masks,)])
    assert mapped[0] == mapped[1][0] == RegionMasks.from_bool(masks.to_bool().flip(0))


class Regions(torch.nn.Module):
    """A module that takes masks and returns masks."""

    def forward(self, feature, masks, index):
        larger = (3 * feature.shape[2], 2 * feature.shape[3])
        return {"larger": ops.region_masks(feature, feature, index, larger), "area": masks.area(), "same": masks}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    """Exported through a file and called with other sizes. The sizes of its results follow."""
    masks, index = RegionMasks.from_bool(torch.rand(2, 3, 5, 6) < 0.5), torch.arange(4)
    features = [torch.randn(2, 8, 6, 7), torch.randn(3, 8, 5, 9) if dynamic else torch.randn(2, 8, 6, 7)]
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO) if dynamic else None
    arguments = (features[0], masks, index)
    program = torch.export.export(Regions(), arguments, dynamic_shapes=(sizes, [None], None))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for feature in features:
        found = loaded(feature, masks, index)
        assert found["larger"].size == (3 * feature.shape[2], 2 * feature.shape[3])
        expected = Regions()(feature, masks, index)
        assert found["larger"] == expected["larger"]
        assert found["same"] == masks
        assert torch.equal(found["area"], expected["area"])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    """Masks are inputs and outputs, and every method is called."""

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(feature, masks, index):
        out = Regions()(feature, masks, index)
        again = RegionMasks.from_bool(masks.to_bool()).to("cpu", non_blocking=True)
        return out, again, pytree.tree_map(lambda x: x + 0, masks)

    for size in ((5, 6), (4, 7)):
        masks, feature, index = (
            RegionMasks.from_bool(torch.rand(2, 3, *size) < 0.5),
            torch.randn(2, 8, *size),
            torch.arange(4),
        )
        out, *same = step(feature, masks, index)
        assert out["larger"] == Regions()(feature, masks, index)["larger"]
        assert same == [masks, masks]
        assert torch.equal(out["area"], masks.area())


def test_vmap():
    features = torch.randn(2, 1, 4, 5, 6)
    found = torch.vmap(lambda x: ops.region_masks(x, x, torch.arange(3), (9, 11)))(features)
    for i, feature in enumerate(features):
        assert torch.equal(found.packed[i], ops.region_masks(feature, feature, torch.arange(3), (9, 11)).packed)


def test_words_device_and_immutability():
    assert [RegionMasks.words(size) for size in ((1, 1), (4, 8), (3, 11), (321, 321))] == [1, 1, 2, 3221]
    masks = RegionMasks.from_bool(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    moved = masks.to("meta")
    assert moved.packed.device.type == "meta"
    assert moved.size == masks.size
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.size = (3, 2)
