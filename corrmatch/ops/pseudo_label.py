"""Pseudo-labels: class, confidence, and the peaks from which the dynamic threshold is updated."""

from __future__ import annotations

import torch
from torch import Tensor

from corrmatch import _C, reference
from corrmatch.ops import checks
from corrmatch.ops.backend import HALF_AND_SINGLE, call, choose, implementation, kernels, run_on_cpu
from corrmatch.ops.borrowing import borrow
from corrmatch.ops.registration import register


def pseudo_label(
    logits: Tensor, *, size: tuple[int, int] | None = None, ignore: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The most likely class of each pixel, its probability, and the largest such probability of each class.

    Args:
        logits: (B, C, h, w); float16, bfloat16, float32, or float64 on a CPU; any strides.
        size: (H, W). The kernel enlarges the logits to it, bilinearly (align_corners=True). None keeps (h, w).
        ignore: bool (B, H, W), True where a pixel does not count for `class_peak`.
        backend: "cpu", "triton", "reference", or None for the best available.

    Returns:
        Three tensors without gradient. The labels, int64 (B, H, W), are the argmax (the lowest class on ties). The
        confidence, float32 (B, H, W), is the softmax probability of this class. class_peak, float32 (C,), is for each
        class the largest confidence of the pixels in the batch that have this label and are not ignored; 0 if there are
        none. All are computed in float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device or backend; the message names the argument.

    Source: CorrMatch (CVPR 2024, arXiv 2306.04300), "dynamic threshold".
    """
    checks.feature_map("logits", logits, flat=False)
    height, width = logits.shape[2:] if size is None else checks.image_size(size)
    if ignore is not None:
        checks.tensor("ignore", ignore, (torch.bool,), logits)
        if tuple(ignore.shape) != (logits.shape[0], height, width):
            expected = (logits.shape[0], height, width)
            raise ValueError(f"ignore: expected shape {expected}, got {tuple(ignore.shape)}")
    backend = choose("pseudo_label", backend, logits)
    return torch.ops.corrmatch.pseudo_label(logits, ignore, height, width, backend)


def pseudo_label_op(
    logits: Tensor, ignore: Tensor | None, height: int, width: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns labels, confidence and class peaks at (height, width)."""
    if logits.shape[0] == 0:
        labels, confidence, class_peak = _empty_results(logits, height, width)
        return labels, confidence, class_peak.zero_()
    return call("pseudo_label", backend, logits, ignore, height, width)


@implementation("pseudo_label", "reference")
def _reference(logits: Tensor, ignore: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return reference.pseudo_label(logits, size=(height, width), ignore=ignore)


@implementation("pseudo_label", "cpu")
def _cpu(logits: Tensor, ignore: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    labels, confidence, class_peak = results = _empty_results(logits, height, width)
    run_on_cpu(
        _C.cpu.pseudo_label, borrow(logits), borrow(ignore), borrow(labels), borrow(confidence), borrow(class_peak)
    )
    return results


@implementation("pseudo_label", "triton", dtypes=HALF_AND_SINGLE, channels=256, capability=80)
def _triton(logits: Tensor, ignore: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    results = _empty_results(logits, height, width)
    kernels("pseudo_label").label(logits, ignore, *results)
    return results


def _empty_results(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape[:2]
    return (
        torch.empty(batch, height, width, dtype=torch.int64, device=logits.device),
        torch.empty(batch, height, width, dtype=torch.float32, device=logits.device),
        torch.empty(classes, dtype=torch.float32, device=logits.device),
    )


def _fake(logits, ignore, height, width, backend):
    return _empty_results(logits, height, width)


register("pseudo_label", pseudo_label_op, fake=_fake)
