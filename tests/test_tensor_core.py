"""Results under a model of tensor cores, which cut sums off where the interpreter rounds them.

A tensor core adds 16 products of half types and the accumulator at once: all terms are aligned to the largest one and
cut off a few bits behind the last bit of float32, and so is the sum. Source: Fasi, Higham, Mikaitis and Pranesh,
*Numerical behavior of NVIDIA tensor cores* (PeerJ Computer Science 7, 2021). For Hopper the number of these
bits is not published, so the tests take several.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import targets
from test_pixel_propagate import GATES, check, maps

TOGETHER = 16  # products that are added at once
INTERPRETED = [target for target in targets("pixel_propagate") if target.name == "triton" and target.interpreted]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="with a GPU the real tensor cores are tested"),
]


def cut_off(x: np.ndarray, unit: np.ndarray) -> np.ndarray:
    return np.trunc(x / unit) * unit


def last_bit(x: np.ndarray) -> np.ndarray:
    """The last of 24 bits of numbers, float64."""
    return np.ldexp(1.0, np.frexp(np.where(x == 0, np.finfo(np.float32).tiny, x))[1] - 24)


def product(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray, guard: int) -> np.ndarray:
    """accumulator + a b on a tensor core with this number of guard bits, float32."""
    total = accumulator.astype(np.float64)
    for first in range(0, a.shape[1], TOGETHER):
        part = slice(first, first + TOGETHER)
        terms = np.concatenate([a[:, None, part] * b.T[None, :, part], total[..., None]], axis=2)
        unit = last_bit(np.abs(terms).max(2)) / 2**guard
        total = cut_off(terms, unit[..., None]).sum(2)
        total = cut_off(total, last_bit(total))
    return total.astype(np.float32)


@pytest.fixture(params=[1, 2, 3], ids="{} guard bits".format)
def tensor_core(request, monkeypatch):
    """Replaces `language.dot` by the model."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, TensorHandle

    from corrmatch.kernels import language

    def dot(a, b, acc):
        wide = [x.to(tl.float64).handle.data for x in (a, b)]
        found = product(*wide, acc.handle.data, request.param)
        return tl.tensor(TensorHandle(found, tl.float32), acc.type)

    monkeypatch.setitem(InterpretedFunction.rewritten_fn, language.dot.fn, dot)


def test_the_model_cuts_off():
    """2^24 + 3 rounds to 2^24 + 4. A tensor core returns 2^24 + 2, and ignores digits behind the guard bits."""
    one = np.ones((1, 1))
    assert product(3 * one, one, 2.0**24 * one, guard=2).item() == 2**24 + 2
    assert product(-3 * one, one, -(2.0**24) * one, guard=2).item() == -(2**24) - 2
    eighths = np.full((1, 16), 0.25)
    assert product(eighths, np.ones((16, 1)), 2.0**24 * one, guard=3).item() == 2**24 + 4
    assert product(eighths, np.ones((16, 1)), 2.0**24 * one, guard=1).item() == 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("gate_name", ["half open", "one open"])
def test_accuracy_on_a_tensor_core(tensor_core, gate_name, normalize, dtype):
    """Cut-off sums of float32 once exceeded the limit in this case: with few terms, errors do not average out."""
    tensors = maps((16, 5, 4, (7, 9), (5, 11)), dtype)
    confidence = torch.rand(16, 7, 9)
    gate = GATES[gate_name](confidence)
    options = {"confidence": torch.where(gate, 0.75, 0.25), "threshold": 0.6}
    for target in INTERPRETED:
        check(target, tensors, gate=gate, normalize=normalize, options=options)


@pytest.mark.parametrize("tensor_core", [1], indirect=True)
def test_long_sums_on_a_tensor_core(tensor_core):
    """Errors of cut-off sums have one sign. So the kernels add only the terms of one tile within a tensor core."""
    for target in INTERPRETED:
        check(target, maps((1, 5, 5, (33, 33), (33, 33)), torch.float32))
