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
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@triton.jit
def block_of(positions, SIZE: tl.constexpr):
    """The image of this program and the first position of its block of SIZE.

    Both are counted on the first axis of the grid, which takes 2^31 - 1 programs; the others take 65,535.
    """
    blocks = tl.cdiv(positions, SIZE)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * SIZE


@triton.jit
def dot(a, b, acc):
    """The sum of acc and a b, of half types, in float32."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16, and NumPy's sums are not those of tensor cores
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """The float32 numbers x in another dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


# A float32 number is the sum of three bfloat16 numbers of eight bits each, so its products run on tensor cores as
# those of half types do. PIECES is 3 then, 2 where 16 bits are enough, and 1 for half types as they are; a number in
# pieces is a tuple of three, and where there are fewer only the first ones count.


@triton.jit
def cut(x):
    """The first eight bits of float32 numbers."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split(x, dtype: tl.constexpr, PIECES: tl.constexpr):
    """The finite float32 numbers x in pieces of `dtype`, cut off: the quickest way."""
    if PIECES == 1:
        first = narrow(x, dtype)
        return first, first, first
    large = cut(x)
    rest = x - large
    second = cut(rest)
    third = rest - second
    return large.to(dtype), second.to(dtype), third.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr, PIECES: tl.constexpr):
    """Any float32 numbers x in pieces of `dtype`, each rounded: what products leave out has no sign in common.

    Of a number that is not finite the first piece says it all, and the others are 0.
    """
    if PIECES == 1:
        first = narrow(x, dtype)
        return first, first, first
    finite = x - x == 0
    first = narrow(x, dtype)
    first = tl.where(finite & (tl.abs(first.to(tl.float32)) == float("inf")), cut(x), first.to(tl.float32))
    rest = tl.where(finite, x - first, 0.0)
    second = narrow(rest, dtype)
    return first.to(dtype), second, narrow(rest - second.to(tl.float32), dtype)


@triton.jit
def joined(x, PIECES: tl.constexpr):
    """The float32 numbers that are in pieces."""
    whole = x[0].to(tl.float32)
    if PIECES == 2:
        whole += x[1].to(tl.float32)
    if PIECES == 3:
        whole += x[1].to(tl.float32) + x[2].to(tl.float32)
    return whole


@triton.jit
def load(source, at, size, PIECES: tl.constexpr):
    """The numbers at `at`, whose pieces lie `size` numbers apart."""
    first = tl.load(source + at)
    second, third = first, first
    if PIECES > 1:
        second = tl.load(source + size + at)
    if PIECES > 2:
        third = tl.load(source + 2 * size + at)
    return first, second, third


@triton.jit
def store(target, at, size, x, PIECES: tl.constexpr):
    """Writes numbers in pieces to where `load` finds them."""
    tl.store(target + at, x[0])
    if PIECES > 1:
        tl.store(target + size + at, x[1])
    if PIECES > 2:
        tl.store(target + 2 * size + at, x[2])


@triton.jit
def transposed(x, PIECES: tl.constexpr):
    """A tile in pieces, transposed."""
    first = tl.trans(x[0])
    second, third = first, first
    if PIECES > 1:
        second = tl.trans(x[1])
    if PIECES > 2:
        third = tl.trans(x[2])
    return first, second, third


@triton.jit
def small_products(a, b, acc, PIECES: tl.constexpr):
    """The sum of acc and a b but for the product of the first pieces, small terms first."""
    if PIECES == 3:
        acc = dot(a[2], b[0], acc)
        acc = dot(a[1], b[1], acc)
    if PIECES > 1:
        acc = dot(a[1], b[0], acc)
    if PIECES == 3:
        acc = dot(a[0], b[2], acc)
    if PIECES > 1:
        acc = dot(a[0], b[1], acc)
    return acc


@triton.jit
def product(a, b, acc, PIECES: tl.constexpr):
    """The sum of acc and a b: exact but for terms below the last place of float32."""
    return dot(a[0], b[0], small_products(a, b, acc, PIECES))


@triton.jit
def transposed_product(a, b, acc, PIECES: tl.constexpr):
    """The same, in the order in which `product` adds up the transpose of a b: to the last bit what that is."""
    if PIECES == 3:
        acc = dot(a[0], b[2], acc)
        acc = dot(a[1], b[1], acc)
    if PIECES > 1:
        acc = dot(a[0], b[1], acc)
    if PIECES == 3:
        acc = dot(a[2], b[0], acc)
    if PIECES > 1:
        acc = dot(a[1], b[0], acc)
    return dot(a[0], b[0], acc)
