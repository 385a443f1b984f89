"""Sizes that lie do not reach the binding: whatever the arguments, an op refuses them or its kernel's contract holds.

The kernels take addresses, sizes and strides on trust (csrc/cpu/table.hpp). Here their place is taken by checks of
that contract, and calls with one or two arguments changed at random go through the public functions.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import problems
import pytest
import torch
from torch import Tensor

import corrmatch.ops
from corrmatch import _C, RegionMasks, ops
from corrmatch.ops.backend import ALL_OPS

DTYPES = (torch.bool, *problems.INTEGERS, *problems.FLOATING, torch.complex64)
INTEGERS, FLOATING = (*problems.INTEGERS,), problems.FLOATING
FUNCTIONS = tuple(name for name in ops.__all__ if name != "correlation_rows")
MODULES = ("pixel_propagate", "region_masks", "region_propagate", "connected_components", "pseudo_label", "pixel_loss")


def tensor(x: Tensor, dtypes: tuple, *shape: int, contiguous: bool = False) -> None:
    """The shape is right and every element lies in memory that the tensor owns."""
    assert x.device.type == "cpu"
    assert x.dtype in dtypes
    assert tuple(x.shape) == shape
    assert x.is_contiguous() or not contiguous
    assert min(x.stride(), default=0) >= 0
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    assert x.numel() == 0 or (last + 1) * x.element_size() <= x.untyped_storage().nbytes()


def test_only_what_is_optional_may_be_left_out():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.cpu.connected_components(None, 8, 0, None, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.cpu.pseudo_label(None, None, None, None, None, 1)


def forward(query, key, value, gate, threshold, scale, out, normalizer, threads):
    batch, depth, height, width = query.shape
    tensor(query, FLOATING, batch, depth, height, width)
    tensor(key, FLOATING, batch, depth, *key.shape[2:4])
    tensor(value, FLOATING, batch, value.shape[1], height, width)
    if gate is not None:
        tensor(gate, (torch.bool,), batch, 1, height, width)
    if threshold is not None:
        tensor(threshold, (torch.float64,))
    mass = out.shape[1] - value.shape[1]
    assert mass in (0, 1)
    tensor(out, FLOATING, batch, value.shape[1] + mass, *key.shape[2:4], contiguous=True)
    wide = torch.float64 in (query.dtype, key.dtype, value.dtype)
    dtype = (torch.float64 if wide else torch.float32,)
    tensor(normalizer, dtype, batch, 2, height * width, contiguous=True)
    assert min(query.numel(), key.numel(), value.numel()) > 0


def masks(query, key, index, height, width, scale, threshold, connected, connectivity, packed, threads):
    batch, depth = query.shape[:2]
    tensor(query, FLOATING, batch, depth, *query.shape[2:4])
    tensor(key, FLOATING, batch, depth, *key.shape[2:4])
    tensor(index, (torch.int64,), batch, index.shape[1])
    assert min(height, width) >= 1
    assert connected in (0, 1, 2)
    assert connectivity in (4, 8)
    tensor(packed, (torch.int32,), batch, index.shape[1], -(-height * width // 32), contiguous=True)
    assert min(query.numel(), key.numel()) > 0


def propagate(labels, reliable, packed, threshold, valid, num_classes, out_labels, out_reliable, threads):
    shape = tuple(labels.shape)
    tensor(labels, INTEGERS, *shape)
    assert len(shape) == 3
    tensor(reliable, (torch.bool,), *shape)
    if valid is not None:
        tensor(valid, (torch.bool,), *shape)
    tensor(packed, (torch.int32,), shape[0], packed.shape[1], -(-shape[1] * shape[2] // 32))
    tensor(threshold, (torch.float64,))
    assert 1 <= num_classes <= 65536
    tensor(out_labels, (labels.dtype,), *shape, contiguous=True)
    tensor(out_reliable, (torch.bool,), *shape, contiguous=True)


def components(image, connectivity, background, out, threads):
    tensor(image, (torch.bool, *INTEGERS), *image.shape)
    assert image.dim() == 3
    assert connectivity in (4, 8)
    tensor(out, (torch.int32,), *image.shape, contiguous=True)


def label(logits, ignore, labels, confidence, class_peak, threads):
    tensor(logits, FLOATING, *logits.shape)
    assert logits.dim() == 4
    shape = (logits.shape[0], *labels.shape[1:])
    if ignore is not None:
        tensor(ignore, (torch.bool,), *shape)
    tensor(labels, (torch.int64,), *shape, contiguous=True)
    assert len(shape) == 3
    tensor(confidence, (torch.float32,), *shape, contiguous=True)
    tensor(class_peak, (torch.float32,), logits.shape[1], contiguous=True)


def loss(logits, labels, target, weight, pixels, loss, grad, threads):
    batch, classes = logits.shape[:2]
    tensor(logits, FLOATING, batch, classes, *logits.shape[2:4])
    tensor(weight, FLOATING, batch, *weight.shape[1:3])
    assert (labels is None) != (target is None)
    if labels is not None:
        tensor(labels, INTEGERS, *weight.shape)
    else:
        tensor(target, FLOATING, *logits.shape)
    dtype = (torch.float64 if logits.dtype == torch.float64 else torch.float32,)
    tensor(pixels, dtype, *weight.shape, contiguous=True)
    tensor(loss, dtype)
    if grad is not None:
        tensor(grad, dtype, *logits.shape, contiguous=True)
    assert min(logits.numel(), weight.numel()) > 0


KERNELS = {
    "pixel_propagate_forward": forward,
    "region_masks": masks,
    "region_propagate": propagate,
    "connected_components": components,
    "pseudo_label": label,
    "pixel_loss": loss,
}


@pytest.fixture
def reached(monkeypatch):
    """Puts the checks in the place of the kernels; a list of those that were called."""
    called = []

    def watched(name, check):
        def kernel(*arguments):
            called.append(name)
            check(*arguments)

        return kernel

    stand_in = SimpleNamespace(cpu=SimpleNamespace(**{n: watched(n, check) for n, check in KERNELS.items()}))
    for name in MODULES:
        module = __import__(f"corrmatch.ops.{name}", fromlist=["_C"])
        monkeypatch.setattr(module, "_C", stand_in)
        monkeypatch.setattr(module, "borrow", lambda x: x)
    return called


def changed(r: random.Random, x):
    """Another argument in the place of x: of another shape, dtype, device, type or size."""
    if isinstance(x, RegionMasks):
        if r.random() < 0.5:
            return RegionMasks(changed(r, x.packed), x.size)
        return RegionMasks(x.packed, changed(r, x.size))
    if isinstance(x, tuple):
        return r.choice(((x[1], x[0]), (x[0] + 1, x[1]), (x[0], -x[1]), (0, x[1]), (x[0],), (*x, 1), (1.0, 2), None))
    if not isinstance(x, Tensor):
        return r.choice((None, True, -1, 0, 3, 7.5, 2**70, float("nan"), "peak", torch.tensor(0.5), torch.ones(2)))
    kind = r.randrange(7)
    if kind == 0:
        return x.to(r.choice(DTYPES))
    if kind == 1:
        return r.choice((None, 1.0, x.tolist(), x.to("meta"), x.numpy(force=True) if x.dtype.itemsize > 2 else []))
    if kind == 2:
        return x.unsqueeze(r.randrange(x.dim() + 1))
    if kind == 3 and x.dim() > 0:
        return x.select(0, 0) if x.shape[0] > 0 else x.flatten()
    if x.dim() == 0:
        return x.expand(2)
    size = list(x.shape)
    dim = r.randrange(x.dim())
    size[dim] = r.choice((0, 1, size[dim] + 1, 2 * size[dim], max(0, size[dim] - 1)))
    return torch.zeros(size, dtype=x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("op", FUNCTIONS)
def test_what_reaches_a_kernel_is_true(op, reached):
    r = random.Random(torch.initial_seed())
    refused = 0
    for i in range(4000):
        problem = problems.problem(torch.initial_seed(), i)
        if problem.op != op:
            continue
        for _ in range(8):
            arguments = {**problem.tensors, **problem.options}
            try:
                for name in r.sample(sorted(arguments), r.choice((1, 1, 2))):
                    arguments[name] = changed(r, arguments[name])
                with torch.no_grad():
                    getattr(corrmatch.ops, op)(**arguments, backend="cpu")
            except (TypeError, ValueError) as error:
                refused += 1
                message = str(error)
            else:
                message = "backend: none of it was wrong"
            # RegionMasks names its own arguments.
            assert message.split(":")[0].split(".")[0] in (*arguments, "backend", "packed", "size"), message
        if refused > 300 and len(reached) > 100:
            break
    assert refused > 300
    assert len(reached) > 100


def test_every_kernel_of_the_forward_is_checked():
    known = {name for name in dir(corrmatch._C.cpu) if not name.startswith("_")}
    assert known - {"isa", "isas", "select_isa"} == {*KERNELS, "pixel_propagate_backward"}
    assert set(MODULES) == ALL_OPS
