"""torch's default device and dtype have no effect: the arguments determine those of the results."""

from __future__ import annotations

import pytest
import torch
from samples import DIFFERENTIABLE, SAMPLES, results, with_gradients

from corrmatch import RegionMasks, nn, ops, reference


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def test_default_device(backend, sample):
    """All results are on the device of the arguments."""
    call, arguments = SAMPLES[sample][1]((5, 6), device=backend.device, backend=backend.name)
    expected = results(call(*arguments))
    with torch.device("meta"):
        found = results(call(*arguments))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_dtype(backend, sample, other, default_dtype):
    """Results and gradients have the same bits."""
    call, arguments = SAMPLES[sample][1]((5, 6), device=backend.device, backend=backend.name)
    run = with_gradients if sample in DIFFERENTIABLE else lambda call, x: results(call(*x))
    expected = run(call, arguments)
    default_dtype(other)
    for a, b in zip(run(call, arguments), expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=str)
def test_a_number_as_threshold_is_not_rounded(other, default_dtype):
    """In bfloat16 0.7 would be 0.69921875."""
    default_dtype(other)
    confidence = torch.full((1, 4, 5), 0.6995, dtype=torch.float32)
    maps = [torch.randn(1, 3, 4, 5, dtype=torch.float32) for _ in range(3)]
    labels, flags = torch.zeros(1, 10, 100, dtype=torch.int64), torch.zeros(1, 10, 100, dtype=torch.bool)
    flags.view(-1)[:699] = True  # 69.9 % of the region
    masks = RegionMasks.from_bool(torch.ones(1, 1, 10, 100, dtype=torch.bool))
    for backend in ("cpu", "reference"):
        z = ops.pixel_propagate(*maps, confidence=confidence, threshold=0.7, backend=backend)
        assert not z.any()
        after = ops.region_propagate(labels, flags, masks, 0.7, num_classes=2, backend=backend)[1]
        assert torch.equal(after, flags)
    assert torch.equal(reference.region_propagate(labels, flags, masks, 0.7, num_classes=2)[1], flags)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_and_the_threshold(other, default_dtype):
    default_dtype(other)
    theta = nn.DynamicThreshold(0.85)
    assert theta.threshold.dtype == torch.float32
    assert theta.update(torch.tensor([0.9], dtype=torch.float32)).item() == pytest.approx(0.85005, abs=1e-7)
