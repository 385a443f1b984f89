"""What all segmentation networks are: a backbone, a decoder, a classifier, and on request a correlation head.

Networks differ in `features` and `fused`, and in how they take images of any size (`whole`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from corrmatch.nn import CorrelationHead


class Prediction(NamedTuple):
    """What a network returns; None for what was not asked for. `enlarge` brings logits to full size.

    Corners of all maps lie on corners of the images, whatever the stride.
    """

    logits: Tensor  # (B, C, h, w), of stride 4 or of 1 3/4
    perturbed: Tensor | None = None  # the same, decoded from perturbed features
    query: Tensor | None = None  # (B, D, h', w') of the correlation map, of the stride of the last features
    key: Tensor | None = None  # as query
    features: Tensor | None = None  # (B, channels, h, w) that the classifier takes
    fused: Tensor | None = None  # (B, `fused_channels`, h, w) that the decoder takes
    low: Tensor | None = None  # (B, ., h, w), the first of the backbone's features

    def split(self, count: int) -> tuple[Prediction, Prediction]:
        """The first `count` images of the batch, and the others."""
        first = Prediction(*(None if x is None else x[:count] for x in self))  # type: ignore[arg-type]
        return first, Prediction(*(None if x is None else x[count:] for x in self))  # type: ignore[arg-type]


class Network(nn.Module):
    """Base of the networks.

    Attributes:
        backbone: Makes the features; a parameter group of its own.
        decode: From what `fused` returns to logits; its last layer is the classifier.
        correlation: Makes query and key of the last features; None without.
        widths: Channels of the features that `factors` scale, one for each factor.
        fused_channels: Channels of what `fused` returns.
        frozen: Whether the backbone stays as it is: no gradient, evaluation mode.
    """

    backbone: Any
    decode: nn.Sequential
    correlation: CorrelationHead | None
    widths: tuple[int, ...]
    fused_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.perturb = nn.Dropout2d(0.5)
        self.frozen = False

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Of the backbone, the last one for the correlation head."""
        raise NotImplementedError

    def fused(self, *features: Tensor) -> Tensor:
        """What the decoder takes."""
        raise NotImplementedError

    def fitting(self, images: Tensor) -> Tensor:
        """Images of sides that suit the network: these, with more to the right and below where they do not."""
        return images

    def whole(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of images (B, 3, H, W) of any size: how whole images are evaluated and predicted."""
        return enlarge(self(images).logits, images.shape[2:])

    def forward(
        self, images: Tensor, *, perturb: bool = False, correlate: bool = False, features: bool = False,
        fused: bool = False, low: bool = False, factors: Sequence[Tensor] | None = None,
    ) -> Prediction:  # fmt: skip
        """Segments images.

        Args:
            images: (B, 3, H, W), normalised.
            perturb: Decode Dropout2d(0.5) of the features too, in one batch with the clean ones.
            correlate: Return query and key of the correlation head, too. They are those of the clean features.
            features: Return the decoder's features, too.
            fused: Return what the decoder makes them of, too.
            low: Return the first of the backbone's features, too.
            factors: For each of `widths` (B, width): what the channels of the features are multiplied by before they
                are decoded.
        """
        found = clean = self.features(images)
        if factors is not None:
            found = [x * factor[:, :, None, None] for x, factor in zip(clean, cycle(factors), strict=False)]
        if perturb:
            found = [torch.cat([x, self.perturb(x)]) for x in found]
        taken = self.fused(*found)
        decoded = self.decode[:-1](taken)
        logits, *perturbed = self.classifier(decoded).chunk(2) if perturb else [self.classifier(decoded)]
        query = key = None
        if correlate and self.correlation is not None:
            query, key = self.correlation.query_key(clean[-1])
        asked = ((decoded, features), (taken, fused), (clean[0], low))
        kept = [x[: images.shape[0]] if wanted else None for x, wanted in asked]
        return Prediction(logits, perturbed[0] if perturbed else None, query, key, *kept)

    @property
    def classifier(self) -> nn.Conv2d:
        """The last layer: a 1 x 1 convolution from features to logits."""
        return self.decode[-1]  # type: ignore[return-value]

    def segment(self, *features: Tensor) -> Tensor:
        """Logits of features."""
        return self.decode(self.fused(*features))

    def train(self, mode: bool = True) -> Network:
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Inside, networks are in evaluation mode; afterwards they are in the mode they were in."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Inside, a network drops nothing, while its norm layers stay in the mode that they are in."""
    modes = {module: module.training for module in network.modules() if isinstance(module, _DropoutNd)}
    for module in modes:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.train(mode)


def enlarge(x: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Bilinear, in float32: what is compared at every pixel should not be rounded to bfloat16.

    As two matrix products: their gradient is the same from run to run on a GPU, which that of `F.interpolate` is not.
    An exported program has no gradient, and the one operation.
    """
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_exporting():
            return F.interpolate(x.float(), tuple(size), mode="bilinear", align_corners=align_corners)
        rows, columns = (_weights(old, new, x, align_corners) for old, new in zip(x.shape[2:], size, strict=True))
        return rows @ (x.float() @ columns.mT)


def _weights(old: int, new: int, like: Tensor, align_corners: bool) -> Tensor:
    """(new, old): what each old position gives to each new one."""
    one = torch.eye(old, dtype=torch.float32, device=like.device)[None]
    return F.interpolate(one, new, mode="linear", align_corners=align_corners)[0].mT
