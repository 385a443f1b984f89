"""Connected components compared with scipy, cc3d and a flood fill, including their numbers."""

from __future__ import annotations

import layouts
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from corrmatch import ops

OP = "connected_components"
CONNECTIVITY = pytest.mark.parametrize("connectivity", [4, 8])
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
STEPS = {4: [(0, 1), (0, -1), (1, 0), (-1, 0)]}
STEPS[8] = STEPS[4] + [(1, 1), (1, -1), (-1, 1), (-1, -1)]
# Sizes near words of 64 pixels and strips of 32 rows, which exist with several threads.
SIZES = [(1, 1), (2, 2), (1, 63), (1, 64), (1, 65), (1, 200), (200, 1), (31, 64), (33, 127), (64, 128), (97, 129)]


def components(backend, image, connectivity, **options):
    image = layouts.moved(torch.as_tensor(image), backend.device)
    found = ops.connected_components(image, connectivity=connectivity, backend=backend.name, **options)
    assert found.dtype == torch.int32
    assert found.shape == image.shape
    return found.cpu().numpy()


def by_scipy(image, connectivity):
    return ndimage.label(image, np.ones((3, 3)) if connectivity == 8 else None)[0]


def by_cc3d(image, connectivity):
    """Components of cc3d, renumbered in raster order."""
    cc3d = pytest.importorskip("cc3d")
    return by_order_of_appearance(cc3d.connected_components(image.astype(np.int32), connectivity=connectivity))


def by_order_of_appearance(numbers):
    seen = {0: 0}
    return np.array([seen.setdefault(n, len(seen)) for n in numbers.ravel().tolist()], np.int32).reshape(numbers.shape)


def by_flood_fill(image, connectivity, background=0):
    height, width = image.shape
    out, count = np.zeros(image.shape, np.int32), 0
    for start in np.ndindex(image.shape):
        if image[start] == background or out[start]:
            continue
        count += 1
        out[start], todo = count, [start]
        while todo:
            y, x = todo.pop()
            for dy, dx in STEPS[connectivity]:
                p = (y + dy, x + dx)
                if 0 <= p[0] < height and 0 <= p[1] < width and not out[p] and image[p] == image[y, x]:
                    out[p] = count
                    todo.append(p)
    return out


def images(values, largest=20):
    sides = st.tuples(st.integers(1, largest), st.integers(1, 100))
    return sides.flatmap(lambda size: arrays.arrays(np.uint8, size, elements=st.integers(0, values), fill=st.nothing()))


@CONNECTIVITY
@given(image=images(1))
def test_binary_images_as_scipy(backend, connectivity, image):
    assert np.array_equal(components(backend, image, connectivity), by_scipy(image, connectivity))


@CONNECTIVITY
@given(image=images(3, 12))
def test_label_images_as_a_flood_fill(backend, connectivity, image):
    assert np.array_equal(components(backend, image, connectivity), by_flood_fill(image, connectivity))


@CONNECTIVITY
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.4, 0.6, 0.95])
@pytest.mark.parametrize("threads", [1, 3])
def test_random_images(backend, connectivity, size, density, threads):
    torch.set_num_threads(threads)
    image = (torch.rand(size) < density).numpy()
    assert np.array_equal(components(backend, image, connectivity), by_scipy(image, connectivity))
    labels = torch.randint(1, 4, size).numpy() * image
    assert np.array_equal(components(backend, labels, connectivity), by_cc3d(labels, connectivity))


@CONNECTIVITY
@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16])
def test_noise_of_every_density(backend, connectivity, granularity):
    """Random images like those of YACCLAB: blocks of so many pixels, set with a probability of 0.1 to 0.9."""
    height, width = (49, 83) if backend.interpreted or backend.name == "reference" else (197, 331)
    for density in np.arange(0.1, 0.95, 0.1):
        blocks = torch.rand(-(-height // granularity), -(-width // granularity)) < density
        image = blocks.repeat_interleave(granularity, 0).repeat_interleave(granularity, 1)[:height, :width].numpy()
        assert np.array_equal(components(backend, image, connectivity), by_scipy(image, connectivity))


@CONNECTIVITY
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_larger_label_image(backend, connectivity, threads):
    torch.set_num_threads(threads)
    coarse = torch.randint(0, 5, (9, 11)).repeat_interleave(11, 0).repeat_interleave(12, 1)
    noisy = torch.where(torch.rand(coarse.shape) < 0.9, coarse, 0).numpy()
    assert np.array_equal(components(backend, noisy, connectivity), by_cc3d(noisy, connectivity))


def spiral(n):
    image = np.zeros((n, n), np.uint8)
    y = x = 0
    dy, dx = 0, 1
    image[0, 0] = 1
    while True:
        for _ in range(2):
            ny, nx, by, bx = y + dy, x + dx, y + 2 * dy, x + 2 * dx
            free = 0 <= ny < n and 0 <= nx < n and not (0 <= by < n and 0 <= bx < n and image[by, bx])
            if free and not image[ny, nx]:
                break
            dy, dx = dx, -dy
        else:
            return image
        y, x = y + dy, x + dx
        image[y, x] = 1


def comb(n, teeth_up):
    image = np.zeros((n, n), np.uint8)
    image[:, ::2] = 1
    image[-1 if teeth_up else 0] = 1
    return image


def patterns(n):
    y, x = np.indices((n, n))
    return {
        "background": np.zeros((n, n), np.uint8),
        "full": np.ones((n, n), np.uint8),
        "checkerboard": ((x + y) % 2).astype(np.uint8),
        "dots": ((x % 2 == 0) & (y % 2 == 0)).astype(np.uint8),
        "spiral": spiral(n),
        "comb up": comb(n, True),
        "comb down": comb(n, False),
        "zigzag": (abs(x % 8 - 4) == y % 5).astype(np.uint8),
        "diagonals": ((x - y) % 3 == 0).astype(np.uint8),
        "antidiagonals": ((x + y) % 3 == 0).astype(np.uint8),
        "rows": (y % 2).astype(np.uint8),
        "nested frames": (np.minimum.reduce([x, y, n - 1 - x, n - 1 - y]) % 2).astype(np.uint8),
        "vee": (abs(x - n // 2) == y).astype(np.uint8),
        "wedge": (abs(x - n // 2) == n - 1 - y).astype(np.uint8),
    }


@CONNECTIVITY
@pytest.mark.parametrize("n", [9, 64, 67, 130])
@pytest.mark.parametrize("name", patterns(9))
def test_patterns(backend, connectivity, n, name):
    if backend.name == "reference":
        n = min(n, 67)  # the reference takes a step for each pixel of the longest path
    image = patterns(n)[name]
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert np.array_equal(components(backend, image, connectivity), by_scipy(image, connectivity))


@CONNECTIVITY
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_dtypes(backend, connectivity, integer):
    """Values that agree in some of their bytes are different."""
    limits = torch.iinfo(integer)
    values = torch.tensor([0, 1, limits.max, limits.min, limits.max // 2 + 1, limits.max - 1, 3, 2], dtype=integer)
    image = values[torch.randint(8, (17, 90))]
    for background in (0, 1, limits.max, limits.min):
        found = components(backend, image, connectivity, background=background)
        assert np.array_equal(found, by_flood_fill(image.numpy(), connectivity, background))


@CONNECTIVITY
def test_bool(backend, connectivity):
    image = torch.rand(40, 70) < 0.5
    assert np.array_equal(components(backend, image, connectivity), by_scipy(image, connectivity))
    found = components(backend, image, connectivity, background=1)
    assert np.array_equal(found, by_scipy(~image, connectivity))


@pytest.mark.parametrize("integer", [torch.bool, *INTEGERS], ids=str)
@pytest.mark.parametrize("background", [-(2**63), -(2**31) - 1, -129, -1, 2, 256, 65536, 2**32, 2**63 - 1])
def test_background_that_does_not_occur(backend, integer, background):
    """A background outside of the dtype removes no pixel, even if it would wrap around to a value that occurs."""
    image = torch.randint(0, 2, (9, 70)).to(integer)
    found = components(backend, image, 8, background=background)
    assert np.array_equal(found, by_flood_fill(image.long().numpy(), 8, background))
    assert found.min() == 1


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)], ids=str)
def test_leading_dimensions(backend, lead):
    images = torch.randint(0, 3, (*lead, 33, 70), dtype=torch.uint8)
    found = components(backend, images, 8)
    for at in np.ndindex(*lead):
        assert np.array_equal(found[at], by_cc3d(images[at].numpy(), 8))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels(backend, size):
    assert components(backend, torch.zeros(2, *size, dtype=torch.uint8), 8).shape == (2, *size)


@pytest.mark.parametrize("layout", layouts.ANY)
@pytest.mark.parametrize("integer", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_layouts(backend, layout, integer):
    images = torch.randint(0, 2, (2, 3, 33, 70)).to(integer)
    placed = layouts.ANY[layout](images)
    assert np.array_equal(components(backend, placed, 8), components(backend, images, 8))
    expanded = images[:1, :1].expand(2, 3, 33, 70)
    assert np.array_equal(components(backend, expanded, 4), components(backend, expanded.contiguous(), 4))
    row = images[:, :, :1].expand(2, 3, 33, 70)
    assert np.array_equal(components(backend, row, 4), components(backend, row.contiguous(), 4))
