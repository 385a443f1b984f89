"""Invalid sizes never reach the binding: an op refuses its arguments, or the contract of its operator holds.

The operators do not check addresses, sizes and strides (csrc/cpu/ops.def). In these tests checks of their contract
replace them, and the public functions are called with one or two arguments changed at random.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from backends import FLOATING
from random_calls import random_call
from random_inputs import INTEGERS
from support import OPS
from torch import Tensor

import corrmatch.ops
from corrmatch import _C, RegionMasks, ops

DTYPES = (torch.bool, *INTEGERS, *FLOATING, torch.complex64)
FUNCTIONS = tuple(name for name in ops.__all__ if name != "correlation_rows")
CONTRACTS = {name: check for support in OPS.values() for name, check in support.CONTRACT.items()}


def test_only_what_is_optional_may_be_left_out():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.cpu.connected_components(None, 8, 0, None, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.cpu.pseudo_label(None, None, None, None, None, 1)


@pytest.fixture
def reached(monkeypatch):
    """Replaces the operators by the checks. Returns a list to which calls are added."""
    called = []

    def watched(name, check):
        def kernel(*arguments):
            called.append(name)
            check(*arguments)

        return kernel

    stand_in = SimpleNamespace(cpu=SimpleNamespace(**{n: watched(n, check) for n, check in CONTRACTS.items()}))
    for name in corrmatch.backends()["cpu"].ops:
        module = __import__(f"corrmatch.ops.{name}", fromlist=["_C"])
        monkeypatch.setattr(module, "_C", stand_in)
        monkeypatch.setattr(module, "borrow", lambda x: x)
    return called


def changed(r: random.Random, x):
    """An argument that replaces x, of another shape, dtype, device, type or size."""
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
        drawn = random_call(torch.initial_seed(), i)
        if drawn.name != op:
            continue
        for _ in range(8):
            arguments = {**drawn.tensors, **drawn.options}
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
    assert known - {"isa", "isas", "select_isa"} == {*CONTRACTS, "pixel_propagate_backward"}
