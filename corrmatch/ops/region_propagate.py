"""Region propagation: each region gets its dominant label."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from corrmatch import _C, reference
from corrmatch.masks import RegionMasks
from corrmatch.ops import checks, cuda
from corrmatch.ops.backend import call, choose, implementation, run_on_cpu
from corrmatch.ops.borrowing import borrow
from corrmatch.ops.registration import register

MAX_CLASSES = 65536


def region_propagate(
    labels: Tensor,
    reliable: Tensor,
    masks: RegionMasks,
    threshold: float | Tensor,
    *,
    num_classes: int,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gives each region its dominant label if the label is dominant enough and the region reliable enough.

    The regions k = 0 .. K-1 of an image are processed in order: a later region sees the labels that earlier ones wrote.
    Let R = mask_k & valid and Q = R & reliable. Region k is skipped if Q is empty or \|Q\| / \|R\| < threshold. Let n_c
    be the number of pixels of Q whose current label is c, and c* the most frequent class (the lowest on ties). If
    n_c* / \|Q\| > threshold, labels[R] = c* and R becomes reliable. Divisions are in float32. Both tests use `reliable`
    as it was passed.

    Args:
        labels: (B, H, W), uint8, int8, int16, int32 or int64. Labels of pixels that are valid and reliable must
            lie in [0, num_classes). Labels of other pixels may be any number, such as 255, and are not counted.
        reliable: bool (B, H, W).
        masks: RegionMasks of B images and this size.
        threshold: Number or 0-d tensor (read on the device).
        num_classes: 1 to 65536.
        valid: bool (B, H, W), the pixels that regions may cover; all if None.
        backend: "cpu", "cuda", "reference", or None for the best available.

    Returns:
        Two new tensors without gradient, the labels after propagation, in their dtype, and the reliability, bool.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device or backend; a label out of range (on a CPU, elsewhere
            with CORRMATCH_CHECK=1). The message names the argument.

    Source: CorrMatch (CVPR 2024, arXiv 2306.04300), "region propagation".
    """
    checks.image("labels", labels, checks.INTEGER)
    checks.image("reliable", reliable, (torch.bool,), labels)
    if valid is not None:
        checks.image("valid", valid, (torch.bool,), labels)
    if not isinstance(masks, RegionMasks):
        raise TypeError(f"masks: expected RegionMasks, got {type(masks).__name__}")
    checks.tensor("masks.packed", masks.packed, (torch.int32,), labels)
    if masks.size != tuple(labels.shape[1:]):
        raise ValueError(f"masks: expected masks of {tuple(labels.shape[1:])} pixels, got {masks.size}")
    words = RegionMasks.words(masks.size)
    packed = masks.packed
    if packed.dim() != 3 or packed.shape[0] != labels.shape[0] or packed.shape[2] != words:
        raise ValueError(f"masks.packed: expected shape ({labels.shape[0]}, K, {words}), got {tuple(packed.shape)}")
    num_classes = checks.integer("num_classes", num_classes, 1, MAX_CLASSES)
    threshold = checks.threshold_tensor(threshold, labels)
    backend = choose("region_propagate", backend, labels)
    return torch.ops.corrmatch.region_propagate(labels, reliable, packed, threshold, valid, num_classes, backend)


def region_propagate_op(
    labels: Tensor,
    reliable: Tensor,
    packed: Tensor,
    threshold: Tensor,
    valid: Tensor | None,
    num_classes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Labels and reliability after propagation. `packed` is RegionMasks.packed."""
    if labels.numel() == 0:
        return _empty_results(labels)
    return call("region_propagate", backend, labels, reliable, packed, threshold, valid, num_classes)


@implementation("region_propagate", "reference")
def _reference(
    labels: Tensor, reliable: Tensor, packed: Tensor, threshold: Tensor, valid: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor]:
    _check_classes(labels, reliable, valid, num_classes)
    masks = RegionMasks(packed, (labels.shape[1], labels.shape[2]))
    return reference.region_propagate(labels, reliable, masks, threshold, num_classes=num_classes, valid=valid)


@implementation("region_propagate", "cpu")
def _cpu(
    labels: Tensor, reliable: Tensor, packed: Tensor, threshold: Tensor, valid: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor]:
    out_labels, out_reliable = results = _empty_results(labels)
    run_on_cpu(
        _C.cpu.region_propagate, borrow(labels), borrow(reliable), borrow(packed), borrow(threshold), borrow(valid),
        num_classes, borrow(out_labels), borrow(out_reliable),
    )  # fmt: skip
    return results


@implementation("region_propagate", "cuda", capability=80)
def _cuda(
    labels: Tensor, reliable: Tensor, packed: Tensor, threshold: Tensor, valid: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor]:
    _check_classes(labels, reliable, valid, num_classes)
    out_labels, out_reliable = results = _empty_results(labels)
    arguments = (
        borrow(labels), borrow(reliable), borrow(packed), borrow(threshold), borrow(valid), num_classes,
        borrow(out_labels), borrow(out_reliable),
    )  # fmt: skip
    scratch = functools.partial(cuda.EXTENSION.region_propagate_scratch, borrow(labels), borrow(packed), num_classes)
    cuda.launch(cuda.EXTENSION.region_propagate, labels, scratch, *arguments)
    return results


def _check_classes(labels: Tensor, reliable: Tensor, valid: Tensor | None, num_classes: int) -> None:
    """Calls the operator for CPUs, which checks the labels."""
    checks.classes(labels, reliable if valid is None else reliable & valid, num_classes, "where reliable")


def _empty_results(labels: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(labels.shape, dtype=labels.dtype, device=labels.device),
        torch.empty(labels.shape, dtype=torch.bool, device=labels.device),
    )


def _fake(labels, reliable, packed, threshold, valid, num_classes, backend):
    return _empty_results(labels)


register("region_propagate", region_propagate_op, fake=_fake)
