"""Losses of enlarged logits: corrmatch and compositions of torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness.case import TOLERANCE, Benchmark, Case, Setting, largest_relative_error, smooth
from harness.measure import Contender
from torch import Tensor

from corrmatch import ops, reference


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Enlargement, cross-entropy, weighted sum."""
    large = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)
    return (F.cross_entropy(large, labels, reduction="none") * weight).sum()


def cases(s: Setting) -> Iterator[Case]:
    """Cross-entropy of enlarged logits, a third of the pixels left out, forward and backward."""
    size, (height, width) = s.full, s.grid
    generator = s.generator()
    logits = (4 * smooth(s.batch, s.channels, s.grid, 6, generator)).to(s.device, s.dtype).requires_grad_()
    labels = torch.randint(s.channels, (s.batch, *size), generator=generator).to(s.device)
    kept = torch.rand(s.batch, *size, generator=generator) < 0.7
    weight = (kept / kept.sum()).to(s.device)

    def contender(name: str, f: Callable[..., Tensor], **rest: Any) -> Contender:
        upstream = torch.ones((), device=s.device)
        return Contender(name, lambda: f(logits, labels, weight), leaves=(logits,), upstream=upstream, **rest)

    contenders = [
        contender("corrmatch", lambda *x: ops.cross_entropy(*x)[0], ours=True),
        contender("eager", cross_entropy),
    ]

    def expected() -> tuple[Any, ...]:
        wide = logits.detach().double().requires_grad_()
        loss, _ = reference.cross_entropy(wide, labels, weight.double())
        return loss.detach(), *torch.autograd.grad(loss, wide)

    pixels = s.batch * size[0] * size[1]
    yield Case(
        "pixel_loss", f"{height}x{width} to {size[0]}x{size[1]}, B = {s.batch}", pixels, "pixels",
        f"C = {s.channels}", contenders, expected, largest_relative_error, TOLERANCE[s.dtype], height * width, s.batch,
        oracle_bytes=6 * 8 * s.channels * pixels,
    )  # fmt: skip


BENCHMARK = Benchmark(
    "pixel_loss", "weighted cross-entropy of enlarged logits, and their gradient", cases, backward=True
)
