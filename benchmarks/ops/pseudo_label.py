"""Pseudo-labels: corrmatch and compositions of torch's functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from harness.case import (
    TOLERANCE,
    Benchmark,
    Case,
    Setting,
    largest,
    largest_relative_error,
    share_different,
    smooth,
)
from harness.measure import Contender
from torch import Tensor

from corrmatch import ops, reference


def with_softmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Enlargement, softmax, maximum, and the largest confidence of each class."""
    large = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    confidence, labels = large.softmax(1).max(1)
    return labels, confidence.float(), _class_peak(confidence, labels, logits.shape[1])


def with_logsumexp(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the softmax of all classes: from the largest logit and the log-sum-exp."""
    large = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    peak, labels = large.max(1)
    confidence = (peak - large.logsumexp(1)).exp()
    return labels, confidence.float(), _class_peak(confidence, labels, logits.shape[1])


def _class_peak(confidence: Tensor, labels: Tensor, classes: int) -> Tensor:
    return confidence.new_zeros(classes).scatter_reduce(0, labels.flatten(), confidence.flatten(), "amax").float()


def cases(s: Setting) -> Iterator[Case]:
    """Smooth logits, enlarged."""
    size, (height, width) = s.full, s.grid
    logits = (4 * smooth(s.batch, s.channels, s.grid, 6, s.generator())).to(s.device, s.dtype)
    contenders = [
        Contender("corrmatch", lambda: ops.pseudo_label(logits, size=size), ours=True),
        Contender("eager, logsumexp", lambda: with_logsumexp(logits, size)),
        Contender("eager, softmax", lambda: with_softmax(logits, size)),
    ]

    def expected() -> tuple[Any, ...]:
        return (reference.pseudo_label(logits.double(), size=size),)

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        return largest([share_different(got[0][0], want[0][0]), largest_relative_error(got[0][1:], want[0][1:])])

    pixels = s.batch * size[0] * size[1]
    yield Case(
        "pseudo_label", f"{height}x{width} to {size[0]}x{size[1]}, B = {s.batch}", pixels, "pixels",
        f"C = {s.channels}", contenders, expected, error, TOLERANCE[s.dtype], height * width, s.batch,
        oracle_bytes=4 * 8 * s.channels * pixels,
    )  # fmt: skip


BENCHMARK = Benchmark("pseudo_label", "logits enlarged; class, confidence, largest confidence of each class", cases)
