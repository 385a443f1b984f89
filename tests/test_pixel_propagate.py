"""Pixel propagation: results and gradients compared with the wide oracle, for all backends, dtypes and shapes."""

from __future__ import annotations

import layouts
import pytest
import torch
from accuracy import Propagated, assert_all_accurate, exact, plain

from corrmatch import ops

OP = "pixel_propagate"

# batch, D, C, query grid, key grid. Small maps have large batches, so that chance has little effect on the norm of an
# error. The sizes are near those of row blocks (24), tiles (4 to 32 columns) and groups of blocks (8 and more).
SHAPES = [
    (256, 1, 1, (1, 1), (1, 1)),
    (256, 1, 1, (1, 7), (1, 7)),
    (256, 2, 3, (3, 2), (1, 5)),
    (256, 2, 2, (1, 1), (5, 7)),
    (256, 2, 2, (5, 7), (1, 1)),
    (32, 3, 1, (1, 23), (1, 3)),
    (32, 3, 2, (2, 12), (2, 2)),
    (32, 7, 4, (5, 5), (11, 3)),
    (8, 5, 6, (1, 47), (4, 4)),
    (8, 6, 7, (6, 8), (1, 17)),
    (8, 12, 13, (7, 7), (31, 1)),
    (8, 13, 12, (3, 24), (8, 4)),
    (4, 19, 19, (11, 7), (11, 7)),
    (2, 21, 21, (9, 9), (9, 9)),
    (16, 150, 5, (5, 7), (5, 7)),
    (8, 5, 150, (5, 7), (5, 7)),
    (16, 256, 256, (5, 6), (5, 6)),
    (2, 6, 5, (13, 15), (13, 11)),
    (1, 6, 5, (17, 23), (17, 23)),
]


def maps(shape, dtype=torch.float32, size=1.5):
    """Query, key, value and the gradient of the result. Scores have the standard deviation size^2."""
    batch, depth, values, query_grid, key_grid = shape
    return (
        (torch.randn(batch, depth, *query_grid) * size).to(dtype),
        (torch.randn(batch, depth, *key_grid) * size).to(dtype),
        torch.randn(batch, values, *query_grid).to(dtype),
        torch.randn(batch, values, *key_grid).to(dtype),
    )


def propagate(backend, query, key, value, grad, **options) -> Propagated:
    query, key, value = (layouts.moved(x.detach(), backend.device).requires_grad_() for x in (query, key, value))
    z = ops.pixel_propagate(query, key, value, backend=backend.name, **options)
    assert z.dtype == value.dtype
    assert z.shape == (*value.shape[:2], *key.shape[2:])
    z.backward(layouts.moved(grad, backend.device))
    return Propagated(z.detach(), query.grad, key.grad, value.grad)


def check(backend, tensors, *, gate=None, options=None, **form):
    """Compares op and oracle. Both get `form`; the op gets `options`, the oracle `gate` with the same meaning."""
    actual = propagate(backend, *tensors, **(options or {}), **form)
    oracle, terms = exact(*tensors, gate=gate, **form)
    assert_all_accurate(actual, oracle, plain(*tensors, gate=gate, **form), terms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_the_plain_formulation(backend, dtype, shape):
    check(backend, maps(backend.fit(shape), dtype))


def test_image_of_the_published_size(backend):
    check(backend, maps((1, 21, 21, (41, 41), (41, 41))))


@pytest.mark.parametrize("logit", [26, 30, 90, 180, 1000])
def test_large_scores(backend, dtype, logit):
    tensors = maps(backend.fit((32, 16, 5, (5, 7), (6, 6))), dtype)
    largest = (tensors[0].double().flatten(2).mT @ tensors[1].double().flatten(2) / 4).abs().max()
    factor = (logit / largest).sqrt().item()
    query, key = ((x * factor).to(dtype) for x in tensors[:2])
    check(backend, (query, key, *tensors[2:]))


@pytest.mark.parametrize("scale", [0.0, 0.3, -2.0, 1])
def test_scale(backend, scale):
    check(backend, maps((4, 9, 5, (5, 7), (5, 7))), scale=scale)


def test_scores_of_one_sign(backend):
    """P sums to 1 even if all scores of a row are equal and far from 0."""
    query, key = torch.full((1, 1, 5, 5), 20.0), torch.full((1, 1, 3, 9), -60.0)
    value = torch.randn(1, 3, 5, 5)
    z = ops.pixel_propagate(*(x.to(backend.device) for x in (query, key, value)), backend=backend.name)
    expected = value.sum((2, 3), keepdim=True).expand_as(z) / 27
    torch.testing.assert_close(z.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_flat_maps(backend):
    tensors = [x.flatten(2) for x in maps((2, 6, 5, (5, 7), (4, 9)))]
    check(backend, tensors)
    flat = propagate(backend, *tensors)
    mapped = propagate(backend, *(x.unsqueeze(2) for x in tensors))
    for a, b in zip(flat, mapped, strict=True):
        assert torch.equal(a, b.squeeze(2))


@pytest.mark.parametrize("value_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_value_of_another_dtype(backend, dtype, value_dtype):
    if value_dtype not in backend.dtypes:
        value_dtype = torch.float32
    query, key, value, grad = maps((4, 9, 5, (5, 7), (6, 5)), dtype)
    value, grad = value.to(value_dtype), grad.to(value_dtype)
    actual = propagate(backend, query, key, value, grad)
    assert [x.dtype for x in actual] == [value_dtype, dtype, dtype, value_dtype]
    common = torch.promote_types(dtype, value_dtype)
    peer = plain(*(x.to(common) for x in (query, key, value, grad)))
    peer = Propagated(*(p.to(a.dtype) for p, a in zip(peer, actual, strict=True)))
    oracle, terms = exact(query, key, value, grad)
    assert_all_accurate(actual, oracle, peer, terms)


NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
GATES = {
    "half open": lambda confidence: confidence >= confidence.median(),
    "one open": lambda confidence: confidence >= confidence.amax((1, 2), keepdim=True),
    "all open": lambda confidence: confidence >= 0,
    "all closed": lambda confidence: confidence > 2,
}


@NORMALIZE
@pytest.mark.parametrize("gate_name", GATES)
@pytest.mark.parametrize("shape", [(64, 5, 4, (7, 9), (5, 11)), (32, 3, 2, (17, 13), (5, 6))], ids=str)
def test_given_confidence(backend, dtype, shape, gate_name, normalize):
    shape = backend.fit(shape)
    tensors = maps(shape, dtype)
    confidence = torch.rand(shape[0], *shape[3])
    gate = GATES[gate_name](confidence)
    confidence = torch.where(gate, 0.75, 0.25) + confidence / 8  # the same side of 0.6 in every dtype
    options = {"confidence": confidence.to(backend.device), "threshold": 0.6}
    check(backend, tensors, gate=gate, normalize=normalize, options=options)


@NORMALIZE
@pytest.mark.parametrize("classes", [1, 2, 19, 64])
def test_confidence_from_the_value(backend, dtype, classes, normalize):
    query, key, value, grad = maps((2, 5, classes, (7, 9), (5, 11)), dtype)
    value = (value * 3).to(dtype)
    confidence = value.double().softmax(1).amax(1)
    ordered = confidence.flatten().sort().values
    gap = ordered.diff()[ordered.numel() // 4 : -ordered.numel() // 4].argmax() + ordered.numel() // 4
    threshold = 0.5 if classes == 1 else ordered[gap : gap + 2].mean().item()  # in the widest gap of the middle
    gate = confidence >= threshold
    check(backend, (query, key, value, grad), gate=gate, normalize=normalize, options={"threshold": threshold})


def test_gate_opens_at_equality(backend):
    query, key, value, _ = maps((1, 3, 2, (1, 4), (1, 5)))
    confidence = torch.tensor([[[0.25, 0.5, 0.75, 0.5]]], device=backend.device)
    arguments = [x.to(backend.device) for x in (query, key, torch.ones_like(value))]
    for threshold in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        z = ops.pixel_propagate(*arguments, confidence=confidence, threshold=threshold, backend=backend.name)
        torch.testing.assert_close(z.sum((2, 3)).cpu(), torch.full((1, 2), 3.0))  # rows of P sum to 1


def test_threshold_as_a_tensor(backend):
    query, key, value, grad = maps((2, 5, 4, (7, 9), (5, 11)))
    number = propagate(backend, query, key, value, grad, threshold=0.55)
    for threshold in (torch.tensor(0.55), torch.tensor(0.55, requires_grad=True), torch.tensor(0.55).double()):
        tensor = propagate(backend, query, key, value, grad, threshold=threshold.to(backend.device))
        assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))
        assert threshold.grad is None


@NORMALIZE
@pytest.mark.parametrize("threshold", [float("nan"), 2.0])
def test_closed_gates_give_zero(backend, threshold, normalize):
    tensors = maps((2, 5, 4, (7, 9), (5, 11)))
    threshold = torch.tensor(threshold, device=backend.device)
    for x in propagate(backend, *tensors, threshold=threshold, normalize=normalize):
        assert torch.equal(x, torch.zeros_like(x))


@NORMALIZE
def test_empty_batch(backend, dtype, normalize):
    tensors = maps((0, 5, 4, (7, 9), (5, 11)), dtype)
    confidence = torch.rand(0, 7, 9, device=backend.device)
    for options in ({}, {"threshold": 0.5}, {"threshold": 0.5, "confidence": confidence}):
        for x, like in zip(
            propagate(backend, *tensors, normalize=normalize, **options), (*tensors[3:], *tensors), strict=False
        ):
            assert x.shape == like.shape


def test_scores_far_below_the_largest_count_for_nothing(backend, dtype):
    """P is 0 where the exponential is below the range of the accumulation dtype."""
    key = torch.tensor([0.0, -1000]).to(dtype).view(1, 1, 1, 2).to(backend.device)
    query = torch.ones_like(key[..., :1])
    z = ops.pixel_propagate(query, key, query, backend=backend.name)
    assert z.tolist() == [[[[1.0, 0.0]]]]


def test_ties_round_to_even(backend, dtype):
    """With a single key P is 1, and the sum of two values lies half-way between two numbers of the dtype.

    Triton's kernels add up pieces of float32 numbers, and tensor cores cut sums off. So both neighbours are right for
    them.
    """
    value = (2 / torch.finfo(dtype).eps + torch.arange(0, 16, 2)).to(dtype)
    value = torch.stack([value, torch.ones_like(value)], 1).view(8, 1, 1, 2).to(backend.device)
    feature = torch.zeros_like(value)
    z = ops.pixel_propagate(feature, feature[..., :1], value, backend=backend.name)
    exact = value.double().sum(3, keepdim=True)
    if backend.name == "triton" and dtype == torch.float32:
        assert ((z.double() - exact).abs() <= 1).all()  # half of the distance of two neighbours
    else:
        assert torch.equal(z, exact.to(dtype))


def test_mean_of_equal_values_is_that_value(backend):
    query, key, value, _ = (x.to(backend.device) for x in maps((2, 5, 4, (7, 9), (5, 11))))
    z = ops.pixel_propagate(query, key, torch.full_like(value, -2.5), normalize=True, backend=backend.name)
    torch.testing.assert_close(z, torch.full_like(z, -2.5))


def test_mean_of_the_most_channels(backend):
    """The mass needs an additional channel."""
    check(backend, maps((1, 256, 256, (3, 5), (4, 4))), normalize=True)


def test_rows_hand_out_all_of_their_value(backend):
    query, key, value, _ = (x.to(backend.device) for x in maps((2, 5, 4, (17, 9), (5, 11))))
    z = ops.pixel_propagate(query, key, value, backend=backend.name)
    torch.testing.assert_close(z.sum((2, 3)), value.sum((2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("score", [-5.5, 5.5])
def test_values_of_any_size(backend, score, size):
    """Sums of exponentials may be far from 1. Values that are divided by them must stay in range."""
    query, key = torch.ones(1, 21, 5, 5), torch.full((1, 21, 5, 5), score)
    value = torch.randn(1, 3, 5, 5) * size
    z = ops.pixel_propagate(*(x.to(backend.device) for x in (query, key, value)), backend=backend.name)
    expected = (value / size).sum((2, 3), keepdim=True).expand(1, 3, 5, 5) / 25
    torch.testing.assert_close(z.cpu() / size, expected, rtol=1e-5, atol=1e-6)
