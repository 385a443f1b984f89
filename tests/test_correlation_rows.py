"""Rows of the correlation map, with one implementation for all devices."""

from __future__ import annotations

import layouts
import pytest
import torch
from torch.autograd import gradcheck

from corrmatch import ops

DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def exact(query, key, index, scale=None):
    """Rows (B, K, N_k) in float64."""
    q, k = query.double().flatten(2), key.double().flatten(2)
    index = index.expand(query.shape[0], -1)
    q = torch.stack([image[:, rows] for image, rows in zip(q, index, strict=True)])
    return ((query.shape[1] ** -0.5 if scale is None else scale) * (q.mT @ k)).softmax(-1)


@DTYPE
@pytest.mark.parametrize("index", [(11,), (2, 11), (0,), (2, 0), (1,)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3, 40.0])
def test_rows(dtype, index, scale):
    query, key = torch.randn(2, 6, 5, 7).to(dtype), torch.randn(2, 6, 4, 9).to(dtype)
    index = torch.randint(35, index)
    rows = ops.correlation_rows(query, key, index, scale=scale)
    assert rows.shape == (2, index.shape[-1], 4, 9)
    assert rows.dtype == dtype
    limits = torch.finfo(dtype)
    if index.numel() == 0:
        return
    # A probability is off by as much as its score, and that by half a unit in the last place of each of its D terms.
    terms = (query.double().flatten(2).abs().mT @ key.double().flatten(2).abs()).max() * (scale or 6**-0.5)
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (4 + 6 * terms.item())
    torch.testing.assert_close(
        rows.double().flatten(2), exact(query, key, index, scale), rtol=limits.eps / 2 + accumulated, atol=limits.tiny
    )


def test_flat_maps_and_any_layout():
    query, key, index = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 4, 9), torch.randint(35, (2, 8))
    expected = ops.correlation_rows(query, key, index)
    torch.testing.assert_close(ops.correlation_rows(query.flatten(2), key.flatten(2), index), expected.flatten(2))
    torch.testing.assert_close(ops.correlation_rows(query.flatten(2), key, index), expected)
    for name, place in layouts.MAPS.items():
        placed = layouts.ANY.get(name, layouts.sliced)(index)
        torch.testing.assert_close(ops.correlation_rows(place(query), place(key), placed), expected)
    assert ops.correlation_rows(query[:0], key[:0], index[:0]).shape == (0, 8, 4, 9)


def test_gradient():
    """Gradients of rows that are sampled twice add up; rows that are not sampled have none."""
    query = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    for index in (torch.tensor([4, 0, 4]), torch.tensor([[4, 0, 4], [1, 1, 1]])):
        assert gradcheck(lambda q, k, i=index: ops.correlation_rows(q, k, i, scale=0.8), (query, key))
    rows = ops.correlation_rows(query, key, torch.tensor([4, 0, 4]))
    (gradient,) = torch.autograd.grad(rows.square().sum(), query)
    assert (gradient.flatten(2).abs().sum((0, 1)) > 0).tolist() == [True, False, False, False, True, False]


@DTYPE
def test_gradient_is_as_accurate_as_autograd(dtype):
    query, key = torch.randn(16, 6, 5, 7).to(dtype), torch.randn(16, 6, 4, 9).to(dtype)
    index, grad = torch.randint(35, (16, 12)), torch.randn(16, 12, 36).to(dtype)

    def gradients(function, convert):
        leaves = [convert(x).requires_grad_() for x in (query, key)]
        return torch.autograd.grad(function(*leaves), leaves, convert(grad))

    def composed(q, k):
        sampled = q.flatten(2).gather(2, index.unsqueeze(1).expand(-1, 6, -1))
        return (sampled.mT @ k.flatten(2) / 6**0.5).softmax(-1)

    actual = gradients(lambda q, k: ops.correlation_rows(q, k, index).flatten(2), lambda x: x.clone())
    peer = gradients(composed, lambda x: x.clone())
    oracle = gradients(lambda q, k: exact(q, k, index), lambda x: x.double())
    for a, p, o in zip(actual, peer, oracle, strict=True):
        assert a.dtype == dtype
        error, limit = (a.double() - o).norm(), 3 * (p.double() - o).norm()
        assert error <= limit or (dtype == torch.float64 and error < 1e-14 * o.norm())


@DTYPE
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_backward_under_autocast(dtype, autocast):
    """Gradients have the same bits under autocast, wherever forward and backward are called."""
    maps = [torch.randn(2, 6, 5, 7).to(dtype), torch.randn(2, 6, 4, 9).to(dtype)]
    index, grad = torch.randint(35, (2, 8)), torch.randn(2, 8, 4, 9).to(dtype)

    def gradients(forward, backward):
        leaves = [x.clone().requires_grad_() for x in maps]
        with torch.autocast("cpu", autocast, enabled=forward):
            rows = ops.correlation_rows(*leaves, index)
        with torch.autocast("cpu", autocast, enabled=backward):
            rows.backward(grad)
        return [x.grad for x in leaves]

    expected = gradients(False, False)
    for forward, backward in ((True, True), (True, False), (False, True)):
        for a, b in zip(gradients(forward, backward), expected, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)


def test_nan_stays_in_its_row():
    query, key = torch.randn(1, 6, 5, 7), torch.randn(1, 6, 4, 9)
    query[0, 2, 1, 1] = float("nan")
    rows = ops.correlation_rows(query, key, torch.tensor([7, 8, 9]))
    assert rows[0].flatten(1).isnan().all(1).tolist() == [False, True, False]
    assert not rows[0, [0, 2]].isnan().any()
