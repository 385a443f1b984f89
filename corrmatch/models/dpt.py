"""DPT over any plain vision transformer of timm, in the form of UniMatch V2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corrmatch.models.backbones import build_backbone
from corrmatch.models.network import Network, enlarge
from corrmatch.nn import CorrelationHead

LEVELS = 4
# Published, by the width of the transformer: width of the decoder, and of the four levels before it.
WIDTHS = {
    384: (64, (48, 96, 192, 384)),
    768: (128, (96, 192, 384, 768)),
    1024: (256, (256, 512, 1024, 1024)),
    1536: (384, (1536, 1536, 1536, 1536)),
}
BLOCKS = {24: (4, 11, 17, 23)}  # published; at other depths the last of each quarter


class DPT(Network):
    """DPT (ICCV 2021, arXiv 2103.13413) without batch norm, as UniMatch V2 (TPAMI 2025, arXiv 2410.10777) has it.

    Features of four blocks, each through the last norm layer, are brought to strides of 1/4, 1/2, 1 and 2 patches and
    fused from the coarsest to the finest; logits have 8 positions a patch. Images whose sides are no multiples of the
    patch are resized to the nearest ones, in `features` and nowhere else; as corners stay on corners, logits are
    brought back by enlarging them to the size of the image.

    Args:
        backbone: Name of a plain vision transformer of timm that takes `dynamic_img_size`, or such a model.
        num_classes: C.
        channels: Width of the decoder; None: as published for this width of the transformer, else a sixth of it.
        levels: Channels of the four levels; None: as published, else 1/8, 1/4, 1/2 of the transformer's width and all.
        correlation: Whether to have a correlation head on the last features.
        correlation_channels: D of the correlation head; None: C.
        drop_path: Stochastic depth of the transformer.
        checkpointing: Compute the blocks again in the backward, which saves the memory of their activations.
        pretrained: False, True for the weights of timm's hub, or the path of a file with weights of the transformer.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        *,
        channels: int | None = None,
        levels: Sequence[int] | None = None,
        correlation: bool = True,
        correlation_channels: int | None = None,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        pretrained: bool | str = False,
    ):
        super().__init__()
        if isinstance(backbone, str):
            backbone = build_backbone(backbone, pretrained, drop_path, num_classes=0, dynamic_img_size=True)
        self.backbone, self.blocks, self.patch = _plain(backbone)
        width = self.backbone.num_features
        published, narrow = WIDTHS.get(width, (max(1, width // 6), (width // 8, width // 4, width // 2, width)))
        channels, levels = channels or published, levels or narrow
        self.backbone.set_grad_checkpointing(checkpointing)
        self.widths, self.fused_channels = (width,), channels
        self.project = nn.ModuleList(nn.Conv2d(width, level, 1) for level in levels)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(level, channels, 3, padding=1, bias=False) for level in levels)
        self.fuse = nn.ModuleList(Fusion(channels, joined=level < LEVELS - 1) for level in range(LEVELS))
        self.decode = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, num_classes, 1)
        )
        self.correlation = None
        if correlation:
            self.correlation = CorrelationHead(width, num_classes, channels=correlation_channels)

    def features(self, images: Tensor) -> list[Tensor]:
        """Those of four blocks, (B, width, h, w) with a position for each patch of the fitted image."""
        size = self.fitted(images.shape[2:])
        if torch.compiler.is_exporting() or size != list(images.shape[2:]):  # a program for all sizes compares none
            images = enlarge(images, size)
        return self.backbone.forward_intermediates(images, indices=self.blocks, norm=True, intermediates_only=True)

    def fitted(self, size: Sequence[int]) -> list[Any]:
        """The nearest multiples of the patch, at least one."""
        return [self.patch * torch.sym_max(1, (side + self.patch // 2) // self.patch) for side in size]

    def fused(self, *features: Tensor) -> Tensor:
        """The levels, fused to 8 positions a patch."""
        levels = [
            reduce(resize(project(x)))
            for x, project, resize, reduce in zip(features, self.project, self.resize, self.reduce, strict=True)
        ]
        fused = None
        for level in reversed(range(LEVELS)):
            size = levels[level - 1].shape[2:] if level > 0 else [2 * side for side in levels[0].shape[2:]]
            fused = self.fuse[level](levels[level], fused, size)
        return fused  # type: ignore[return-value]

    def whole(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of images of any size: those of the fitted image, resized."""
        fitted = self.fitted(images.shape[2:])
        logits = enlarge(self(images).logits, fitted)
        same = not torch.compiler.is_exporting() and fitted == list(images.shape[2:])
        return logits if same else enlarge(logits, images.shape[2:])


class Fusion(nn.Module):
    """Joins a level to what is fused so far, enlarges that bilinearly with aligned corners, and mixes its channels."""

    def __init__(self, channels: int, joined: bool):
        super().__init__()
        self.before = Residual(channels) if joined else None
        self.after = Residual(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, level: Tensor, fused: Tensor | None, size: Sequence[int]) -> Tensor:
        """From (B, channels, h, w), both, to (B, channels, *size)."""
        if self.before is not None:
            level = self.before(level)
        x = self.after(level if fused is None else fused + level)
        return self.mix(nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=True))


class Residual(nn.Module):
    """ReLU and 3 x 3 convolution, twice, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return x + self.second(self.first(x.relu()).relu())


def _plain(backbone: Any) -> tuple[Any, Sequence[int], int]:
    """The transformer without what follows its blocks, the numbers of the blocks to take, and its patch."""
    strides = {info["reduction"] for info in getattr(backbone, "feature_info", []) if isinstance(info, dict)}
    if not hasattr(backbone, "blocks") or len(strides) != 1 or len(backbone.blocks) < LEVELS:
        raise ValueError(f"backbone: expected a plain vision transformer of {LEVELS} blocks or more for decoder=dpt")
    depth, patch = len(backbone.blocks), backbone.patch_embed.patch_size
    if patch[0] != patch[1]:
        raise ValueError(f"backbone: expected square patches, got {patch}")
    blocks = BLOCKS.get(depth, tuple((level + 1) * depth // LEVELS - 1 for level in range(LEVELS)))
    if isinstance(backbone.norm, nn.Identity):  # those that pool first have their norm behind the pooling
        backbone.norm = backbone.fc_norm
    backbone.prune_intermediate_layers(list(blocks), prune_norm=False, prune_head=True)
    return backbone, blocks, patch[0]
