"""Connected components of label images."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from corrmatch import _C, reference
from corrmatch.ops import checks, cuda
from corrmatch.ops.backend import call, choose, implementation, run_on_cpu
from corrmatch.ops.borrowing import borrow
from corrmatch.ops.registration import register


def connected_components(
    image: Tensor, *, connectivity: int = 8, background: int = 0, backend: str | None = None
) -> Tensor:
    """Numbers the connected regions of equal value.

    Args:
        image: bool or integer (..., H, W), with any number of leading dimensions and any strides. Each image is
            numbered separately.
        connectivity: 4 (edges) or 8 (edges and corners).
        background: Pixels of this value belong to no component.
        backend: "cpu", "cuda", "reference", or None for the best available.

    Returns:
        int32 in the shape of image. It is 0 on background, else 1 .. n in raster order of the first pixels of the
        components, as scipy.ndimage.label numbers them. All backends and numbers of threads give the same result. It
        has no gradient.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape or backend; the message names the argument.
    """
    checks.tensor("image", image, (torch.bool, *checks.INTEGER))
    if image.dim() < 2:
        raise ValueError(f"image: expected shape (..., H, W), got {tuple(image.shape)}")
    checks.pixels("image", image.shape[-2], image.shape[-1])
    checks.choice("connectivity", connectivity, (4, 8))
    background = checks.integer("background", background, -(2**63), 2**63 - 1)
    backend = choose("connected_components", backend, image)
    return torch.ops.corrmatch.connected_components(image, connectivity, background, backend)


def connected_components_op(image: Tensor, connectivity: int, background: int, backend: str) -> Tensor:
    """Returns component numbers, int32."""
    if image.numel() == 0:
        return _empty_result(image)
    return call("connected_components", backend, image, connectivity, background)


@implementation("connected_components", "reference")
def _reference(image: Tensor, connectivity: int, background: int) -> Tensor:
    return reference.connected_components(image, connectivity=connectivity, background=background)


@implementation("connected_components", "cpu")
def _cpu(image: Tensor, connectivity: int, background: int) -> Tensor:
    out = _empty_result(image)
    images, results = _batches(image, out)
    run_on_cpu(_C.cpu.connected_components, borrow(images), connectivity, background, borrow(results))
    return out


@implementation("connected_components", "cuda", capability=80)
def _cuda(image: Tensor, connectivity: int, background: int) -> Tensor:
    out = _empty_result(image)
    images, results = _batches(image, out)
    scratch = functools.partial(cuda.EXTENSION.connected_components_scratch, borrow(images))
    arguments = (borrow(images), connectivity, background, borrow(results))
    cuda.launch(cuda.EXTENSION.connected_components, image, scratch, *arguments)
    return out


def _batches(image: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Calls the operator with image and result as (B, H, W)."""
    images = image.reshape(-1, *image.shape[-2:])
    return images, out.view(images.shape)


def _empty_result(image: Tensor) -> Tensor:
    return torch.empty(image.shape, dtype=torch.int32, device=image.device)


def _fake(image, connectivity, background, backend):
    return _empty_result(image)


register("connected_components", connected_components_op, fake=_fake)
