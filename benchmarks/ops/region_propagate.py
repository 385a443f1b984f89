"""Region propagation: corrmatch and loops over images and masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F
from harness.case import (
    Benchmark,
    Case,
    Setting,
    largest,
    percent,
    share_different,
    smooth,
    smooth_features,
)
from harness.measure import Contender
from torch import Tensor

from corrmatch import ops, reference

THRESHOLD = 0.85  # Pascal VOC's


def published(
    labels: Tensor, reliable: Tensor, masks: Tensor, threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """A loop of the published kind: over images and masks in Python, and each turn reads a result on the host."""
    labels, after = labels.clone(), reliable.clone()
    for b in range(labels.shape[0]):
        for region in masks[b]:
            counted = region & reliable[b]
            count = counted.sum().float()
            if count == 0 or count / region.sum().float() < threshold:
                continue
            classes, counts = labels[b][counted].unique(return_counts=True)
            dominant = counts.argmax()
            if counts[dominant].float() / count > threshold:
                labels[b][region] = classes[dominant]
                after[b] |= region
    return labels, after


def numpy_loop(
    labels: Tensor, reliable: Tensor, masks: Tensor, threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The same loop in NumPy, whose calls have less overhead and count bits faster than PyTorch's on a CPU."""
    labels, after = labels.clone(), reliable.clone()
    limit = np.float32(threshold)
    for label, sure, out, regions in zip(labels.numpy(), reliable.numpy(), after.numpy(), masks.numpy(), strict=True):
        for region in regions:
            counted = region & sure
            count = np.float32(np.count_nonzero(counted))
            if count == 0 or count / np.float32(np.count_nonzero(region)) < limit:
                continue
            counts = np.bincount(label[counted], minlength=num_classes)
            dominant = counts.argmax()
            if np.float32(counts[dominant]) / count > limit:
                label[region] = dominant
                out |= region
    return labels, after


def cases(s: Setting) -> Iterator[Case]:
    """Masks of smooth features over smooth labels, so that some regions are accepted and some not."""
    query, key, index = smooth_features(s)
    size, generator = s.full, s.generator()
    masks = ops.region_masks(query, key, index, size)
    as_bool = masks.to_bool()
    # Classes follow some channels of the features, so many regions have a single class and many have several.
    labels = F.interpolate(query[:, : s.channels // 3].float(), size=size, mode="bilinear").argmax(1)
    doubt = smooth(s.batch, 1, size, 8, generator)[:, 0]
    reliable = (doubt < doubt.flatten().kthvalue(int(0.85 * doubt.numel())).values).to(s.device)
    arguments = (as_bool, THRESHOLD, s.channels)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.region_propagate(labels, reliable, masks, THRESHOLD, num_classes=s.channels)

    contenders = [Contender("corrmatch", ours, ours=True)]
    if s.device == "cpu":
        contenders.append(Contender("NumPy loop", lambda: numpy_loop(labels, reliable, *arguments)))
    loop = Contender("published loop", lambda: published(labels, reliable, *arguments), on_host=True)
    contenders.append(loop)

    def expected() -> tuple[tuple[Tensor, Tensor]]:
        return (reference.region_propagate(labels, reliable, masks, THRESHOLD, num_classes=s.channels),)

    def error(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
        return largest(share_different(x, y) for x, y in zip(got[0], want[0], strict=True))

    after, reliable_after = ours()
    count = index.shape[0]
    yield Case(
        "region_propagate", f"{size[0]}x{size[1]}, B = {s.batch}", as_bool.numel(), "mask pixels",
        f"K = {count}, C = {s.channels}; {percent(after != labels)} of the pixels change, reliable are "
        f"{percent(reliable)}, then {percent(reliable_after)}", contenders, expected, error, 0.0, size[0] * size[1],
        s.batch, oracle_bytes=4 * as_bool.numel(),
    )  # fmt: skip


BENCHMARK = Benchmark(
    "region_propagate", "each region in turn takes its dominant label, at a threshold of 0.85", cases, share=2.0
)
