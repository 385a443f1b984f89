r"""The loss of CorrMatch, term by term.

.. math::
    L = \tfrac12 \left( \tfrac12 L_x + \tfrac12 L_{x,\mathrm{corr}} + \tfrac14 L_s + \tfrac14 L_{kl} + \tfrac14 L_{fp}
    + \tfrac14 L_{\mathrm{corr}} \right)

Every function takes logits (B, C, h, w), integer labels (B, H, W) and bool masks (B, H, W), and returns a 0-d tensor.
Logits are enlarged to the labels in the loss itself (`corrmatch.ops.cross_entropy`), bilinearly with aligned corners.
Nothing here knows the network, and nothing waits for the device.

Source: CorrMatch (CVPR 2024, arXiv 2306.04300).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corrmatch import ops

IGNORE = 255  # label of a pixel that does not count
WEIGHTS = {"x": 0.25, "x_corr": 0.25, "s": 0.125, "kl": 0.125, "fp": 0.125, "corr": 0.125}
OHEM_PROBABILITY = 0.7
OHEM_PIXELS = 100_000


class Outputs(NamedTuple):
    """Logits (., C, h, w) of one step, of any size: B_x labelled and B_u unlabelled pictures."""

    labeled: Tensor
    labeled_propagated: Tensor  # along the correlation map
    weak: Tensor  # of the unlabelled pictures; takes no gradient
    perturbed: Tensor  # weak, decoded from perturbed features
    propagated: Tensor  # weak
    strong: Tensor
    strong_propagated: Tensor


class Targets(NamedTuple):
    """What the outputs are held against."""

    truth: Tensor  # (B_x, H, W), IGNORE where unknown
    weak_labels: Tensor  # (B_u, H, W)
    weak_reliable: Tensor
    weak_counted: Tensor  # not padding
    labels: Tensor  # of the strong view: cut and mixed, then propagated in regions
    reliable: Tensor  # after region propagation
    reliable_before: Tensor
    counted: Tensor


def terms(outputs: Outputs, targets: Targets, *, ohem: bool = False) -> dict[str, Tensor]:
    """Every term of the loss by name, unweighted."""
    t = targets
    return {
        "x": supervised(outputs.labeled, t.truth, ohem=ohem),
        "x_corr": supervised(outputs.labeled_propagated, t.truth, ohem=ohem),
        "s": pseudo_supervised(outputs.strong, t.labels, t.reliable, t.counted),
        "kl": consistency(outputs.strong, outputs.weak.detach(), t.reliable_before, t.counted),
        "fp": pseudo_supervised(outputs.perturbed, t.weak_labels, t.weak_reliable, t.weak_counted),
        "corr": correlation(outputs.strong_propagated, outputs.propagated, t),
    }


def total(parts: dict[str, Tensor]) -> Tensor:
    """The weighted sum."""
    return torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()


def supervised(logits: Tensor, truth: Tensor, *, ohem: bool = False) -> Tensor:
    """Mean cross-entropy over the pixels with a label; with `ohem` over the hard ones among them."""
    counted = truth != IGNORE
    if ohem:
        counted &= hard(logits, truth)
    return pseudo_supervised(logits, truth, counted, counted)


def hard(logits: Tensor, truth: Tensor) -> Tensor:
    """The OHEM_PIXELS pixels whose label is least probable, and all whose label is less probable than 0.7."""
    _, surprise = ops.cross_entropy(logits.detach(), truth, (truth != IGNORE).float())
    probability = surprise.neg().exp()  # 1 where there is no label
    kth = probability.flatten().kthvalue(min(OHEM_PIXELS, probability.numel())).values
    return probability <= kth.clamp(min=OHEM_PROBABILITY)


def pseudo_supervised(logits: Tensor, labels: Tensor, reliable: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy summed over the reliable pixels, over the number of pixels that count."""
    return ops.cross_entropy(logits, labels, _share(reliable, counted))[0]


def consistency(strong: Tensor, weak: Tensor, reliable: Tensor, counted: Tensor) -> Tensor:
    """KL(softmax weak || softmax strong) summed over the reliable pixels, over the number of pixels that count."""
    return ops.divergence(strong, weak, _share(reliable, counted))[0]


def correlation(strong: Tensor, weak: Tensor, targets: Targets) -> Tensor:
    """The propagated logits of both views, half each."""
    return 0.5 * (
        pseudo_supervised(strong, targets.labels, targets.reliable, targets.counted)
        + pseudo_supervised(weak, targets.weak_labels, targets.weak_reliable, targets.weak_counted)
    )


def _share(reliable: Tensor, counted: Tensor) -> Tensor:
    """The weight of each pixel in a masked mean."""
    return torch.where(reliable, 1 / counted.count_nonzero().clamp(min=1), 0.0)
