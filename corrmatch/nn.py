"""Modules to drop into other models: the correlation head and the dynamic threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from corrmatch import ops
from corrmatch.masks import RegionMasks


class CorrelationOutput(NamedTuple):
    """What `CorrelationHead` returns: propagated logits (B, C, h, w) and, if asked for, region masks."""

    propagated: Tensor
    masks: RegionMasks | None


# torch.export writes programs that return one.
pytree._register_namedtuple(CorrelationOutput, serialized_type_name="corrmatch.nn.CorrelationOutput")


class CorrelationHead(nn.Module):
    """Spreads logits along the correlation map of a feature map.

    A 3 x 3 convolution with batch norm, ReLU and Dropout2d, then two 1 x 1 convolutions to query and key; the logits,
    shrunk to the feature's size and detached, are the value of `ops.pixel_propagate`.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Channels of the logits.
        channels: D, of query and key; None: the number of classes, as published.
        hidden_channels: Channels between the convolutions.
        dropout: Probability of Dropout2d.

    Source: CorrMatch (CVPR 2024, arXiv 2306.04300).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        hidden_channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        channels = num_classes if channels is None else channels
        self.project = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 3, padding=1),
            nn.BatchNorm2d(hidden_channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
        )
        self.query = nn.Conv2d(hidden_channels, channels, 1)
        self.key = nn.Conv2d(hidden_channels, channels, 1)

    def forward(
        self,
        feature: Tensor,
        logits: Tensor,
        *,
        num_masks: int = 0,
        mask_size: tuple[int, int] | None = None,
        connected: str | None = None,
        generator: torch.Generator | None = None,
    ) -> CorrelationOutput:
        """Propagates logits; samples region masks if asked to.

        Args:
            feature: (B, in_channels, h, w).
            logits: (B, num_classes, H, W) of any size; no gradient flows to them.
            num_masks: How many positions, drawn uniformly and shared by the batch, give a region mask each.
            mask_size: Size of the masks; that of the logits if None.
            connected: As in `ops.region_masks`.
            generator: For the draw, on the feature's device.
        """
        query, key = self.query_key(feature)
        masks = None
        if num_masks > 0:
            size = mask_size if mask_size is not None else (logits.shape[2], logits.shape[3])
            masks = sample_region_masks(query, key, num_masks, size, connected=connected, generator=generator)
        return CorrelationOutput(propagate_logits(query, key, logits), masks)

    def query_key(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key (B, D, h, w) of a feature map (B, in_channels, h, w)."""
        hidden = self.project(feature)
        return self.query(hidden), self.key(hidden)


def propagate_logits(query: Tensor, key: Tensor, logits: Tensor) -> Tensor:
    """Spreads logits along the correlation map of query and key.

    Args:
        query: (B, D, h, w).
        key: As query.
        logits: (B, C, H, W) of any size: they are shrunk to (h, w), bilinearly with aligned corners. No gradient flows
            to them.

    Returns:
        (B, C, h, w), see `ops.pixel_propagate`.
    """
    value = F.interpolate(logits.detach(), size=query.shape[2:], mode="bilinear", align_corners=True)
    return ops.pixel_propagate(query, key, value)


def sample_region_masks(
    query: Tensor,
    key: Tensor,
    num_masks: int,
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
    connected: str | None = None,
    generator: torch.Generator | None = None,
) -> RegionMasks:
    """Region masks of random positions, drawn uniformly and shared by the batch; see `ops.region_masks`.

    Args:
        query: (B, D, h, w).
        key: As query.
        num_masks: How many positions are drawn.
        size: (H, W) of the masks.
        threshold: As in `ops.region_masks`.
        connected: As in `ops.region_masks`.
        generator: For the draw, on the device of the query.
    """
    # torch.export takes the number of positions for a constant where a generator is named, even None.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    index = torch.randint(query.shape[2] * query.shape[3], (num_masks,), device=query.device, **source)
    return ops.region_masks(query, key, index, size, threshold=threshold, connected=connected)


class DynamicThreshold(nn.Module):
    r"""The confidence threshold that follows the model.

    .. math:: \theta \leftarrow m \theta + (1 - m) \operatorname{mean}_{c\ \mathrm{present}} \mathrm{class\_peak}_c

    The state is the buffer `threshold`, a 0-d float32 tensor that the ops read on the device. It stays float32 when the
    module is cast, by half() or to(torch.bfloat16), and whatever is loaded: rounded to bfloat16, it would never move
    with a momentum of 0.999. Under torch.distributed the peaks of all processes combine by their maximum, so every
    process holds the same threshold.

    Args:
        initial: theta before the first update.
        momentum: m.

    Source: CorrMatch (CVPR 2024, arXiv 2306.04300), "dynamic threshold".
    """

    threshold: Tensor

    def __init__(self, initial: float = 0.85, momentum: float = 0.999):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("threshold", torch.tensor(float(initial), dtype=torch.float32))

    @torch.no_grad()
    def update(self, class_peak: Tensor) -> Tensor:
        """Moves the threshold by the (C,) peaks that `ops.pseudo_label` returns; absent classes have peak 0.

        A class whose peak is NaN or infinite counts as absent, so that one bad batch does not make the threshold NaN
        for good. Without any present class the threshold stays. Returns the buffer.
        """
        class_peak = torch.where(class_peak.isfinite(), class_peak, 0).to(torch.float32).clamp(min=0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(class_peak, dist.ReduceOp.MAX)
        present = class_peak > 0
        mean = class_peak.sum() / present.sum().clamp(min=1)
        moved = self.momentum * self.threshold + (1 - self.momentum) * mean
        self.threshold.copy_(torch.where(present.any(), moved, self.threshold))
        return self.threshold

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicThreshold:
        """What moves or casts a module goes through here; the state moves along, but is not cast."""
        before = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            self.threshold = before.to(self.threshold.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """With assign=True the state would be what is loaded, in the dtype that it comes in."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.threshold = self.threshold.to(torch.float32)

    def forward(
        self, logits: Tensor, *, size: tuple[int, int] | None = None, ignore: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pseudo-labels `logits` and, in training mode, updates. Returns labels, confidence and the threshold."""
        labels, confidence, class_peak = ops.pseudo_label(logits.detach(), size=size, ignore=ignore)
        if self.training:
            self.update(class_peak)
        return labels, confidence, self.threshold
