"""Large problems: offsets beyond 2^31, grids beyond 65,535 blocks, maps of 65,536 positions."""

from __future__ import annotations

import pytest
import torch
from backends import targets
from child import run_python
from layouts import wide
from samples import SAMPLES, results
from support import OPS

from corrmatch import _C
from corrmatch.kernels import plan

pytestmark = pytest.mark.slow

BEYOND = 2**31
LAUNCHING = [support for support in OPS.values() if hasattr(support, "LAUNCHES")]


@pytest.fixture
def untouched_memory(monkeypatch):
    """A tensor whose memory is never written, so that it takes no memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def far(x, dim):
    """A copy whose last slice along `dim` lies more than 2^31 elements behind the first."""
    count, rest = x.shape[dim], x.select(dim, 0).contiguous()
    step = BEYOND // (count - 1) + x.numel()
    memory = torch.empty((count - 1) * step + x.numel(), dtype=x.dtype, device=x.device)
    strides = [*rest.stride()]
    strides.insert(dim, step)
    return memory.as_strided(x.shape, strides).copy_(x)


def small(x):
    """A tensor in a dtype of one or two bytes."""
    return x.half() if x.is_floating_point() and x.dim() > 0 else x


def test_strides_beyond_31_bits(backend, sample, untouched_memory):
    call, arguments = SAMPLES[sample][1](device=backend.device, backend=backend.name)
    if sample == "connected_components":
        arguments = [arguments[0].to(torch.uint8)]
    arguments = [small(x) for x in arguments]
    expected = results(call(*arguments))
    placed = 0
    for i, x in enumerate(arguments):
        for dim in range(x.dim()):
            if x.dtype.itemsize > 2 or x.dim() < 3 or x.shape[dim] < 2:
                continue
            others = [*arguments]
            others[i] = far(x, dim)
            for a, b in zip(results(call(*others)), expected, strict=True):
                tolerance = 0 if backend.exact else 1e-3
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            placed += 1
    assert placed >= 3


@pytest.fixture(params=_C.cpu.isas())
def selected_isa(request):
    before = _C.cpu.isa()
    _C.cpu.select_isa(request.param)
    yield
    _C.cpu.select_isa(before)


@pytest.mark.parametrize("sample", SAMPLES)
def test_images_of_801_by_401(sample, selected_isa, monkeypatch):
    """An odd size that is not square, with a grid of stride 8. The reference stores the map."""
    op, make = SAMPLES[sample]
    size = (801, 401) if op in ("region_propagate", "connected_components") else (101, 51)
    call, arguments = make(size)
    found = {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("CORRMATCH_BACKEND", backend)
        found[backend] = results(call(*arguments))
    for ours, expected in zip(found["cpu"], found["reference"], strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        elif op in ("region_masks", "pseudo_label"):  # rounding may decide on pixels at a threshold or a tie
            assert (ours != expected).float().mean() < 1e-4
        else:
            assert torch.equal(ours, expected)


LARGE_MAP = """
import sys, torch
from corrmatch import _C, ops

isa, height, width, channels = sys.argv[1], 256, 256, 4
_C.cpu.select_isa(isa)
torch.set_num_threads(1)
torch.manual_seed(0)
positions, kinds = height * width, 389

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

# Every key is one of a few, in any order: sums over 65,536 keys become sums over those, each so many times.
kind = torch.randint(kinds, (positions,))
distinct = torch.randn(channels, kinds)
query, value = torch.randn(1, channels, height, width), torch.randn(1, channels, height, width)
key = distinct[:, kind].view(1, channels, height, width)
before = status("VmRSS")
found = ops.pixel_propagate(query, key, value, threshold=0.3).flatten(2)[0].double()
grown = status("VmHWM") - before

scores = query[0].flatten(1).double().mT @ distinct.double() / channels**0.5
weights = scores.exp()
p = weights / (weights @ kind.bincount(minlength=kinds).double()).unsqueeze(1)
confidence = value[0].flatten(1).softmax(0).amax(0)
gate = (confidence >= 0.3).double()
expected = ((value[0].flatten(1).double() * gate) @ p)[:, kind]
print(grown, float((found - expected).norm() / expected.norm()), float((found - expected).abs().max()))
"""


@pytest.mark.parametrize("isa", _C.cpu.isas()[-1:])
def test_forward_of_65536_positions(isa):
    """All entries are compared in memory linear in the positions. The map would take 16 GiB."""
    grown, error, largest = map(float, run_python(LARGE_MAP, isa).split())
    assert grown < 64  # MiB
    assert error < 1e-5
    assert largest < 1e-3


class Grids:
    """Replaces a kernel and records the grids of its launches."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *arguments, **options: None


@pytest.mark.skipif(not targets("pseudo_label")[0].interpreted, reason="launches nothing")
def test_grids_of_large_batches(monkeypatch, untouched_memory):
    """A grid has at most 2^31 - 1 blocks along x and 65,535 along y and z. This test computes nothing."""
    grids = {}
    for support in LAUNCHING:
        for module, names in support.LAUNCHES.items():
            for name in names:
                grids[name] = Grids()
                monkeypatch.setattr(module, name, grids[name])
    batch = 70_000
    maps = [torch.zeros(1, 3, 3, 3, dtype=torch.bfloat16).expand(batch, 3, 3, 3).requires_grad_() for _ in range(3)]
    for support in LAUNCHING:
        support.large_batch(maps)
    for name, kernel in grids.items():
        assert kernel.seen, name
        for x, *others in kernel.seen:
            assert batch <= x < 2**31, name
            assert all(n <= 65_535 for n in others), name


TOO_LARGE = {name: call for support in OPS.values() for name, call in support.TOO_LARGE.items()}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_images_that_are_too_large(name):
    with pytest.raises(
        ValueError, match=rf"^{name}: expected an image of at most 2147482624 pixels, got 65536 x 32768"
    ):
        TOO_LARGE[name]()


def test_packed_images_that_are_too_large():
    """Kernels use 32 bits within an image. The largest size that fits is not refused."""
    query, value = (wide(1, channels, 2048, 2049, dtype=torch.float16) for channels in (3, 257))
    with pytest.raises(ValueError, match=r"^value: .*at most 2\^31 numbers.*got 512 x 4196352"):
        plan.Layout.of(query, query, value, False, False)
    assert 512 * plan.padded(2048 * 2048) == plan.MOST_NUMBERS
    plan.Layout.of(query[..., 1:], query[..., 1:], value[..., 1:], False, False)
