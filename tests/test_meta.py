"""Tensors without data, on the meta device or fake: results have the shapes and dtypes of real ones."""

from __future__ import annotations

import pytest
import torch
from samples import DIFFERENTIABLE, SAMPLES, results, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from corrmatch import RegionMasks, nn, ops


def maps(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


Q, K, V = maps((2, 3, 4, 5), (2, 3, 6, 2), (2, 7, 4, 5))
INDEX, LABELS, FLAGS = torch.arange(4), torch.randint(4, (2, 5, 6)), torch.rand(2, 5, 6) < 0.5
MASKS = RegionMasks.from_bool(torch.rand(2, 3, 5, 6) < 0.5)


def propagated(masks, threshold, **options):
    return lambda labels, reliable, packed: ops.region_propagate(
        labels, reliable, RegionMasks(packed, masks.size), threshold, num_classes=4, **options
    )


def every_mask_method(packed):
    masks = RegionMasks(packed, MASKS.size)
    return masks.to_bool(), masks.area(), RegionMasks.from_bool(masks.to_bool()).packed


# Every op in the forms that its arguments may take: the call, and the tensors it is given.
FORMS = {
    "flat": (ops.pixel_propagate, [x.flatten(2) for x in (Q, K, V)]),
    "flat key": (ops.pixel_propagate, [Q, K.flatten(2), V]),
    "mixed dtypes": (ops.pixel_propagate, [Q.half(), K.double(), V.bfloat16()]),
    "empty batch": (ops.pixel_propagate, [x[:0] for x in (Q, K, V)]),
    "scale": (lambda *x: ops.pixel_propagate(*x, scale=2), [Q, K, V]),
    "threshold": (lambda *x: ops.pixel_propagate(*x, threshold=0.4), [Q, K, V]),
    "threshold of the CPU": (lambda *x: ops.pixel_propagate(*x, threshold=torch.tensor(0.4)), [Q, K, V]),
    "threshold tensor": (lambda q, k, v, t: ops.pixel_propagate(q, k, v, threshold=t), [Q, K, V, torch.tensor(0.4)]),
    "mass": (lambda *x: ops.pixel_propagate(*x, threshold=0.4, normalize=True), [Q, K, V]),
    "confidence": (lambda q, k, v, c: ops.pixel_propagate(q, k, v, confidence=c, threshold=1), [Q, K, V, V[:, 0]]),
    "reference": (lambda *x: ops.pixel_propagate(*x, backend="reference"), [Q, K, V]),
    "rows": (ops.correlation_rows, [Q, K, INDEX]),
    "flat rows": (ops.correlation_rows, [Q.flatten(2).half(), K.half(), INDEX.expand(2, -1)]),
    "no rows": (ops.correlation_rows, [Q, K, INDEX[:0]]),
    "masks": (lambda *x: ops.region_masks(*x, [9, 7]).packed, [Q, K, INDEX]),
    "seeds": (lambda *x: ops.region_masks(*x, (9, 7), connected="seed").packed, [Q, K, INDEX.expand(2, -1)]),
    "number": (propagated(MASKS, 0.5), [LABELS, FLAGS, MASKS.packed]),
    "tensor": (propagated(MASKS, torch.tensor(0.5)), [LABELS.to(torch.uint8), FLAGS, MASKS.packed]),
    "valid": (lambda *x: propagated(MASKS, 0, valid=x[1])(*x), [LABELS, FLAGS, MASKS.packed]),
    "image": (ops.connected_components, [LABELS[0]]),
    "stack of images": (lambda x: ops.connected_components(x, connectivity=4, background=2), [FLAGS.view(1, 2, 5, 6)]),
    "logits": (ops.pseudo_label, [V.half()]),
    "enlarged": (lambda x: ops.pseudo_label(x, size=torch.Size([9, 7])), [V.double()]),
    "ignore": (lambda x, ignore: ops.pseudo_label(x, size=(5, 6), ignore=ignore), [V, FLAGS]),
    "entropy": (ops.cross_entropy, [V, LABELS]),
    "weighted entropy": (ops.cross_entropy, [V.half(), LABELS, torch.rand(2, 5, 6)]),
    "divergence": (ops.divergence, [V.double(), V.flip(1)]),
    "weighted divergence": (ops.divergence, [V, V.flip(1), torch.rand(2, 5, 6)]),
    "mask methods": (every_mask_method, [MASKS.packed]),
}


def described(tensors):
    return [(x.shape, x.dtype) for x in tensors]


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_on_the_meta_device(monkeypatch, form, check):
    """CORRMATCH_CHECK has no effect, because there are no values."""
    monkeypatch.setenv("CORRMATCH_CHECK", check)
    call, tensors = FORMS[form]
    found = results(call(*(x.to("meta") for x in tensors)))
    assert {x.device.type for x in found} == {"meta"}
    assert described(found) == described(results(call(*tensors)))
    assert all(x.is_contiguous() for x in found)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_gradients(sample, mode):
    run = with_gradients if sample in DIFFERENTIABLE else lambda call, x: results(call(*x))
    make = SAMPLES[sample][1]
    expected = described(run(*make()))
    if mode == "meta":
        assert described(run(*make(device="meta"))) == expected
    else:
        with FakeTensorMode():
            assert described(run(*make())) == expected


@pytest.mark.parametrize("sample", SAMPLES)
def test_autocast_of_another_device_changes_nothing(sample):
    """The meta device has no autocast."""
    call, arguments = SAMPLES[sample][1](device="meta")
    expected = described(results(call(*arguments)))
    with torch.autocast("cpu", torch.bfloat16):
        assert described(results(call(*arguments))) == expected


def test_modules():
    head = nn.CorrelationHead(8, 4, hidden_channels=8).to("meta")
    theta = nn.DynamicThreshold().to("meta")
    feature, logits = torch.empty(2, 8, 5, 6, device="meta"), torch.empty(2, 4, 9, 11, device="meta")
    propagated, masks = head(feature, logits, num_masks=3)
    assert propagated.shape == (2, 4, 5, 6)
    assert masks.packed.shape == (2, 3, 4)
    labels, confidence, threshold = theta(logits)
    assert labels.shape == confidence.shape == (2, 9, 11)
    assert {x.device.type for x in (propagated, masks.packed, labels, confidence, threshold)} == {"meta"}
