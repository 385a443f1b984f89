"""Tests that need a GPU: graphs, streams, devices, synchronisation with the host, full sizes, memory."""

from __future__ import annotations

import pytest
import torch
from accuracy import Propagated, assert_all_accurate
from backends import targets
from samples import DIFFERENTIABLE, SAMPLES, results, with_gradients

from corrmatch import ops, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = [(sample, target) for sample, (op, _) in SAMPLES.items() for target in targets(op) if target.device == "cuda"]
both = pytest.mark.parametrize(("sample", "target"), GPU, ids=lambda x: str(x))


def runner(sample):
    return with_gradients if sample in DIFFERENTIABLE else lambda call, arguments: results(call(*arguments))


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@both
def test_no_synchronisation_with_the_host(sample, target):
    call, arguments = SAMPLES[sample][1](device="cuda", backend=target.name)
    run = runner(sample)
    expected = run(call, arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = run(call, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(actual, expected)


@both
def test_cuda_graph(sample, target):
    """A captured graph computes the same on new inputs."""
    call, arguments = SAMPLES[sample][1](device="cuda", backend=target.name)
    _, others = SAMPLES[sample][1](device="cuda", backend=target.name)
    run = runner(sample)
    expected = run(call, others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(call, arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, arguments)
    for argument, other in zip(arguments, others, strict=True):
        argument.copy_(other)
    graph.replay()
    assert_same(captured, expected)


@both
def test_side_stream(sample, target):
    """Work is queued on the current stream, after the work that the stream waits for."""
    call, arguments = SAMPLES[sample][1](device="cuda", backend=target.name)
    run = runner(sample)
    expected = run(call, arguments)
    late = [torch.zeros_like(x) for x in arguments]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, argument in zip(late, arguments, strict=True):
            x.copy_(argument)
        actual = run(call, late)
    side.synchronize()
    assert_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both
def test_second_device_while_the_first_is_current(sample, target):
    call, arguments = SAMPLES[sample][1](device="cuda:0", backend=target.name)
    run = runner(sample)
    expected = run(call, arguments)
    with torch.cuda.device(0):
        actual = run(call, [x.to("cuda:1") for x in arguments])
    assert all(x.device.index == 1 for x in actual)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "side"), [(4, 41), (2, 65), (1, 101)])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.3, "normalize": True}], ids=str)
def test_published_sizes(dtype, batch, side, options):
    """Results are compared with the reference in float64 on the same device."""
    maps = [torch.randn(batch, 21, side, side, device="cuda").to(dtype) for _ in range(4)]

    def run(f, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        z = f(*leaves, **options)
        return Propagated(z.detach(), *torch.autograd.grad(z, leaves, tensors[3].to(z.dtype)))

    def plain(query, key, value, threshold=None, normalize=False):
        p = (query.flatten(2).mT @ key.flatten(2) / 21**0.5).softmax(-1)
        gate = torch.ones_like(value[:, :1]) if threshold is None else value.float().softmax(1).amax(1, keepdim=True)
        gate = gate if threshold is None else (gate >= threshold).to(value.dtype)
        z = torch.cat([value * gate, gate], 1).flatten(2) @ p
        z = z[:, :-1] / z[:, -1:] if normalize else z[:, :-1]
        return z.view_as(value)

    actual = run(lambda *x, **o: ops.pixel_propagate(*x, backend="triton", **o), maps)
    exact = run(reference.pixel_propagate, [x.double() for x in maps])
    peer = run(plain, maps)
    arrays = Propagated(*(x.flatten(2).cpu().numpy() for x in exact))
    assert_all_accurate(actual, arrays, peer, Propagated(*(abs(x) for x in arrays)))


@pytest.mark.parametrize("side", [65, 101, 151])
def test_memory_is_linear_in_the_positions(side):
    """Packed maps, normalizer and mean key: no map of N^2."""
    query, key, value = (torch.randn(1, 21, side, side, device="cuda", requires_grad=True) for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.pixel_propagate(query, key, value, backend="triton").sum().backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    padded, size = (side * side + 127) // 128 * 128, 4
    assert extra <= 16 * 32 * padded * size + 2**21


def test_more_images_than_a_grid_has_rows():
    """With more than 65,535 images a CUDA block processes several; blocks of Triton are counted along x."""
    image = torch.arange(70_000, device="cuda").remainder(3).to(torch.uint8).view(-1, 1, 1)
    assert torch.equal(ops.connected_components(image), (image > 0).int())
    logits = torch.randn(70_000, 3, 1, 1, device="cuda")
    assert torch.equal(ops.pseudo_label(logits)[0], logits.argmax(1))
    z = ops.pixel_propagate(logits, logits, logits, backend="triton")
    torch.testing.assert_close(z, logits)
