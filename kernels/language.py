"""Functions that all kernels share: products, rounding, and the device of a launch."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# TRITON_INTERPRET=1 runs the kernels as NumPy programs on CPU tensors. It is read when this package is imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = math.log2(math.e)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches on the current device and stream."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@triton.jit
def block_of(positions, SIZE: tl.constexpr):
    """The image of this program and the first position of its block of SIZE.

    Both come from the first axis of the grid, which has room for 2^31 - 1 programs. The others have room for 65,535.
    """
    blocks = tl.cdiv(positions, SIZE)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * SIZE


@triton.jit
def dot(a, b, acc):
    """Returns acc + a b in float32, for a and b of a half type."""
    if INTERPRETED:  # it would multiply bit patterns of bfloat16, and its sums differ from those of tensor cores
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_alone(a, b):
    """Returns a b in float32, for a and b of a half type. Sums with it are not moved into the tensor core."""
    zeros = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if INTERPRETED:
        return dot(a, b, zeros)
    else:
        # With this argument the compiler does not turn a sum with the product into an accumulator of it.
        return tl.dot(a, b, zeros, max_num_imprecise_acc=2**30)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Converts float32 numbers to another dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


# Numbers in pieces. A float32 number is the sum of three bfloat16 numbers of eight bits each, so tensor cores can
# multiply it. PIECES is 3 for float32, 2 where 16 bits are enough, and 1 for half types. A number in pieces is a tuple
# of three; with fewer pieces the last ones are ignored.


@triton.jit
def cut(x):
    """Float32 numbers, cut off after their first eight bits."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split(x, dtype: tl.constexpr, PIECES: tl.constexpr):
    """Splits finite float32 numbers into pieces of `dtype` by cutting off, which takes the fewest instructions."""
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
    """Splits float32 numbers into rounded pieces of `dtype`, so that the errors of products have no common sign.

    An infinity or a NaN is in the first piece; the other pieces are 0.
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
    """The float32 numbers of which these are the pieces."""
    whole = x[0].to(tl.float32)
    if PIECES == 2:
        whole += x[1].to(tl.float32)
    if PIECES == 3:
        whole += x[1].to(tl.float32) + x[2].to(tl.float32)
    return whole


@triton.jit
def load(source, at, size, PIECES: tl.constexpr):
    """Loads numbers at the offsets `at`. Their pieces lie `size` numbers apart."""
    first = tl.load(source + at)
    second, third = first, first
    if PIECES > 1:
        second = tl.load(source + size + at)
    if PIECES > 2:
        third = tl.load(source + 2 * size + at)
    return first, second, third


@triton.jit
def store(target, at, size, x, PIECES: tl.constexpr):
    """Stores numbers in pieces in the layout that `load` reads."""
    tl.store(target + at, x[0])
    if PIECES > 1:
        tl.store(target + size + at, x[1])
    if PIECES > 2:
        tl.store(target + 2 * size + at, x[2])


@triton.jit
def transposed(x, PIECES: tl.constexpr):
    """Transposes a tile in pieces."""
    first = tl.trans(x[0])
    second, third = first, first
    if PIECES > 1:
        second = tl.trans(x[1])
    if PIECES > 2:
        third = tl.trans(x[2])
    return first, second, third


@triton.jit
def small_products(a, b, acc, PIECES: tl.constexpr):
    """Returns acc + a b without the product of the first pieces. Small terms are added first."""
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
    """Returns acc + a b. Terms below the last place of float32 are left out."""
    return dot(a[0], b[0], small_products(a, b, acc, PIECES))


@triton.jit
def transposed_small_products(a, b, acc, PIECES: tl.constexpr):
    """`small_products`, in the order that `small_products` has for the transposed operands: the same bits."""
    if PIECES == 3:
        acc = dot(a[0], b[2], acc)
        acc = dot(a[1], b[1], acc)
    if PIECES > 1:
        acc = dot(a[0], b[1], acc)
    if PIECES == 3:
        acc = dot(a[2], b[0], acc)
    if PIECES > 1:
        acc = dot(a[1], b[0], acc)
    return acc


@triton.jit
def transposed_product(a, b, acc, PIECES: tl.constexpr):
    """`product`, in the order that `product` has for the transposed operands: the same bits, transposed."""
    return dot(a[0], b[0], transposed_small_products(a, b, acc, PIECES))


# A tensor core cuts its sums off. These errors have one sign, and in long sums they would exceed those of float32. So
# loops over tiles add float32 products up outside of the tensor core. Each loop uses the order that takes fewer
# registers.


@triton.jit
def added_product(a, b, acc, PIECES: tl.constexpr):
    """Returns acc + a b, where a float32 sum with acc is rounded and not cut off."""
    if PIECES == 1:
        return dot(a[0], b[0], acc)
    else:
        return acc + product(a, b, tl.zeros_like(acc), PIECES)


@triton.jit
def added_transposed_product(a, b, acc, PIECES: tl.constexpr):
    """`added_product` in the order of `transposed_product`."""
    if PIECES == 1:
        return dot(a[0], b[0], acc)
    else:
        return acc + transposed_product(a, b, tl.zeros_like(acc), PIECES)
