"""Region propagation, compared with a loop over pixels."""

from __future__ import annotations

from collections import Counter

import layouts
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from corrmatch import RegionMasks, ops, reference

OP = "region_propagate"
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
THRESHOLDS = [0.0, 0.2, 1 / 3, 0.4999, 0.5, 0.6, 2 / 3, 0.95, 1.0, -0.5, 1.5]


def loop(labels, reliable, masks, threshold, valid=None):
    """The definition, pixel by pixel."""
    labels, after, threshold = labels.copy(), reliable.copy(), np.float32(threshold)
    for b, regions in enumerate(masks):
        for region in regions:
            members = [tuple(p) for p in np.argwhere(region) if valid is None or valid[b][tuple(p)]]
            counted = [p for p in members if reliable[b][p]]
            if not counted or np.float32(len(counted)) / np.float32(len(members)) < threshold:
                continue
            votes = Counter(int(labels[b][p]) for p in counted)
            dominant = min(votes, key=lambda c: (-votes[c], c))
            if np.float32(votes[dominant]) / np.float32(len(counted)) > threshold:
                for p in members:
                    labels[b][p] = dominant
                    after[b][p] = True
    return labels, after


def propagate(backend, labels, reliable, masks, threshold, *, num_classes, valid=None):
    """The op on arrays or tensors. Its results are arrays."""
    on_device = [torch.as_tensor(x).to(backend.device) for x in (labels, reliable, masks)]
    packed = RegionMasks.from_bool(on_device[2])
    valid = None if valid is None else torch.as_tensor(valid).to(backend.device)
    copies = [x.clone() for x in on_device]
    found, after = ops.region_propagate(
        *on_device[:2], packed, threshold, num_classes=num_classes, valid=valid, backend=backend.name
    )
    assert found.dtype == on_device[0].dtype
    assert after.dtype == torch.bool
    assert all(torch.equal(a, b) for a, b in zip(copies, on_device, strict=True)), "inputs stay"
    return found.cpu().numpy(), after.cpu().numpy()


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


def scene(size, count, classes, batch=2, dtype=torch.int64, coherent=0.7):
    """Labels in blocks with noise, and overlapping boxes as masks. Several of them are accepted."""
    height, width = size
    blocks = torch.randint(classes, (batch, 3, 3))
    rows, columns = torch.arange(height) * 3 // height, torch.arange(width) * 3 // width
    labels = blocks[:, rows][:, :, columns]
    labels = torch.where(torch.rand(labels.shape) < coherent, labels, torch.randint(classes, labels.shape))
    reliable = torch.rand(labels.shape) < 0.75
    masks = torch.zeros(batch, count, height, width, dtype=torch.bool)
    for b in range(batch):
        for k in range(count):
            y, x = torch.randint(height, (2,)).sort().values, torch.randint(width, (2,)).sort().values
            masks[b, k, y[0] : y[1] + 1, x[0] : x[1] + 1] = True
    masks &= torch.rand(masks.shape) < 0.9
    valid = torch.rand(labels.shape) < 0.9
    return labels.to(dtype), reliable, masks, valid


@st.composite
def small_scenes(draw):
    batch, count = draw(st.integers(1, 2)), draw(st.integers(0, 5))
    size = draw(st.sampled_from([(1, 1), (3, 5), (4, 8), (1, 33), (5, 13), (8, 8), (7, 13)]))
    classes = draw(st.integers(1, 5))
    shape = (batch, *size)
    labels = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, classes - 1), fill=st.just(0)))
    reliable = draw(arrays.arrays(bool, shape))
    masks = draw(arrays.arrays(bool, (batch, count, *size)))
    valid = draw(st.none() | arrays.arrays(bool, shape))
    return labels, reliable, masks, draw(st.sampled_from(THRESHOLDS)), classes, valid


@given(small_scenes())
def test_equals_the_loop(backend, example):
    labels, reliable, masks, threshold, classes, valid = example
    found = propagate(backend, labels, reliable, masks, threshold, num_classes=classes, valid=valid)
    assert_equal(found, loop(labels, reliable, masks, threshold, valid))


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("classes", [2, 21])
@pytest.mark.parametrize("size", [(9, 11), (16, 20), (21, 33)], ids=str)
def test_overlapping_masks(backend, size, classes, threshold):
    labels, reliable, masks, valid = (x.numpy() for x in scene(size, 24, classes))
    for v in (None, valid):
        found = propagate(backend, labels, reliable, masks, threshold, num_classes=classes, valid=v)
        expected = loop(labels, reliable, masks, threshold, v)
        assert_equal(found, expected)
        if 0 < threshold < 0.6:
            assert not np.array_equal(expected[0], labels), "a mask is accepted"


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 127, 128, 255, 256, 257, 1000, 65535, 65536])
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_number_of_classes(backend, classes, threshold):
    labels, reliable, masks, valid = scene((12, 17), 16, classes)
    labels[0, :6] = classes - 1
    labels[1, :3] = classes // 2
    arguments = [x.numpy() for x in (labels, reliable, masks)]
    found = propagate(backend, *arguments, threshold, num_classes=classes, valid=valid)
    expected = loop(*arguments, threshold, valid.numpy())
    assert_equal(found, expected)
    assert not np.array_equal(expected[1], arguments[1])


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_label_dtypes_and_what_does_not_count(backend, integer, threshold):
    """Labels of unreliable or invalid pixels may be any number and are unchanged."""
    labels, reliable, masks, valid = scene((13, 19), 16, 21, dtype=integer)
    labels[0, :7], masks[0, 0], masks[0, 0, :9] = 20, False, True  # one region at least is accepted
    strange = [torch.iinfo(integer).max, torch.iinfo(integer).min, 21, 100]
    for i, value in enumerate(strange):
        labels[(~(reliable & valid)) & (torch.arange(19) % 4 == i)] = value
    arguments = [x.numpy() for x in (labels, reliable, masks)]
    found = propagate(backend, *arguments, threshold, num_classes=21, valid=valid)
    expected = loop(*arguments, threshold, valid.numpy())
    assert_equal(found, expected)
    assert not np.array_equal(expected[0], arguments[0])


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_more_classes_than_the_dtype_holds(backend, integer):
    labels, reliable, masks, _ = scene((13, 19), 8, 100, dtype=integer)
    arguments = [x.numpy() for x in (labels, reliable, masks)]
    found = propagate(backend, *arguments, 0.4, num_classes=65536)
    assert_equal(found, loop(*arguments, 0.4))


@pytest.mark.parametrize("wrong", [-1, 21, 255, 2**15])
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_label_out_of_range_where_it_counts(backend, wrong, threshold, monkeypatch):
    monkeypatch.setenv("CORRMATCH_CHECK", "1")  # a GPU does not look unasked
    labels, reliable, masks, valid = scene((40, 60), 4, 21)
    reliable[1, 39, 58], valid[1, 39, 58] = True, True
    labels[1, 39, 58] = wrong
    for v in (None, valid):
        with pytest.raises(ValueError, match=rf"^labels: .*0, 20\].*got {wrong}$"):
            propagate(backend, labels, reliable, masks, threshold, num_classes=21, valid=v)
    valid[1, 39, 58] = False
    propagate(backend, labels, reliable, masks, threshold, num_classes=21, valid=valid)


@pytest.mark.parametrize("size", [(1, 1), (1, 31), (1, 32), (1, 33), (1, 63), (1, 64), (1, 65), (5, 13), (97, 101)])
def test_sizes_around_words(backend, size):
    for coherent in (1.0, 0.8):
        labels, reliable, masks, valid = scene(size, 12, 6, coherent=coherent)
        found = propagate(backend, labels, reliable, masks, 0.55, num_classes=6, valid=valid)
        expected = reference.region_propagate(
            labels, reliable, RegionMasks.from_bool(masks), 0.55, num_classes=6, valid=valid
        )
        assert_equal(found, [x.numpy() for x in expected])


def test_bits_behind_the_last_pixel_do_not_count(backend):
    labels, reliable, masks, valid = (x.to(backend.device) for x in scene((9, 13), 12, 6))
    clean = RegionMasks.from_bool(masks)
    packed = clean.packed.clone()
    packed[..., -1] |= -1 << (9 * 13 % 32)
    for v in (None, valid):
        found, expected = (
            ops.region_propagate(labels, reliable, m, 0.4, num_classes=6, valid=v, backend=backend.name)
            for m in (RegionMasks(packed, (9, 13)), clean)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.9])
def test_published_size(backend, threshold):
    labels, reliable, masks, valid = scene((161, 161), 64, 21, batch=3, coherent=0.9)
    found = propagate(backend, labels, reliable, masks, threshold, num_classes=21, valid=valid)
    expected = reference.region_propagate(
        labels, reliable, RegionMasks.from_bool(masks), threshold, num_classes=21, valid=valid
    )
    assert_equal(found, [x.numpy() for x in expected])


def strip(values):
    return torch.tensor([[values]])


def full(count, width):
    return torch.ones(1, count, 1, width, dtype=torch.bool)


@pytest.mark.parametrize("labels", [[3, 1, 1, 3, 0], [1, 3, 3, 1, 2], [6, 6, 5, 5, 7]])
def test_ties_go_to_the_lowest_class(backend, labels):
    everything = torch.ones(1, 1, 5, dtype=torch.bool)
    found, after = propagate(backend, strip(labels), everything, full(1, 5), 0.3, num_classes=8)
    assert (found == sorted(labels, key=lambda c: (-labels.count(c), c))[0]).all()
    assert after.all()


@pytest.mark.parametrize(
    ("reliable", "threshold", "accepted"),
    [
        (4, 0.4, True),
        (4, 0.41, False),
        (5, 0.5, True),
        (1, 0.1, True),
        (1, 0.10001, False),
        (0, 0, False),
        (0, -1, False),
    ],
)
def test_share_of_reliable_pixels_may_equal_the_threshold(backend, reliable, threshold, accepted):
    flags = torch.arange(10).view(1, 1, 10) < reliable
    labels = torch.where(flags, 2, 1)
    found, after = propagate(backend, labels, flags, full(1, 10), threshold, num_classes=3)
    assert (found == 2).all() == accepted
    assert after.all() == accepted


@pytest.mark.parametrize(("votes", "threshold", "accepted"), [(6, 0.6, False), (6, 0.59, True), (10, 1.0, False)])
def test_share_of_the_dominant_class_must_exceed_the_threshold(backend, votes, threshold, accepted):
    labels = torch.where(torch.arange(10) < votes, 2, torch.arange(10)).view(1, 1, 10)
    everything = torch.ones(1, 1, 10, dtype=torch.bool)
    found, _ = propagate(backend, labels, everything, full(1, 10), threshold, num_classes=10)
    assert np.array_equal(found, np.full((1, 1, 10), 2) if accepted else labels.numpy())


def test_later_masks_see_earlier_labels(backend):
    """The first mask changes the left 2 into 1, the majority of the second mask then; not so in the other order."""
    labels = strip([1, 1, 2, 0, 0])
    first = torch.tensor([[[1, 1, 1, 0, 0]], [[0, 1, 1, 1, 0]]]).bool().unsqueeze(0)
    everything = torch.ones(1, 1, 5, dtype=torch.bool)
    found, _ = propagate(backend, labels, everything, first, 0.5, num_classes=3)
    assert found.tolist() == [[[1, 1, 1, 1, 0]]]
    found, _ = propagate(backend, labels, everything, first.flip(1), 0.5, num_classes=3)
    assert found.tolist() == [[[1, 1, 1, 0, 0]]]


def test_reliability_in_the_tests_is_that_of_the_input(backend):
    """The first mask makes its pixels reliable only in the output. They do not count in the second mask."""
    labels, reliable = strip([1, 0, 0, 0, 2]), torch.tensor([[[True, False, False, False, False]]])
    masks = torch.tensor([[[1, 1, 1, 0, 0]], [[0, 1, 1, 1, 0]]]).bool().unsqueeze(0)
    found, after = propagate(backend, labels, reliable, masks, 0.3, num_classes=3)
    assert found.tolist() == [[[1, 1, 1, 0, 2]]]
    assert after.tolist() == [[[True, True, True, False, False]]]


def test_threshold_tensor_of_any_dtype(backend):
    labels, reliable, masks, valid = scene((21, 33), 24, 6)
    for value in (0.375, 0.625):
        number = propagate(backend, labels, reliable, masks, value, num_classes=6, valid=valid)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            threshold = torch.tensor(value, dtype=dtype, device=backend.device)
            assert_equal(propagate(backend, labels, reliable, masks, threshold, num_classes=6, valid=valid), number)


def test_threshold_of_nan_accepts_nothing(backend):
    labels, reliable, masks, _ = scene((21, 33), 24, 6)
    found = propagate(backend, labels, reliable, masks, torch.tensor(float("nan")), num_classes=6)
    assert_equal(found, (labels.numpy(), reliable.numpy()))


@pytest.mark.parametrize("empty", ["batch", "masks", "reliable", "valid"])
def test_nothing_to_do(backend, empty):
    labels, reliable, masks, valid = scene((21, 33), 24, 6)
    if empty == "batch":
        labels, reliable, masks, valid = (x[:0] for x in (labels, reliable, masks, valid))
    elif empty == "masks":
        masks = masks[:, :0]
    elif empty == "reliable":
        reliable = torch.zeros_like(reliable)
    else:
        valid = torch.zeros_like(valid)
    found = propagate(backend, labels, reliable, masks, 0.3, num_classes=6, valid=valid)
    assert_equal(found, (labels.numpy(), reliable.numpy()))


@pytest.mark.parametrize("layout", layouts.ANY)
@pytest.mark.parametrize("integer", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_layouts(backend, layout, integer):
    labels, reliable, masks, valid = (x.to(backend.device) for x in scene((21, 35), 24, 6, batch=3, dtype=integer))
    packed = RegionMasks.from_bool(masks)
    options = {"num_classes": 6, "backend": backend.name}
    expected = ops.region_propagate(labels, reliable, packed, 0.4, valid=valid, **options)
    place = layouts.ANY[layout]
    placed = RegionMasks(place(packed.packed), packed.size)
    found = ops.region_propagate(place(labels), place(reliable), placed, 0.4, valid=place(valid), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].is_contiguous()
    expanded = [x[:1].expand(3, *x.shape[1:]) for x in (labels, reliable, valid, packed.packed)]
    found = ops.region_propagate(
        *expanded[:2], RegionMasks(expanded[3], packed.size), 0.4, valid=expanded[2], **options
    )
    assert all(torch.equal(a, b[:1].expand_as(a)) for a, b in zip(found, expected, strict=True))
