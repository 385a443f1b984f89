"""DeepLabV3+ over any timm backbone, with the correlation head."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corrmatch.nn import CorrelationHead

LOW_LEVEL_STRIDE, LOW_LEVEL_WIDTH = 4, 48


class Prediction(NamedTuple):
    """What the network returns; None for what was not asked for. `enlarge` brings logits to full size."""

    logits: Tensor  # (B, C, h, w), of stride 4
    perturbed: Tensor | None = None  # the same, decoded from perturbed features
    query: Tensor | None = None  # (B, D, h', w') of the correlation map, of the stride of the last features
    key: Tensor | None = None  # as query
    features: Tensor | None = None  # (B, channels, h, w) that the classifier takes
    fused: Tensor | None = None  # (B, channels + 48, h, w) that the decoder takes

    def split(self, count: int) -> tuple[Prediction, Prediction]:
        """The first `count` images of the batch, and the others."""
        first = Prediction(*(None if x is None else x[:count] for x in self))  # type: ignore[arg-type]
        return first, Prediction(*(None if x is None else x[count:] for x in self))  # type: ignore[arg-type]


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (ECCV 2018): atrous pyramid on the last features, decoded together with those of stride 4.

    Args:
        backbone: Name of a timm model that has features of stride 4 and takes `output_stride`.
        num_classes: C.
        output_stride: 8 or 16.
        atrous_rates: Of the pyramid's three 3 x 3 convolutions.
        channels: Width of pyramid and decoder: 256 as published; less for quick runs.
        correlation: Whether to have a correlation head on the backbone's last features.
        drop_path: Stochastic depth of the backbone: the chance, rising with depth to this, that a block is left out.
        pretrained: False, True for the weights of timm's hub, or the path of a file with weights of the backbone.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        output_stride: int = 8,
        atrous_rates: Sequence[int] = (12, 24, 36),
        channels: int = 256,
        correlation: bool = True,
        drop_path: float = 0.0,
        pretrained: bool | str = False,
    ):
        super().__init__()
        self.backbone = build_backbone(backbone, output_stride, pretrained, drop_path)
        strides, widths = self.backbone.feature_info.reduction(), self.backbone.feature_info.channels()
        if LOW_LEVEL_STRIDE not in strides:
            raise ValueError(f"backbone: expected one with features of stride 4, {backbone} has {strides}")
        self.low_level = strides.index(LOW_LEVEL_STRIDE)
        self.pyramid = AtrousPyramid(widths[-1], channels, atrous_rates)
        self.reduce = conv_block(widths[self.low_level], LOW_LEVEL_WIDTH, 1)
        self.decode = nn.Sequential(
            conv_block(channels + LOW_LEVEL_WIDTH, channels, 3),
            conv_block(channels, channels, 3),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.perturb = nn.Dropout2d(0.5)
        self.correlation = CorrelationHead(widths[-1], num_classes) if correlation else None

    def forward(
        self, images: Tensor, *, perturb: bool = False, correlate: bool = False, features: bool = False,
        fused: bool = False,
    ) -> Prediction:  # fmt: skip
        """Segments images.

        Args:
            images: (B, 3, H, W), normalised.
            perturb: Decode Dropout2d(0.5) of the features too, in one batch with the clean ones.
            correlate: Return query and key of the correlation head, too.
            features: Return the decoder's features, too.
            fused: Return what the decoder makes them of, too: pyramid and features of stride 4.
        """
        low, high = both = self.features(images)
        if perturb:
            both = (torch.cat([low, self.perturb(low)]), torch.cat([high, self.perturb(high)]))
        taken = self.fused(*both)
        decoded = self.decode[:-1](taken)
        logits, *perturbed = self.classifier(decoded).split(images.shape[0])
        query = key = None
        if correlate and self.correlation is not None:
            query, key = self.correlation.query_key(high)
        kept = [x[: images.shape[0]] if wanted else None for x, wanted in ((decoded, features), (taken, fused))]
        return Prediction(logits, perturbed[0] if perturbed else None, query, key, *kept)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Those of stride 4 and the last ones."""
        found = self.backbone(images)
        return found[self.low_level], found[-1]

    @property
    def classifier(self) -> nn.Conv2d:
        """The last layer: a 1 x 1 convolution from features to logits."""
        return self.decode[-1]  # type: ignore[return-value]

    def fused(self, low: Tensor, high: Tensor) -> Tensor:
        """What the decoder takes, of stride 4: the enlarged pyramid, and the features of stride 4 reduced."""
        high = F.interpolate(self.pyramid(high), size=low.shape[2:], mode="bilinear", align_corners=True)
        return torch.cat([high, self.reduce(low)], 1)

    def decoded(self, low: Tensor, high: Tensor) -> Tensor:
        """The features that the classifier takes, of stride 4."""
        return self.decode[:-1](self.fused(low, high))

    def segment(self, low: Tensor, high: Tensor) -> Tensor:
        """Logits of stride 4."""
        return self.classifier(self.decoded(low, high))


class AtrousPyramid(nn.Module):
    """ASPP: a 1 x 1, three atrous 3 x 3 convolutions and the picture's mean, fused."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList([conv_block(in_channels, channels, 1)])
        self.branches += [conv_block(in_channels, channels, 3, dilation=rate) for rate in rates]
        self.mean = conv_block(in_channels, channels, 1)
        self.fuse = conv_block((len(self.branches) + 1) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, h, w) to (B, channels, h, w)."""
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.fuse(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


def conv_block(in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


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


def enlarge(x: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Bilinear, in float32: what is compared at every pixel should not be rounded to bfloat16.

    As two matrix products: their gradient is the same from run to run on a GPU, which that of `F.interpolate` is not.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_weights(old, new, x, align_corners) for old, new in zip(x.shape[2:], size, strict=True))
        return rows @ (x.float() @ columns.mT)


def _weights(old: int, new: int, like: Tensor, align_corners: bool) -> Tensor:
    """(new, old): what each old position gives to each new one."""
    one = torch.eye(old, dtype=torch.float32, device=like.device)[None]
    return F.interpolate(one, new, mode="linear", align_corners=align_corners)[0].mT


def build_backbone(name: str, output_stride: int, pretrained: bool | str, drop_path: float = 0.0) -> Any:
    """A timm backbone that returns features; a wrong name or missing weights raise ValueError."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise ValueError(f"backbone: timm has no model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    overlay = {"file": pretrained} if isinstance(pretrained, str) else None
    depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0 else {}
    try:
        if isinstance(pretrained, str):
            check_weights(name, pretrained)
        return timm.create_model(
            name, features_only=True, output_stride=output_stride, pretrained=bool(pretrained),
            pretrained_cfg_overlay=overlay, **depth,
        )  # fmt: skip
    except TypeError as error:
        refused = "stochastic depth" if "drop_path_rate" in str(error) else "output stride"
        raise ValueError(f"backbone: {name} takes no {refused}: {error}") from error
    except (OSError, RuntimeError, KeyError) as error:
        where = pretrained if isinstance(pretrained, str) else "timm's hub"
        raise ValueError(
            f"pretrained: no weights of {name} from {where} ({error!r}). Give the path of a file with its weights, or "
            "pretrained=false to train from scratch."
        ) from error


def check_weights(name: str, path: str) -> None:
    """Refuses a file that lacks weights of the backbone: timm loads what fits and passes over the rest."""
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=0).state_dict()
    missing = sorted(expected.keys() - timm.models.load_state_dict(path).keys())
    if missing:
        raise KeyError(f"{len(missing)} of {len(expected)} are missing, {missing[0]} the first")
