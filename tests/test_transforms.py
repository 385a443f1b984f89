"""The ops under opcheck, torch.compile and autocast."""

from __future__ import annotations

import layouts
import pytest
import torch
from backends import targets
from samples import DIFFERENTIABLE, SAMPLES, results, with_gradients
from support import OPS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import corrmatch
from corrmatch import ops

pytestmark = pytest.mark.slow

TRITON = corrmatch.backends()["triton"]

REGISTERED = torch.ops.corrmatch
F32, F64, F16 = torch.float32, torch.float64, torch.float16
SIZES = ((7, 11), (8, 9), (9, 7))  # no two of the first, words of masks included, are equal: a rule otherwise


def only(*samples):
    def mark(test):
        test.samples = samples
        return test

    return mark


def feature(*shape, dtype=F32, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def on(device, x):
    return layouts.moved(x.detach(), device).requires_grad_(x.requires_grad)


def opcheck_calls():
    """Registered op and arguments, without the backend."""
    return (call for support in OPS.values() for call in support.opcheck_calls())


def opcheck_others():
    """Registered ops without a backend, and arguments."""
    return [call for support in OPS.values() for call in support.opcheck_others()]


CALLS = [op.name().removeprefix("corrmatch::") for op, _ in opcheck_calls()]


def test_every_op_is_checked():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    registered = {name for library, name in names if library == "corrmatch"}
    assert registered == {*CALLS, *(op.name().removeprefix("corrmatch::") for op, _ in opcheck_others())}


@pytest.mark.parametrize("call", range(len(CALLS)), ids=lambda i: f"{i}-{CALLS[i]}")
def test_opcheck(call):
    """Every call on every backend that supports it."""
    op, arguments = list(opcheck_calls())[call]
    floating = {x.dtype for x in arguments[:4] if isinstance(x, torch.Tensor) and x.is_floating_point()}
    for target in targets(CALLS[call].removesuffix("_backward")):
        if not floating <= set(target.dtypes):
            continue
        if CALLS[call].startswith("pixel_") and target.name == "reference":
            continue  # that oracle is not an op of its own
        arguments = [on(target.device, x) if isinstance(x, torch.Tensor) else x for x in arguments]
        if CALLS[call] == "pixel_propagate_backward":
            _, *saved = REGISTERED.pixel_propagate(*arguments[1:4], None, None, 0.5, False, True, target.name)
            arguments[4:7] = [x.detach() for x in saved]
        assert set(opcheck(op, (*arguments, target.name)).values()) == {"SUCCESS"}, target


@pytest.mark.skipif(not TRITON.available, reason=str(TRITON.missing))
def test_gradient_that_was_not_announced_is_refused():
    """The op does not compute what only the gradient of the query needs."""
    (device,) = TRITON.devices
    maps = [torch.randn(1, 3, 4, 5, device=device, requires_grad=True) for _ in range(3)]
    out, *_ = REGISTERED.pixel_propagate(*maps, None, None, 0.5, False, False, "triton")
    with pytest.raises(RuntimeError, match=r"^query: .*gradient=False"):
        out.sum().backward()
    out, *_ = REGISTERED.pixel_propagate(maps[0].detach(), *maps[1:], None, None, 0.5, False, False, "triton")
    out.sum().backward()
    assert maps[1].grad.isfinite().all()


def test_opcheck_of_ops_without_a_backend():
    for op, arguments in opcheck_others():
        assert set(opcheck(op, arguments).values()) == {"SUCCESS"}, op


def assert_compiles(sample, backend, compiler):
    """One graph without a break serves every size, with the eager results and gradients."""
    make = SAMPLES[sample][1]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    call, _ = make(device=backend.device, backend=backend.name)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for size in SIZES:
        _, arguments = make(size, device=backend.device)
        if sample in DIFFERENTIABLE:
            actual, expected = with_gradients(compiled, arguments), with_gradients(call, arguments)
        else:
            actual, expected = results(compiled(*arguments)), results(call(*arguments))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        if size == SIZES[0]:
            compiled_at_first = counter.frame_count
    assert counter.frame_count == compiled_at_first, "a new size was compiled anew"


def test_compile(backend, sample):
    assert_compiles(sample, backend, "aot_eager")


@only("pixel_propagate_thresholded")
def test_compile_with_inductor(backend, sample):
    assert_compiles(sample, backend, "inductor")


def test_compile_with_numbers_as_arguments():
    """torch.compile treats Python numbers as dynamic, too."""

    def call(query, key, value, index, scale, threshold):
        z = ops.pixel_propagate(query, key, value, scale=scale, threshold=threshold)
        masks = ops.region_masks(query, key, index, (9, 7), scale=scale, threshold=threshold)
        return z, masks.packed, ops.correlation_rows(query, key, index, scale=scale)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    maps = [torch.randn(2, 6, 4, 5), torch.randn(2, 6, 3, 7), torch.randn(2, 3, 4, 5)]
    for numbers in ((0.5, 0.3), (0.7, 0.4), (1, 0)):
        arguments = (*maps, torch.arange(8), *numbers)
        for a, b in zip(compiled(*arguments), call(*arguments), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_of_a_training_step():
    """All ops in one graph."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(query, key, logits, index, box):
        labels, confidence, peak = ops.pseudo_label(logits)
        masks = ops.region_masks(query, key, index, (logits.shape[2], logits.shape[3]))
        theta = peak.mean()
        after = ops.region_propagate(labels, (confidence >= theta) & ~box, masks, theta, num_classes=4, valid=~box)
        parts = ops.connected_components(after[0])
        value = torch.nn.functional.interpolate(logits, size=query.shape[2:], mode="bilinear", align_corners=True)
        return ops.pixel_propagate(query, key, value, threshold=theta), *after, parts

    for size in ((5, 6), (7, 4)):
        query, key = feature(2, 3, *size), feature(2, 3, *size)
        logits, box = torch.randn(2, 4, 21, 25), torch.rand(2, 21, 25) < 0.2
        index = torch.randint(size[0] * size[1], (9,))
        z, after, _, parts = step(query, key, logits, index, box)
        assert z.shape == (2, 4, *size)
        assert torch.equal(parts, ops.connected_components(after))
        z.sum().backward()
        assert query.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_equals_a_loop(backend, sample):
    """torch calls the op once for each element."""
    call, arguments = SAMPLES[sample][1](device=backend.device, backend=backend.name)
    stacked = [torch.stack([x, x.flip(0) if x.dim() else x]) for x in arguments]
    found = results(torch.vmap(call)(*stacked))
    for i in range(2):
        expected = results(call(*(x[i] for x in stacked)))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b)


@only(*DIFFERENTIABLE)
def test_transforms_that_are_refused(backend, sample):
    """An error is better than a wrong derivative."""
    if backend.name == "reference":
        pytest.skip("plain PyTorch has them")
    call, (query, *others) = SAMPLES[sample][1](device=backend.device, backend=backend.name)
    refused = pytest.raises(
        RuntimeError, match=r"^(query|logits): derivatives of torch\.func .*corrmatch\.reference has"
    )
    loss = lambda x: call(x, *others).sum()  # noqa: E731
    two, one = torch.stack([query, query]), torch.tensor(1.0, device=query.device)
    leaf = query.clone().requires_grad_()
    for transform in (
        lambda: torch.func.grad(loss)(query),
        lambda: torch.func.vjp(loss, query),
        lambda: torch.func.jacrev(loss)(query),
        lambda: torch.vmap(torch.func.grad(loss))(two),
        lambda: torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(two),
        lambda: torch.func.grad(lambda factor: factor * loss(leaf))(one),
    ):
        with refused:
            transform()
    assert torch.func.grad(lambda factor: factor * loss(query))(one) == loss(query)  # nothing is asked of the op
    if sample != "correlation_rows":
        z = torch.vmap(call)(*(torch.stack([x, x]) for x in (leaf, *others)))
        with pytest.raises(RuntimeError, match=r"^(query|logits): a gradient is asked for"):
            z.sum().backward()
    with pytest.raises(RuntimeError, match=r"^(query|logits): forward-mode derivatives are not supported"):
        torch.func.jvp(lambda x: call(x, *others), (query,), (query,))
    if sample in ("cross_entropy", "divergence"):
        return  # nothing else may require a gradient
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^key: forward-mode"):
        call(query, torch.autograd.forward_ad.make_dual(others[0], others[0]), *others[1:])


def test_forward_mode_of_other_inputs_goes_on():
    call, arguments = SAMPLES["pixel_propagate"][1]()
    z, tangent = torch.func.jvp(lambda x: x * call(*arguments).sum(), (torch.tensor(2.0),), (torch.tensor(1.0),))
    torch.testing.assert_close(z, 2 * tangent)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.4}, {"normalize": True}], ids=str)
def test_autocast_of_pixel_propagation(options):
    """Maps are cast to the autocast dtype, float64 is not. Gradients have the dtypes of the leaves."""
    call = lambda *x: ops.pixel_propagate(*x, **options)  # noqa: E731
    maps = [feature(2, 6, 5, 7), feature(2, 6, 5, 7), feature(2, 4, 5, 7)]
    for dtype in (torch.bfloat16, F16):
        with torch.autocast("cpu", dtype):
            z = call(*maps)
            wide = call(*(x.double() for x in maps))
        assert z.dtype == dtype
        assert wide.dtype == F64
        assert torch.equal(wide, call(*(x.double() for x in maps)))
        assert torch.equal(z, call(*(x.to(dtype) for x in maps)))
        gradients = torch.autograd.grad(z.float().sum(), maps)
        assert [x.dtype for x in gradients] == [F32, F32, F32]


@only(*DIFFERENTIABLE)
def test_backward_within_autocast(backend, sample):
    """It uses the saved tensors of the forward, so autocast changes nothing."""
    if backend.name == "reference" and sample.startswith("pixel"):
        pytest.skip("the products of plain PyTorch are cast in its backward, too")
    call, arguments = SAMPLES[sample][1](device=backend.device, backend=backend.name)
    with torch.autocast(backend.device, torch.bfloat16):
        actual = with_gradients(call, arguments)
    expected = with_gradients(
        lambda *x: call(*(y.bfloat16() if sample.startswith("pixel") and y.dim() == 4 else y for y in x)), arguments
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_leaves_the_confidence_alone():
    """A confidence that rounds to the threshold in bfloat16 stays below it."""
    maps = [feature(1, 3, 2, 2), feature(1, 3, 2, 2), feature(1, 2, 2, 2)]
    confidence = torch.full((1, 2, 2), 0.9999)
    with torch.autocast("cpu", torch.bfloat16):
        z = ops.pixel_propagate(*maps, confidence=confidence, threshold=1.0)
    assert torch.equal(z, torch.zeros_like(z))


def test_autocast_changes_no_other_op(backend, sample):
    """Only pixel propagation casts its maps."""
    call, arguments = SAMPLES[sample][1](device=backend.device, backend=backend.name)
    cast = [x.bfloat16() if sample.startswith("pixel") and x.dim() == 4 else x for x in arguments]
    expected = results(call(*cast))
    with torch.autocast(backend.device, torch.bfloat16):
        actual = results(call(*arguments))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
