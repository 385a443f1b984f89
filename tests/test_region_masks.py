"""Region masks, compared with enlarged rows in float64."""

from __future__ import annotations

from fractions import Fraction

import layouts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from corrmatch import ops

OP = "region_masks"
CONNECTIVITY = pytest.mark.parametrize("connectivity", [4, 8])

# Key grid and image: two of the published kind, others, none, shrinking, degenerate ones. But for the first two no
# pixel lies half-way between grid points, where a peak next to entries of almost 0 is always at the threshold.
SIZES = [
    ((9, 9), (65, 65)),
    ((11, 7), (81, 49)),
    ((12, 10), (50, 38)),
    ((5, 4), (70, 56)),  # of a vision transformer: 14 pixels a patch are no whole ratio
    ((12, 10), (12, 10)),
    ((12, 10), (13, 11)),
    ((12, 10), (8, 6)),
    ((12, 10), (4, 40)),
    ((17, 70), (31, 140)),
    ((3, 130), (4, 131)),
    ((1, 9), (1, 34)),
    ((9, 1), (40, 1)),
    ((1, 1), (8, 8)),
    ((5, 5), (1, 1)),
    ((2, 2), (64, 32)),
    ((6, 5), (1, 30)),
    ((6, 5), (30, 1)),
]


def features(key_grid, batch=2, depth=6, query_grid=(6, 5), size=1.5):
    query, key = torch.randn(batch, depth, *query_grid) * size, torch.randn(batch, depth, *key_grid)
    return query, key


def masks(backend, query, key, index, size, **options):
    """The op's masks as an array. The packed form is checked."""
    found = ops.region_masks(
        *(layouts.moved(x, backend.device) for x in (query, key, index)), size, backend=backend.name, **options
    )
    count = index.shape[-1]
    assert found.size == size
    assert found.packed.dtype == torch.int32
    assert found.packed.shape == (query.shape[0], count, -(-size[0] * size[1] // 32))
    bits = np.unpackbits(found.packed.cpu().numpy().view(np.uint8), axis=-1, bitorder="little")
    assert not bits[..., size[0] * size[1] :].any(), "bits behind the last pixel"
    bits = bits[..., : size[0] * size[1]].reshape(query.shape[0], count, *size).astype(bool)
    assert np.array_equal(found.to_bool().cpu().numpy(), bits)
    return bits


def enlarged(query, key, index, size, scale=None):
    """Enlarged rows of the map, (B, K, H, W), in float64."""
    q, k = query.double().flatten(2), key.double().flatten(2)
    index = index.expand(query.shape[0], -1)
    q = torch.stack([image[:, rows] for image, rows in zip(q, index, strict=True)])
    p = ((query.shape[1] ** -0.5 if scale is None else scale) * (q.mT @ k)).softmax(-1)
    return F.interpolate(p.unflatten(2, key.shape[2:]), size=size, mode="bilinear", align_corners=True)


def normalized(large):
    low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
    return ((large - low) / (high - low)).numpy()


def assert_near_threshold(found, value, threshold=0.5):
    """Asserts that there are few differences, and only where the value is within rounding of the threshold.

    Values that equal the threshold up to rounding of float64 do not count. Half-way between the least and the largest
    entry of a map, for example, every pixel has such a value.
    """
    distance = abs(value - threshold)[found != (value > threshold)]
    assert (distance < 1e-5).all()
    assert (distance > 1e-13).sum() <= max(1, 1e-4 * value.size)


@pytest.mark.parametrize(("grid", "size"), SIZES, ids=str)
def test_masks(backend, dtype, grid, size):
    query, key = (x.to(dtype) for x in features(grid))
    index = torch.randint(30, (2, 19))
    found = masks(backend, query, key, index, size)
    value = normalized(enlarged(query, key, index, size))
    if grid == (1, 1) or size == (1, 1):
        assert not found.any()  # a constant map has no region
    else:
        assert found.any(axis=(2, 3)).all()
        assert_near_threshold(found, value)


@pytest.mark.parametrize("grid", [(41, 41), (65, 33)], ids=str)
def test_published_enlargement(backend, grid):
    query, key = features(grid, batch=1, depth=21)
    index, size = torch.randint(30, (24,)), (8 * grid[0] - 7, 8 * grid[1] - 7)
    assert_near_threshold(masks(backend, query, key, index, size), normalized(enlarged(query, key, index, size)))


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [None, 0.05, -1.5])
def test_threshold_and_scale(backend, threshold, scale):
    query, key = features((12, 10))
    index = torch.randint(30, (17,))
    found = masks(backend, query, key, index, (50, 38), threshold=threshold, scale=scale)
    value = normalized(enlarged(query, key, index, (50, 38), scale))
    if threshold == 0:  # strictly above the least: all but the pixels that hold it
        assert np.array_equal(found, value > 0)
    else:
        assert_near_threshold(found, value, threshold)


def test_threshold_that_nothing_exceeds(backend):
    query, key = features((9, 8))
    index = torch.arange(30)
    assert not masks(backend, query, key, index, (34, 30), threshold=1.0001).any()
    value = normalized(enlarged(query, key, index, (34, 30)))
    assert_near_threshold(masks(backend, query, key, index, (34, 30), threshold=1.0), value, 1.0)


def test_threshold_below_zero_takes_all(backend):
    assert masks(backend, *features((9, 8)), torch.arange(30), (34, 30), threshold=-0.25).all()


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (5,), (2, 0), (2, 1), (2, 7)], ids=str)
def test_index(backend, shape):
    query, key = features((9, 8))
    index = torch.randint(30, shape)
    found = masks(backend, query, key, index, (34, 30))
    every = masks(backend, query, key, torch.arange(30), (34, 30))
    for b, rows in enumerate(index.expand(2, -1)):
        assert np.array_equal(found[b], every[b][rows.numpy()])


def test_empty_batch(backend):
    assert masks(backend, *features((9, 8), batch=0), torch.arange(4), (34, 30)).shape == (0, 4, 34, 30)


def test_no_query_grid_in_common(backend):
    """Only the key's grid is enlarged. The query's grid may have another size."""
    query, key = features((9, 8), query_grid=(1, 30))
    index = torch.arange(30)
    tall = query.view(2, 6, 30, 1)
    assert np.array_equal(masks(backend, query, key, index, (34, 30)), masks(backend, tall, key, index, (34, 30)))


@pytest.mark.parametrize("bad", ["constant", "nan query", "nan key", "infinite"])
@pytest.mark.parametrize("connected", [None, "peak", "seed"])
def test_rows_without_a_region(backend, dtype, bad, connected):
    query, key = (x.to(dtype) for x in features((9, 8)))
    clean = masks(backend, query, key, torch.arange(30), (34, 30), connected=connected)
    hit = np.zeros((2, 30), bool)
    if bad == "constant":
        query[1, :, 2, 3] = 0
        hit[1, 13] = True
    elif bad == "nan query":
        query[1, 3, 2, 3] = float("nan")
        hit[1, 13] = True
    elif bad == "nan key":
        key[1, 3, 2, 3] = float("nan")
        hit[1] = True
    else:
        query[1, 3, 2, 3] = float("inf")  # scores of both infinities
        hit[1, 13] = True
    found = masks(backend, query, key, torch.arange(30), (34, 30), connected=connected)
    assert not found[hit].any()
    assert np.array_equal(found[~hit], clean[~hit])


@pytest.mark.parametrize(("offset", "size"), [(12.0, 1), (-12.0, 1), (0.0, 1e-3), (0.0, 60), (-100.0, 60)])
def test_rows_of_any_range(backend, offset, size):
    """An offset of all scores cancels. Rows may be almost constant, and their smallest entries may underflow."""
    query, key = (x.double() for x in features((9, 8), depth=2, size=size))
    query[:, 0] += query[:, 0].sign() * size / 2  # a row near 0 would vary less than the offset rounds
    query[:, 1], key[:, 1] = 1, offset
    index = torch.arange(30)
    if torch.float64 not in backend.dtypes or (size == 1 and offset != 0):
        query, key = query.float(), key.float()
    value = normalized(enlarged(query, key, index, (34, 30), 1.0))
    assert_near_threshold(masks(backend, query, key, index, (34, 30), scale=1.0), value)


@pytest.mark.parametrize("layout", layouts.MAPS)
def test_layouts(backend, layout):
    query, key = features((9, 8))
    index = torch.randint(30, (2, 9))
    expected = masks(backend, query, key, index, (34, 30))
    placed = [layouts.MAPS[layout](x) for x in (query, key)]
    index = layouts.ANY.get(layout, layouts.sliced)(index)
    # The rounding of a product may depend on the layout in plain PyTorch.
    different = masks(backend, *placed, index, (34, 30)) != expected
    assert not different.any() if backend.exact else different.mean() <= 1e-4


def components_of(image, connectivity):
    return ndimage.label(image, np.ones((3, 3)) if connectivity == 8 else None)[0]


@CONNECTIVITY
@pytest.mark.parametrize(("grid", "size"), [SIZES[i] for i in (0, 2, 3, 5, 7)], ids=str)
def test_connected_to_the_peak(backend, dtype, grid, size, connectivity):
    query, key = (x.to(dtype) for x in features(grid))
    index, options = torch.arange(30), {"threshold": 0.2}
    whole = masks(backend, query, key, index, size, **options)
    found = masks(backend, query, key, index, size, connected="peak", connectivity=connectivity, **options)
    value = normalized(enlarged(query, key, index, size))
    smaller = 0
    for b, k in np.ndindex(2, 30):
        parts = components_of(whole[b, k], connectivity)
        kept = np.unique(parts[found[b, k]])
        assert len(kept) == 1
        assert np.array_equal(found[b, k], parts == kept[0])
        assert value[b, k][found[b, k]].max() > 1 - 1e-5, "the component of the maximum"
        smaller += parts.max() > 1
    assert smaller > 0


@CONNECTIVITY
@pytest.mark.parametrize(("grid", "size"), [*(SIZES[i] for i in (0, 2, 3, 5, 7)), ((5, 7), (7, 10))], ids=str)
def test_connected_to_the_seed(backend, grid, size, connectivity):
    query, key = features(grid, query_grid=grid)
    index = torch.randperm(grid[0] * grid[1])[:24]
    count = len(index)
    key += query / 2  # so that many a seed lies in its own region
    whole = masks(backend, query, key, index, size, threshold=0.2)
    found = masks(backend, query, key, index, size, threshold=0.2, connected="seed", connectivity=connectivity)
    inside = 0
    for b, k in np.ndindex(2, count):
        y, x = seed_pixel(int(index[k]), grid, size)
        parts = components_of(whole[b, k], connectivity)
        assert np.array_equal(found[b, k], (parts == parts[y, x]) & (parts[y, x] > 0))
        inside += parts[y, x] > 0
    assert 0 < inside < 2 * count


def seed_pixel(position, grid, size):
    """The nearest pixel; halves are rounded up."""
    at = divmod(position, grid[1])
    steps = (Fraction(n - 1, max(g - 1, 1)) for n, g in zip(size, grid, strict=True))
    return [int(i * step + Fraction(1, 2)) for i, step in zip(at, steps, strict=True)]


@CONNECTIVITY
def test_first_of_equal_peaks(backend, connectivity):
    row = torch.tensor([[0.0, 0, 0, 4, 0], [0, 4, 0, 0, 0], [0, 0, 0, 0, 0], [4, 4, 0, 0, 4]])
    query, key = torch.ones(1, 1, 1, 1), row.view(1, 1, 4, 5)
    found = masks(backend, query, key, torch.tensor([0]), (4, 5), connected="peak", connectivity=connectivity)
    expected = np.zeros((4, 5), bool)
    expected[0, 3] = True
    assert np.array_equal(found[0, 0], expected)


def test_corner_contact_depends_on_connectivity(backend):
    row = torch.tensor([[0.0, 0, 0, 5, 0], [0, 0, 4, 0, 0], [0, 0, 0, 0, 0], [4, 4, 0, 0, 4]])
    query, key = torch.ones(1, 1, 4, 5), row.view(1, 1, 4, 5)
    for connected, index in (("peak", 0), ("seed", 7)):
        for connectivity, expected in ((8, [(0, 3), (1, 2)]), (4, [(0, 3)] if connected == "peak" else [(1, 2)])):
            found = masks(
                backend, query, key, torch.tensor([index]), (4, 5), scale=1.0, threshold=0.3, connected=connected,
                connectivity=connectivity,
            )  # fmt: skip
            assert [tuple(p) for p in np.argwhere(found[0, 0])] == expected
