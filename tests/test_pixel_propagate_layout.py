"""Pixel propagation: memory layouts, subsets of gradients, derivatives, and numbers that are not finite."""

from __future__ import annotations

import itertools

import layouts
import pytest
import torch
from test_pixel_propagate import maps, propagate
from torch.autograd import gradcheck, gradgradcheck

from corrmatch import ops

OP = "pixel_propagate"
SHAPE = (2, 5, 4, (7, 9), (9, 7))
NAN, INF = float("nan"), float("inf")


def assert_same(backend, actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if backend.exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", layouts.MAPS)
def test_layouts(backend, dtype, layout):
    tensors = maps(SHAPE, dtype)
    gate = {"confidence": torch.rand(2, 7, 9, device=backend.device), "threshold": 0.5}
    placed = [layouts.MAPS[layout](x) for x in tensors]
    assert layout == "unaligned" or not any(x.is_contiguous() for x in placed)
    for options in ({}, {"threshold": 0.4}, gate):
        expected = propagate(backend, *tensors, **options)
        if "confidence" in options:
            options = {**options, "confidence": layouts.ANY.get(layout, layouts.transposed)(options["confidence"])}
        # Leaves keep their layout, so the op gets it.
        actual = propagate(backend, *placed, **options)
        assert_same(backend, actual, expected)


def test_expanded_inputs(backend):
    query, key, value, grad = maps((1, 5, 1, (7, 9), (9, 7)))
    key, value, grad = key[:, :, :1, :1], value[:, :, :1], grad[..., :1]
    small = (query, key, value, grad)
    shapes = ((3, 5, 7, 9), (3, 5, 9, 7), (3, 4, 7, 9), (3, 4, 9, 7))
    expanded = [x.expand(shape) for x, shape in zip(small, shapes, strict=True)]
    expected = propagate(backend, *(x.contiguous() for x in expanded))
    assert_same(backend, propagate(backend, *expanded), expected)


def test_expanded_gradient(backend):
    """The gradient of a sum has stride 0 everywhere."""
    query, key, value, grad = maps(SHAPE)
    expected = propagate(backend, query, key, value, torch.ones_like(grad))
    leaves = [x.to(backend.device).requires_grad_() for x in (query, key, value)]
    ops.pixel_propagate(*leaves, backend=backend.name).sum().backward()
    assert_same(backend, [x.grad for x in leaves], expected[1:])


def test_negated_views(backend):
    """A lazy negation is resolved before a kernel sees the memory."""
    tensors = maps(SHAPE)
    tensors = [x.to(backend.device) for x in tensors[:3]]
    actual = ops.pixel_propagate(*(torch._neg_view(x) for x in tensors), backend=backend.name)
    expected = ops.pixel_propagate(*(-x for x in tensors), backend=backend.name)
    assert_same(backend, [actual], [expected])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
def test_only_some_gradients(backend, wanted, normalize):
    *inputs, grad = (x.to(backend.device) for x in maps(SHAPE))
    expected = propagate(backend, *inputs, grad, normalize=normalize)
    leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    z = ops.pixel_propagate(*leaves, normalize=normalize, backend=backend.name)
    assert z.requires_grad == any(wanted)
    if any(wanted):
        z.backward(grad)
    assert_same(backend, [z.detach()], expected[:1])
    for x, want, gradient in zip(leaves, wanted, expected[1:], strict=True):
        assert (x.grad is not None) == want
        if want:
            assert_same(backend, [x.grad], [gradient])


def test_gradients_accumulate_and_inputs_stay(backend):
    tensors = [x.to(backend.device) for x in maps(SHAPE)]
    copies = [x.clone() for x in tensors]
    leaves = [x.to(backend.device).requires_grad_() for x in tensors[:3]]
    for _ in range(2):
        ops.pixel_propagate(*leaves, backend=backend.name).backward(tensors[3].to(backend.device))
    once = propagate(backend, *tensors)
    for x, gradient in zip(leaves, once[1:], strict=True):
        torch.testing.assert_close(x.grad, 2 * gradient)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_one_tensor_in_three_roles(backend):
    x, _, _, grad = maps((2, 5, 5, (6, 6), (6, 6)))
    separate = propagate(backend, x, x.clone(), x.clone(), grad)
    leaf = x.to(backend.device).requires_grad_()
    ops.pixel_propagate(leaf, leaf, leaf, backend=backend.name).backward(grad.to(backend.device))
    torch.testing.assert_close(leaf.grad, separate.dquery + separate.dkey + separate.dvalue)


GATES = [
    {},
    {"threshold": 0.5},
    {"threshold": 0.5, "confidence": torch.tensor([[[0.9, 0.1], [0.5, 0.7], [0.2, 0.6]]] * 2)},
]


def leaves_and_function(backend, options):
    options = {k: v.to(backend.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    leaves = [x.to(backend.device).requires_grad_() for x in maps((2, 3, 2, (3, 2), (2, 5)), backend.dtypes[0])[:3]]
    return leaves, lambda *x: ops.pixel_propagate(*x, backend=backend.name, **options)


@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("options", GATES, ids=["plain", "thresholded", "confidence"])
def test_numerical_gradient(backend, options, normalize):
    if torch.float64 not in backend.dtypes:
        pytest.skip("float64 is for CPUs")
    leaves, function = leaves_and_function(backend, {**options, "normalize": normalize})
    # No confidence crosses the threshold under a small perturbation.
    assert not options or function(*leaves).abs().sum() > 0
    assert gradcheck(function, leaves)


def test_second_derivatives(backend):
    leaves, function = leaves_and_function(backend, {})
    if backend.name == "reference":
        assert gradgradcheck(function, leaves)
        return
    gradient = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient[0].sum().backward()
    for normalize in (False, True):
        gradient = torch.autograd.grad(
            ops.pixel_propagate(*leaves, normalize=normalize, backend=backend.name).sum(), leaves[0], create_graph=True
        )
        with pytest.raises(RuntimeError, match="no second derivatives"):
            gradient[0].sum().backward()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_value_reaches_its_channel(backend, dtype, bad):
    query, key, value, _ = (x.to(backend.device) for x in maps(SHAPE, dtype, size=0.5))
    clean = ops.pixel_propagate(query, key, value, backend=backend.name)
    value[1, 2, 3, 4] = bad
    z = ops.pixel_propagate(query, key, value, backend=backend.name)
    assert_same(backend, [z[:, [0, 1, 3]], z[0]], [clean[:, [0, 1, 3]], clean[0]])
    assert (z[1, 2].isnan() if bad != bad else z[1, 2] == bad).all()


@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["query", "key"])
def test_bad_feature_reaches_its_image(backend, dtype, where, bad, normalize):
    """A row with a NaN makes all results NaN. Infinite scores of both signs make a NaN."""
    query, key, value, _ = (x.to(backend.device) for x in maps(SHAPE, dtype))
    clean = ops.pixel_propagate(query, key, value, normalize=normalize, backend=backend.name)
    {"query": query, "key": key}[where][1, 2, 3, 4] = bad
    z = ops.pixel_propagate(query, key, value, normalize=normalize, backend=backend.name)
    assert z[1].isnan().all()
    assert_same(backend, [z[0]], [clean[0]])


@pytest.mark.parametrize("where", ["query", "value"])
def test_closed_gate_keeps_nan_out(backend, where):
    query, key, value, grad = maps(SHAPE)
    confidence = torch.rand(2, 7, 9) / 2 + 0.5
    confidence[1, 3, 4] = 0.1
    options = {"confidence": confidence.to(backend.device), "threshold": 0.3}
    clean = propagate(backend, query, key, value, grad, **options)
    {"query": query, "value": value}[where][1, :, 3, 4] = NAN
    actual = propagate(backend, query, key, value, grad, **options)
    assert_same(backend, [actual.z], [clean.z])


def test_confidence_of_nan_is_closed(backend):
    query, key, value, _ = (x.to(backend.device) for x in maps(SHAPE))
    value[:, 1, 2, 3] = NAN
    query[:] = 0
    opened = ops.pixel_propagate(query, key, value, threshold=0.0, normalize=True, backend=backend.name)
    value[:, :, 2, 3] = 0
    confidence = torch.ones(2, 7, 9, device=backend.device)
    confidence[:, 2, 3] = NAN
    closed = ops.pixel_propagate(
        query, key, value, threshold=0.0, confidence=confidence, normalize=True, backend=backend.name
    )
    assert_same(backend, [opened], [closed])
    assert not closed.isnan().any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", range(4), ids=["query", "key", "value", "grad"])
def test_gradients_of_bad_numbers_end(backend, dtype, where, bad):
    """Each gradient of the image with the bad number has NaN or infinity. Other images have neither."""
    tensors = maps(SHAPE, dtype)
    clean = propagate(backend, *tensors)
    tensors[where][1, 2, 3, 4] = bad
    actual = propagate(backend, *tensors)
    for x in actual[1:3]:
        assert not x[1].isfinite().all()
    assert_same(backend, [x[0] for x in actual], [x[0] for x in clean])
