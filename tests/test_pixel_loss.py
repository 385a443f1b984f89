"""Cross-entropy and divergence of enlarged logits, and their gradients, compared with plain PyTorch in float64."""

from __future__ import annotations

import layouts
import pytest
import torch
from pixel_losses import GRID, LARGE, assert_right, enlarge, inputs, run
from test_pseudo_label import SIZES as USUAL

from corrmatch import ops

OP = "pixel_loss"
SIZES = [*USUAL, ((2, 300), (3, 310))]  # several blocks of the Triton kernel in a row, also in the interpreter
BOTH = pytest.mark.parametrize("name", ["cross_entropy", "divergence"])


@BOTH
@pytest.mark.parametrize(("grid", "size"), SIZES, ids=str)
def test_is_as_accurate_as_the_plain_formulation(backend, dtype, name, grid, size):
    if backend.interpreted and size is not None:  # the interpreter takes a step for each pixel of a cell
        size = tuple(min(a, 3 * b) for a, b in zip(size, grid, strict=True))
    height, width = size or grid
    # A few large images are enough: the error is a norm over all pixels, and the oracle is slow.
    batch = 2 if backend.interpreted else 4 if height * width > 900 else 16
    made = inputs(name, dtype, grid, size, batch)
    assert_right(name, run(name, backend, *made), *made)


@BOTH
@pytest.mark.parametrize("classes", [1, 2, 3, 19, 150, 256])
@pytest.mark.parametrize("size", [None, LARGE])
def test_number_of_classes(backend, dtype, name, classes, size):
    made = inputs(name, dtype, GRID, size, batch=2, classes=classes)
    assert_right(name, run(name, backend, *made), *made)


@BOTH
@pytest.mark.parametrize("scale", [1e-3, 30.0, 2e3])  # float16 ends at 65504
def test_range_of_logits(backend, dtype, name, scale):
    logits, other, weight = inputs(name, dtype, GRID, LARGE)
    logits, other = (x * scale if x.is_floating_point() else x for x in (logits, other))
    assert_right(name, run(name, backend, logits, other, weight), logits, other, weight)


@BOTH
@pytest.mark.parametrize("size", [None, LARGE])
def test_pixels_without_weight_may_be_anything(backend, dtype, name, size):
    """An infinite logit affects the pixels around it. The label 255 is not a class."""
    logits, other, weight = inputs(name, dtype, GRID, size)
    weight = weight + 0.1
    bad = logits.clone()
    bad[1, 4, 3, 2] = float("inf")
    reached = ~enlarge(bad.double(), weight.shape[1:]).isfinite().all(1)
    weight[reached] = 0
    found = run(name, backend, bad, torch.where(reached, 255, other) if name == "cross_entropy" else other, weight)
    assert all(x.isfinite().all() for x in found)
    expected = run(name, backend, torch.where(bad.isinf(), 0, bad), other, weight)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert (found[0][reached] == 0).all()


@BOTH
@pytest.mark.parametrize("size", [None, LARGE])
def test_a_pixel_counts_unless_its_weight_is_0(backend, name, size):
    """A negative weight reverses the gradient. A weight of NaN gives NaN at its pixel."""
    logits, other, weight = inputs(name, torch.float32, GRID, size)
    against = torch.rand_like(weight) < 0.1
    terms, gradient = run(name, backend, logits, other, torch.where(against, -weight, weight))
    (for_it, up), (against_it, down) = (
        run(name, backend, logits, other, weight * which) for which in (~against, against)
    )
    assert torch.equal(terms, for_it - against_it)  # one of them is 0
    torch.testing.assert_close(gradient, up - down, rtol=1e-4, atol=1e-5)

    weight[1, 2, 3] = float("nan")
    moved = (layouts.moved(x, backend.device) for x in (logits, other, weight))
    loss, pixels = getattr(ops, name)(*moved, backend=backend.name)
    assert loss.isnan()
    assert pixels.cpu().isnan().nonzero().tolist() == [[1, 2, 3]]


@BOTH
def test_nothing_counts(backend, dtype, name):
    logits, other, weight = inputs(name, dtype, GRID, LARGE)
    for x in run(name, backend, torch.full_like(logits, float("nan")), other, torch.zeros_like(weight)):
        assert not x.any()


@BOTH
@pytest.mark.parametrize("size", [None, LARGE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_that_count_show_where_they_are(backend, dtype, name, bad, size):
    logits, other, weight = inputs(name, dtype, GRID, size)
    weight = weight + 0.1
    clean, clean_gradient = run(name, backend, logits, other, weight)
    logits[1, 4, 3, 2] = bad
    reached = ~enlarge(logits.double(), weight.shape[1:]).isfinite().all(1)
    pixels, gradient = run_with_nan(name, backend, logits, other, weight)
    assert torch.equal(pixels.isnan(), reached)
    assert torch.equal(pixels[~reached], clean[~reached])
    assert gradient[1, :, 3, 2].isnan().all()
    assert torch.equal(gradient[[0, 2]], clean_gradient[[0, 2]])
    if size is None:
        assert torch.equal(gradient.isnan().any(1), reached)


def run_with_nan(name, backend, logits, other, weight):
    leaf = logits.to(backend.device).requires_grad_()
    loss, pixels = getattr(ops, name)(leaf, *(x.to(backend.device) for x in (other, weight)), backend=backend.name)
    assert loss.isnan()
    return pixels.cpu(), torch.autograd.grad(loss, leaf)[0].cpu()


def test_classes_that_are_out_of_the_question(backend):
    """A logit of -inf gives a probability of 0, and 0 log 0 is 0."""
    logits, target, weight = inputs("divergence", torch.float32, GRID)
    target[:, 2] = -float("inf")
    pixels, gradient = run("divergence", backend, logits, target, weight)
    kept = [0, 1, *range(3, 21)]
    log_q = target[:, kept].double().log_softmax(1)
    expected = (log_q.exp() * (log_q - logits.double().log_softmax(1)[:, kept])).sum(1) * weight
    torch.testing.assert_close(pixels.double(), expected, rtol=1e-5, atol=1e-6)
    assert (gradient[:, 2][weight > 0] > 0).all()
    logits[:, 2] = -float("inf")
    pixels, gradient = run("divergence", backend, logits, target, weight)
    assert pixels.isfinite().all()
    assert not gradient[:, 2].any()


def test_certainty_costs_nothing(backend, dtype):
    logits = torch.zeros(1, 3, 4, 5, dtype=dtype)
    logits[:, 1] = 896  # in every dtype
    pixels, gradient = run("cross_entropy", backend, logits, torch.ones(1, 4, 5, dtype=torch.int64))
    assert not pixels.any()
    assert not gradient.any()
    pixels, gradient = run("cross_entropy", backend, logits, torch.full((1, 4, 5), 2))
    assert (pixels == 896).all()
    assert torch.equal(gradient[0, :, 0, 0], torch.tensor([0, 1, -1], dtype=dtype))


@BOTH
def test_without_weights_every_pixel_counts_once(backend, dtype, name):
    logits, other, weight = inputs(name, dtype, GRID)
    expected = run(name, backend, logits, other, torch.ones_like(weight))
    for a, b in zip(run(name, backend, logits, other), expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_below_the_range_of_half_types_survive_a_loss_scale(backend):
    """A mean over a million pixels has gradients of 1e-8 and less, below the range of float16."""
    logits, labels, _ = inputs("cross_entropy", torch.float16, GRID)
    gradients = []
    for weight, scale in ((1.0, 1.0), (2.0**-30, 2.0**30)):
        leaf = logits.to(backend.device).requires_grad_()
        loss, _ = ops.cross_entropy(
            leaf, labels.to(backend.device), torch.full(labels.shape, weight, device=backend.device),
            backend=backend.name,
        )  # fmt: skip
        gradients += torch.autograd.grad(scale * loss, leaf)
    if backend.name == "reference":  # autograd narrows nothing on the way either, but rounds elsewhere
        torch.testing.assert_close(*gradients)
    else:
        assert torch.equal(*gradients)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("floating", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_labels_and_weights(backend, integer, floating):
    logits, labels, weight = inputs("cross_entropy", torch.float32, GRID, LARGE)
    weight = weight.bfloat16().half()  # the same number in every dtype, except those below the range of float16
    expected = run("cross_entropy", backend, logits, labels, weight.float())
    found = run("cross_entropy", backend, logits, labels.to(integer), weight.to(floating))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("layout", layouts.MAPS)
@pytest.mark.parametrize("size", [None, LARGE])
def test_layouts(backend, name, layout, size):
    logits, other, weight = inputs(name, torch.float32, GRID, size, classes=6)
    expected = run(name, backend, logits, other, weight)
    place = layouts.MAPS[layout]
    flat = layouts.ANY.get(layout, layouts.sliced)
    placed = place(other) if name == "divergence" else flat(other)
    for a, b in zip(run(name, backend, place(logits), placed, flat(weight)), expected, strict=True):
        tolerance = 0 if backend.exact else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@BOTH
def test_expanded_maps(backend, name):
    logits, other, weight = inputs(name, torch.float32, GRID, LARGE)
    maps = [x[:1].expand(3, *x.shape[1:]) for x in (logits, other)]
    weight = weight[:, :, :1].expand_as(weight)
    expected = run(name, backend, *(x.contiguous() for x in (*maps, weight)))
    for a, b in zip(run(name, backend, *maps, weight), expected, strict=True):
        assert torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("size", [None, (7, 9)])
def test_gradcheck(backend, name, size):
    if torch.float64 not in backend.dtypes:
        pytest.skip("it does not take float64; another test compares its gradients with the plain formulation")
    logits, other, weight = inputs(name, torch.float64, (3, 4), size, batch=2, classes=4)
    f = lambda x: getattr(ops, name)(x, other, weight, backend=backend.name)[0]  # noqa: E731
    assert torch.autograd.gradcheck(f, logits.requires_grad_())


@BOTH
def test_second_derivatives(backend, name):
    logits, other, weight = inputs(name, torch.float32, (3, 4))
    logits, other, weight = (x.to(backend.device) for x in (logits, other, weight))
    loss, _ = getattr(ops, name)(logits.requires_grad_(), other, weight, backend=backend.name)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    if backend.name == "reference":
        assert torch.autograd.grad(gradient.square().sum(), logits)[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match=r"^pixel_loss has no second derivatives"):
        gradient.square().sum().backward()


@BOTH
def test_no_gradient_is_made_by_default(backend, name):
    logits, other, weight = (x.to(backend.device) for x in inputs(name, torch.float32, GRID, LARGE))
    wanted = getattr(ops, name)(logits.requires_grad_(), other, weight, backend=backend.name)
    with torch.no_grad():
        loss, pixels = getattr(ops, name)(logits, other, weight, backend=backend.name)
    assert not loss.requires_grad
    assert torch.equal(loss, wanted[0])
    assert torch.equal(pixels, wanted[1])
    if backend.name == "reference":
        return
    pair = (other, None) if name == "cross_entropy" else (None, other)
    _, _, gradient = torch.ops.corrmatch.pixel_loss(logits.detach(), *pair, weight, False, backend.name)
    assert gradient.numel() == 0


@BOTH
def test_empty_batch(backend, dtype, name):
    logits, other, weight = (x[:0] for x in inputs(name, dtype, GRID, LARGE))
    pixels, gradient = run(name, backend, logits, other, weight)
    assert pixels.shape == (0, *LARGE)
    assert gradient.shape == (0, 21, *GRID)


@pytest.mark.parametrize("label", [21, 255, -1])
def test_a_label_that_counts_and_is_no_class_is_refused(backend, label, monkeypatch):
    monkeypatch.setenv("CORRMATCH_CHECK", "1")  # on a GPU labels are not checked by default
    logits, labels, weight = (x.to(backend.device) for x in inputs("cross_entropy", torch.float32, GRID, LARGE))
    labels[1, 7, 11] = label
    weight[1, 7, 11] = 0
    ops.cross_entropy(logits, labels, weight, backend=backend.name)
    weight[1, 7, 11] = 0.5
    with pytest.raises(ValueError, match=rf"^labels: expected values in \[0, 20\] where .* not 0, got {label}$"):
        ops.cross_entropy(logits, labels, weight, backend=backend.name)
