"""Predictions on images at several scales, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from corrmatch.models.network import Network, Prediction, enlarge


def predict(network: Network, images: Tensor, extra_scales: Sequence[float], **asked: bool) -> Prediction:
    r"""The network's prediction, with logits that are averaged over scales of the images.

    .. math:: z = \log \frac{1}{1 + n} \left( p(x) + \sum_{k=1}^{n} R\, S_k^{-1}\, p(S_k R\, x) \right)

    p are the network's probabilities, S_k resizes to the k-th extra scale, R reflects left and right. All else of the
    prediction is that of the images as they are. Without extra scales this is `network(images, **asked)`.

    Args:
        network: The network, in the mode that it is to predict in.
        images: (B, 3, H, W), normalised.
        extra_scales: The n scales.
        **asked: See `Network.forward`.
    """
    out: Prediction = network(images, **asked)
    if not extra_scales:
        return out
    size, reflected = out.logits.shape[2:], images.flip(3)
    total = out.logits.float().softmax(1)
    for scale in extra_scales:
        sides = [max(1, round(scale * side)) for side in images.shape[2:]]
        view = F.interpolate(reflected, sides, mode="bilinear", align_corners=True)
        total = total + enlarge(network.whole(view).float().softmax(1), size).flip(3)
    mean = total / (1 + len(extra_scales))
    return out._replace(logits=mean.clamp(min=torch.finfo(torch.float32).tiny).log().to(out.logits.dtype))
