"""DeepLabV3+ over any timm backbone, with the correlation head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corrmatch.models.backbones import build_backbone
from corrmatch.models.network import Network, enlarge
from corrmatch.nn import CorrelationHead

LOW_LEVEL_STRIDE, LOW_LEVEL_WIDTH = 4, 48
STRIDE = 16  # the largest


class DeepLabV3Plus(Network):
    """DeepLabV3+ (ECCV 2018): atrous pyramid on the last features, decoded together with those of stride 4.

    Args:
        backbone: Name of a timm model that has features of stride 4 and takes `output_stride`.
        num_classes: C.
        output_stride: 8 or 16.
        atrous_rates: Of the pyramid's three 3 x 3 convolutions.
        channels: Width of pyramid and decoder: 256 as published; less for quick runs.
        multi_grid: For each block of the backbone's last stage a factor of its dilation; none leaves timm's.
        dropout: Behind the pyramid, and behind each of the two convolutions of the decoder.
        correlation: Whether to have a correlation head on the backbone's last features.
        correlation_channels: D of the correlation head; None: C.
        drop_path: Stochastic depth of the backbone: the chance, rising with depth to this, that a block is left out.
        pretrained: False, True for the weights of timm's hub, or the path of a file with weights of the backbone.
        in_channels: Of the images. The first convolution is new where they are not three.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        output_stride: int = 8,
        atrous_rates: Sequence[int] = (12, 24, 36),
        channels: int = 256,
        multi_grid: Sequence[int] = (),
        dropout: Sequence[float] = (0.0, 0.0, 0.0),
        correlation: bool = True,
        correlation_channels: int | None = None,
        drop_path: float = 0.0,
        pretrained: bool | str = False,
        in_channels: int = 3,
    ):
        super().__init__()
        self.backbone = build_backbone(
            backbone, pretrained, drop_path, features_only=True, output_stride=output_stride, in_chans=in_channels
        )
        if in_channels != 3:  # timm makes it of that for colours
            stem = next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        strides, widths = self.backbone.feature_info.reduction(), self.backbone.feature_info.channels()
        if LOW_LEVEL_STRIDE not in strides:
            raise ValueError(f"backbone: expected one with features of stride 4, {backbone} has {strides}")
        self.low_level = strides.index(LOW_LEVEL_STRIDE)
        self.widths = (widths[self.low_level], widths[-1])
        if multi_grid:
            dilate(self.backbone, [factor * 32 // output_stride for factor in multi_grid])
        self.pyramid = AtrousPyramid(widths[-1], channels, atrous_rates, dropout[0])
        self.reduce = conv_block(widths[self.low_level], LOW_LEVEL_WIDTH, 1)
        self.fused_channels = channels + LOW_LEVEL_WIDTH
        self.decode = nn.Sequential(
            conv_block(self.fused_channels, channels, 3, dropout=dropout[1]),
            conv_block(channels, channels, 3, dropout=dropout[2]),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.correlation = None
        if correlation:
            self.correlation = CorrelationHead(widths[-1], num_classes, channels=correlation_channels)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Those of stride 4 and the last ones."""
        found = self.backbone(images)
        return found[self.low_level], found[-1]

    def fused(self, *features: Tensor) -> Tensor:
        """What the decoder takes, of stride 4: the enlarged pyramid, and the features of stride 4 reduced."""
        low, high = features
        high = F.interpolate(self.pyramid(high), size=low.shape[2:], mode="bilinear", align_corners=True)
        return torch.cat([high, self.reduce(low)], 1)

    def fitting(self, images: Tensor) -> Tensor:
        """Images whose right and lower edges are repeated to a multiple of the stride plus 1, as training crops are.

        Otherwise the enlargement would stretch features, which lie a stride apart, to the corners of the image, and
        labels would be shifted by up to half a stride.
        """
        rows, columns = (
            torch.arange(side + -(side - 1) % STRIDE, device=images.device).clamp(max=side - 1)
            for side in images.shape[2:]
        )
        return images[:, :, rows[:, None], columns]

    def whole(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of images of any size, by what fits."""
        height, width = images.shape[2:]
        padded = self.fitting(images)
        logits = enlarge(self(padded).logits, padded.shape[2:])
        if torch.compiler.is_exporting():  # which takes a slice for shorter than what it is cut from
            rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
            return logits[:, :, rows[:, None], columns]
        return logits[:, :, :height, :width]


class AtrousPyramid(nn.Module):
    """ASPP: a 1 x 1, three atrous 3 x 3 convolutions and the image's mean, fused."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.branches = nn.ModuleList([conv_block(in_channels, channels, 1)])
        self.branches += [conv_block(in_channels, channels, 3, dilation=rate) for rate in rates]
        self.mean = conv_block(in_channels, channels, 1)
        self.fuse = conv_block((len(self.branches) + 1) * channels, channels, 1, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, h, w) to (B, channels, h, w)."""
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.fuse(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


def conv_block(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1, dropout: float = 0.0
) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU; dropout where there is some."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        *([nn.Dropout(dropout)] if dropout > 0 else []),
    )


def second_branch(first: DeepLabV3Plus, second: DeepLabV3Plus) -> DeepLabV3Plus:
    """Lets `second` share the backbone of `first` up to the features of stride 4, which it takes in place of images.

    The rest of the backbone is a copy, with weights of its own. Without a correlation head.
    """
    second.backbone, second.correlation = copy.deepcopy(first.backbone), None
    module: nn.Module = second.backbone
    path = _stage_names(first.backbone)[first.low_level].split(".")
    for depth, name in enumerate(path, start=1):
        for before, _ in list(module.named_children()):
            if before == name:
                break
            setattr(module, before, nn.Identity())
        if depth == len(path):
            setattr(module, name, nn.Identity())
        module = getattr(module, name)
    return second


def _stage_names(backbone: Any) -> list[str]:
    """Of the modules that make the features; some of timm's backbones are flattened, and have other names inside."""
    return list(getattr(backbone, "return_layers", ())) or backbone.feature_info.module_name()


def dilate(backbone: Any, rates: Sequence[int]) -> None:
    """Gives the 3 x 3 convolutions of each block of the last stage a dilation (multi-grid, arXiv 1706.05587)."""
    blocks = list(backbone.get_submodule(_stage_names(backbone)[-1]).children())
    if len(blocks) != len(rates):
        raise ValueError(f"multi_grid: expected a factor for each of the {len(blocks)} blocks of the last stage")
    for block, rate in zip(blocks, rates, strict=True):
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (rate, rate)
