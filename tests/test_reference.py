"""The oracle, compared with the formulas in wide arithmetic and with small cases by hand."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from accuracy import Propagated, assert_all_accurate, exact, plain
from torch.autograd import gradcheck, gradgradcheck

from corrmatch import RegionMasks, ops, reference

NAMES = sorted(ops.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_same_signature_as_the_op(name):
    of_op = inspect.signature(getattr(ops, name)).parameters
    of_reference = inspect.signature(getattr(reference, name)).parameters
    expected = {k: (p.kind, p.default) for k, p in of_op.items() if k != "backend"}
    assert {k: (p.kind, p.default) for k, p in of_reference.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_pixel_propagate(dtype, normalize):
    shapes = ((8, 6, 5, 7), (8, 6, 4, 9), (8, 3, 5, 7), (8, 3, 4, 9))
    query, key, value, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    z = reference.pixel_propagate(*leaves, normalize=normalize)
    actual = Propagated(z.detach(), *torch.autograd.grad(z, leaves, grad))
    oracle, terms = exact(query, key, value, grad, normalize=normalize)
    assert_all_accurate(actual, oracle, plain(query, key, value, grad, normalize=normalize), terms)


def test_pixel_propagate_by_hand():
    """Two equal keys share each row's value. A gate closes the second row."""
    query, key = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 2, 1)
    value = torch.tensor([[[[3.0, 5.0]]]])
    z = reference.pixel_propagate(query, key, value)
    assert z.tolist() == [[[[4.0], [4.0]]]]
    confidence = torch.tensor([[[0.9, 0.2]]])
    z = reference.pixel_propagate(query, key, value, confidence=confidence, threshold=0.5)
    assert z.tolist() == [[[[1.5], [1.5]]]]
    z = reference.pixel_propagate(query, key, value, confidence=confidence, threshold=0.5, normalize=True)
    assert z.tolist() == [[[[3.0], [3.0]]]]


def test_derivatives():
    leaves = [torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for options in ({}, {"normalize": True}, {"threshold": 0.6, "normalize": True}):
        assert gradcheck(partial(reference.pixel_propagate, **options), leaves)
    assert gradgradcheck(reference.pixel_propagate, leaves)


def test_correlation_rows():
    query, key = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 6, 2, dtype=torch.float64)
    index = torch.tensor([[7, 0, 7], [19, 3, 2]])
    rows = reference.correlation_rows(query, key, index, scale=0.7)
    for b in range(2):
        for k in range(3):
            y, x = divmod(int(index[b, k]), 5)
            scores = 0.7 * torch.einsum("d,dhw->hw", query[b, :, y, x], key[b])
            torch.testing.assert_close(rows[b, k], scores.exp() / scores.exp().sum())


def test_region_masks_by_hand():
    """Row 0, log 2, log 4 on the grid is 1, 2, 4 up to a factor; enlarged 1, 1.5, 2, 3, 4. 3 and 4 are above 2.5."""
    key = torch.tensor([1.0, 2, 4]).log().view(1, 1, 1, 3)
    masks = reference.region_masks(torch.ones(1, 1, 1, 1), key, torch.tensor([0]), (1, 5))
    assert masks.to_bool().flatten().tolist() == [False, False, False, True, True]
    masks = reference.region_masks(torch.ones(1, 1, 1, 1), key, torch.tensor([0]), (1, 5), threshold=0.3)
    assert masks.to_bool().flatten().tolist() == [False, False, True, True, True]


def test_region_propagate_by_hand():
    labels = torch.tensor([[[0, 1, 1, 2]]], dtype=torch.uint8)
    reliable = torch.tensor([[[True, True, True, False]]])
    masks = RegionMasks.from_bool(torch.ones(1, 1, 1, 4, dtype=torch.bool))
    found, after = reference.region_propagate(labels, reliable, masks, 0.5, num_classes=3)
    assert found.tolist() == [[[1, 1, 1, 1]]]
    assert found.dtype == torch.uint8
    assert after.all()
    found, after = reference.region_propagate(labels, reliable, masks, 0.7, num_classes=3)  # 2 of 3 is not enough
    assert torch.equal(found, labels)
    assert torch.equal(after, reliable)
    found, _ = reference.region_propagate(labels, reliable, masks, 0.5, num_classes=3, valid=labels > 0)
    assert found.tolist() == [[[0, 1, 1, 1]]]


def test_connected_components_by_hand():
    image = torch.tensor([[1, 0, 2, 2], [0, 1, 0, 2], [3, 3, 0, 0]])
    eight = reference.connected_components(image)
    assert eight.tolist() == [[1, 0, 2, 2], [0, 1, 0, 2], [3, 3, 0, 0]]
    four = reference.connected_components(image, connectivity=4)
    assert four.tolist() == [[1, 0, 2, 2], [0, 3, 0, 2], [4, 4, 0, 0]]
    zeros = reference.connected_components(image, connectivity=4, background=1)
    assert zeros.tolist() == [[0, 1, 2, 2], [3, 0, 4, 2], [5, 5, 4, 4]]


def test_pseudo_label_by_hand():
    logits = torch.tensor([1.0, 3, 1, 1]).log().view(1, 2, 1, 2)  # probabilities 1/2, 3/4 and 1/2, 1/4
    labels, confidence, peak = reference.pseudo_label(logits)
    assert labels.tolist() == [[[0, 0]]]
    torch.testing.assert_close(confidence, torch.tensor([[[0.5, 0.75]]]))
    torch.testing.assert_close(peak, torch.tensor([0.75, 0.0]))
    _, _, peak = reference.pseudo_label(logits, ignore=torch.tensor([[[False, True]]]))
    torch.testing.assert_close(peak, torch.tensor([0.5, 0.0]))
    _, confidence, _ = reference.pseudo_label(logits, size=(1, 3))
    torch.testing.assert_close(confidence[0, 0, 1], torch.tensor(3**0.5 / (3**0.5 + 1)))


@pytest.mark.parametrize("shape", [(0, 0, 17), (0, 5, 0), (0, 5, 7), (2, 0, 3)], ids=str)
def test_components_of_no_pixels(shape):
    assert reference.connected_components(torch.zeros(shape, dtype=torch.int32)).shape == shape
