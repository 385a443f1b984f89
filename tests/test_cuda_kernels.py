"""Properties of the CUDA kernels alone: schedules, clusters, memory, sanitizers. test_<op>.py compares results."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from child import FOLDER
from emulator import build
from samples import SAMPLES, results
from test_connected_components import patterns

from corrmatch import RegionMasks, ops, reference
from corrmatch.ops import cuda
from corrmatch.ops.borrowing import borrow

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = [name for name, (op, _) in SAMPLES.items() if op in ("region_masks", "region_propagate", "connected_components")]

emulated = pytest.mark.skipif(not cuda.EMULATED, reason="a GPU has no seed")


@pytest.fixture(autouse=True)
def seed_of_this_test():
    if cuda.EMULATED:
        build.seed(build.extension(), 0)


@emulated
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sample", OPS)
def test_any_schedule(sample, seed):
    call, arguments = SAMPLES[sample][1](backend="cuda")
    expected = results(call(*arguments))
    build.seed(build.extension(), 1 + seed)
    for a, b in zip(results(call(*arguments)), expected, strict=True):
        assert torch.equal(a, b)


@emulated
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("name", ["spiral", "comb up", "noise"])
def test_components_under_any_schedule(name, connectivity, seed):
    image = patterns(67).get(name, np.random.default_rng(seed).random((67, 67)) < 0.55)
    image = torch.as_tensor(image)
    build.seed(build.extension(), seed)
    found = ops.connected_components(image, connectivity=connectivity, backend="cuda")
    assert torch.equal(found, ops.connected_components(image, connectivity=connectivity, backend="cpu"))


def scene(size, masks, classes):
    """Coherent labels, so that some regions are accepted."""
    labels = (torch.arange(size[0])[:, None] // 40 + torch.arange(size[1]) // 40) % classes
    labels = torch.where(torch.rand(size) < 0.85, labels, torch.randint(classes, size))[None]
    regions = torch.zeros(1, masks, *size, dtype=torch.bool)
    for k, region in enumerate(regions[0]):  # most lie in one class; some overlap
        y, x = (40 * int(torch.randint(n // 40, ())) for n in size)
        region[y : y + 38, x : x + 35 + 5 * k] = True
    return labels, torch.rand(1, *size) < 0.9, RegionMasks.from_bool(regions)


# Maps of an image: 4 (3 + planes) bytes for 32 pixels. A block of an H100 has 227 KiB, a cluster here 8 blocks.
TEAMS = {"one block": ((321, 321), 21), "a cluster": ((560, 561), 130), "global memory": ((1150, 1151), 250)}


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize(("size", "classes"), TEAMS.values(), ids=TEAMS)
def test_region_propagation_wherever_the_maps_lie(size, classes, threshold):
    labels, reliable, masks = (x.to(DEVICE) for x in scene(size, 6, classes))
    found = ops.region_propagate(labels, reliable, masks, threshold, num_classes=classes, backend="cuda")
    expected = reference.region_propagate(labels, reliable, masks, threshold, num_classes=classes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], labels)


@emulated
@pytest.mark.parametrize("arch", [80, 89])
def test_region_ops_on_older_gpus(monkeypatch, arch):
    """Without clusters, and with less shared memory. Code for an older GPU on a newer one is not emulated."""
    monkeypatch.setenv("CORRMATCH_EMULATOR_ARCH", str(arch))
    test_region_propagation_wherever_the_maps_lie(*TEAMS["a cluster"], 0.3)
    query, key = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 205, 203)
    masks = ops.region_masks(query, key, torch.arange(3), (205, 203), connected="peak", backend="cuda")
    expected = reference.region_masks(query, key, torch.arange(3), (205, 203), connected="peak")
    assert (masks.to_bool() != expected.to_bool()).double().mean() < 1e-4


def drawn(image, mark, connectivity):
    """The region around a pixel of an image. The features are the image itself, with one channel."""
    key = torch.as_tensor(image, dtype=torch.float32, device=DEVICE)[None, None]
    index = torch.tensor([mark[0] * image.shape[1] + mark[1]], device=DEVICE)
    options = {"scale": 1.0, "connected": "seed", "connectivity": connectivity}
    query = torch.ones_like(key)
    found = ops.region_masks(query, key, index, image.shape, backend="cuda", **options)
    expected = reference.region_masks(query, key, index, image.shape, **options)
    assert torch.equal(found.packed, expected.packed)
    return found.to_bool()[0, 0].cpu().numpy()


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("name", sorted(patterns(9).keys() - {"background", "full"}))  # those have no region
@pytest.mark.parametrize("turned", [False, True])
def test_connected_region_of_any_shape(name, turned, connectivity):
    image = patterns(41)[name]
    if turned:
        image = image.T
    marks = np.argwhere(image)
    for mark in (marks[0], marks[len(marks) // 2]):
        assert drawn(np.ascontiguousarray(image), mark, connectivity)[tuple(mark)]


@emulated
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [7, 40, 1100])
def test_connected_region_of_one_row_under_any_schedule(width, seed):
    """A second sweep would not correct what the first one misses."""
    image = np.zeros((1, width), bool)
    image[0, : width - 2] = True
    build.seed(build.extension(), seed)
    assert drawn(image, (0, 0), 8).sum() == width - 2


@pytest.mark.parametrize("connectivity", [4, 8])
def test_connected_region_over_rows_of_many_words(connectivity):
    """Rows of more than 32 words, the lanes of a warp. Runs fill words, begin in them and end in them."""
    image = np.random.default_rng(0).random((9, 2300)) < 0.8
    image[4, 40:2250] = True
    image[0] = False
    assert drawn(image, (4, 1500), connectivity).sum() > 2000
    image[4, 1100], image[3:6, 1101:1103] = False, False
    assert drawn(image, (4, 1500), connectivity).sum() > 1000


@pytest.mark.parametrize("connected", [None, "peak", "seed"])
def test_rows_longer_than_shared_memory(connected):
    """Rows of more than 58,112 keys; with `connected`, also masks in bands of rows."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 3).to(DEVICE), torch.randn(1, 2, 245, 243).to(DEVICE)
    index = torch.tensor([0, 4, 8], device=DEVICE)
    found = ops.region_masks(query, key, index, (245, 243), connected=connected, threshold=0.4, backend="cuda")
    expected = reference.region_masks(query, key, index, (245, 243), connected=connected, threshold=0.4)
    assert (found.to_bool() != expected.to_bool()).double().mean() < 1e-4


def test_positions_out_of_range_give_empty_masks():
    """On a device values are not checked."""
    query = key = torch.randn(1, 3, 5, 6, device=DEVICE)
    index = torch.tensor([[-1, 30, 2**40, -(2**62), 7]], device=DEVICE)
    packed = torch.full((1, 5, 2), -1, dtype=torch.int32, device=DEVICE)
    rows = (borrow(query), borrow(key), borrow(index), 6, 7)
    scratch = functools.partial(cuda.EXTENSION.region_masks_scratch, *rows, 0)
    cuda.launch(cuda.EXTENSION.region_masks, query, scratch, *rows, 0.5, 0.5, 0, 8, borrow(packed))
    assert (packed[0, :4] == 0).all()
    assert (packed[0, 4] != 0).any()


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_labels_out_of_range_do_no_harm(threshold):
    labels = torch.randint(-(2**40), 2**40, (1, 9, 40), device=DEVICE)
    flags = torch.ones(1, 9, 40, dtype=torch.bool, device=DEVICE)
    masks = RegionMasks.from_bool(torch.ones(1, 3, 9, 40, dtype=torch.bool, device=DEVICE))
    out, after = torch.full_like(labels, -1), torch.zeros_like(flags)
    limit = torch.tensor(threshold, dtype=torch.float64, device=DEVICE)
    scratch = functools.partial(cuda.EXTENSION.region_propagate_scratch, borrow(labels), borrow(masks.packed), 21)
    arguments = (labels, flags, masks.packed, limit, None)
    lent = [borrow(x) for x in arguments]
    cuda.launch(cuda.EXTENSION.region_propagate, labels, scratch, *lent, 21, borrow(out), borrow(after))
    assert after.all()


def test_dtype_without_a_kernel_is_refused():
    query = torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=DEVICE)
    index, packed = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int32)
    rows = (borrow(query), borrow(query), borrow(index), 3, 3)
    with pytest.raises(ValueError, match=r"no CUDA kernel takes this dtype"):
        cuda.launch(cuda.EXTENSION.region_masks, query, lambda: 0, *rows, 0.5, 0.5, 0, 8, borrow(packed))


SANITIZED = {  # some of every kind
    "test_connected_components.py": "cuda and (bool or leading or larger or (spiral and 67) or (layouts and uint8))",
    "test_region_masks.py": "cuda and (index or peaks or corner or sliced or (without_a_region and float16 and nan))",
    "test_region_propagate.py": "cuda and (sizes or nothing or later or more_classes)",
    "test_cuda_kernels.py": "(schedule and 3) or (shape and zigzag and False) or range or (many_words and 8)",
}


@emulated
@pytest.mark.skipif("CORRMATCH_EMULATOR_SANITIZE" in os.environ, reason="this is the sanitized run")
@pytest.mark.parametrize("file", SANITIZED)
def test_sanitizers_find_nothing(file):
    """Runs with AddressSanitizer and UndefinedBehaviorSanitizer, in a separate process."""
    environment = {k: v for k, v in build.sanitized_environment().items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", file, "-k", SANITIZED[file]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert re.search(r"\d passed", done.stdout), done.stdout


def test_scratch_memory_is_measured_on_the_device_of_the_tensors(monkeypatch):
    """The size of scratch memory depends on the device, which may differ from the current one."""
    steps = []

    @contextlib.contextmanager
    def device(_):
        steps.append("enter")
        yield
        steps.append("leave")

    monkeypatch.setattr(torch.cuda, "device", device)
    cuda.launch(lambda *_: steps.append("launch"), torch.zeros(1), lambda: steps.append("measure") or 8)
    assert steps == ["enter", "measure", "launch", "leave"]
