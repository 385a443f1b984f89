"""What all kernels share: products, roundings and where they are launched."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# TRITON_INTERPRET=1 runs the kernels as NumPy programs on CPU tensors. It counts when this package is first imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = math.log2(math.e)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def float32_precision() -> str:
    """The `input_precision` of products of float32 numbers: "tf32" where torch takes it for its own, else exact."""
    # Not allow_tf32, which raises once a program has set fp32_precision; this one can be read after either.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def block_of(positions, SIZE: tl.constexpr):
    """The picture of this program and the first position of its block of SIZE.

    Both are counted on the first axis of the grid, which takes 2^31 - 1 programs; the others take 65,535.
    """
    blocks = tl.cdiv(positions, SIZE)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * SIZE


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """The sum of acc and a b, in float32; PRECISION is the `input_precision` of tl.dot."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16, and NumPy's sums are not those of tensor cores
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """The float32 numbers x in another dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)
