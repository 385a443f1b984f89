"""Modules for other models: the correlation head and the dynamic threshold."""

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
    """The result of `CorrelationHead`: propagated logits (B, C, h, w) and, if requested, region masks."""

    propagated: Tensor
    masks: RegionMasks | None


# so that torch.export can save programs that return it
pytree._register_namedtuple(CorrelationOutput, serialized_type_name="corrmatch.nn.CorrelationOutput")


class CorrelationHead(nn.Module):
    """Spreads logits along the correlation map of a feature map.

    A 3 x 3 convolution with batch norm, ReLU and Dropout2d is followed by two 1 x 1 convolutions to query and key. The
    logits are shrunk to the size of the feature map and detached. They are the value of `ops.pixel_propagate`.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Channels of the logits.
        channels: Channels D of query and key. None stands for the number of classes, as published.
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
        """Propagates logits and, if requested, samples region masks.

        Args:
            feature: (B, in_channels, h, w).
            logits: (B, num_classes, H, W) of any size. No gradient flows to them.
            num_masks: Number of region masks. Their positions are drawn uniformly and shared by the batch.
            mask_size: Size of the masks; by default the size of the logits.
            connected: As in `ops.region_masks`.
            generator: Random generator of the positions, on the device of the feature map.
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
        logits: (B, C, H, W) of any size. They are shrunk to (h, w), bilinearly with aligned corners. No gradient flows
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
        num_masks: Number of positions that are drawn.
        size: (H, W) of the masks.
        threshold: As in `ops.region_masks`.
        connected: As in `ops.region_masks`.
        generator: Random generator of the positions, on the device of the query.
    """
    # With an argument `generator`, even None, torch.export would treat the number of positions as a constant.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    index = torch.randint(query.shape[2] * query.shape[3], (num_masks,), device=query.device, **source)
    return ops.region_masks(query, key, index, size, threshold=threshold, connected=connected)


class DynamicThreshold(nn.Module):
    r"""A confidence threshold that follows the confidence of the model.

    .. math:: \theta \leftarrow m \theta + (1 - m) \operatorname{mean}_{c\ \mathrm{present}} \mathrm{class\_peak}_c

    The state is the buffer `threshold`, a 0-d float32 tensor that the ops read on the device. It stays float32 when the
    module is cast, by half() or to(torch.bfloat16), and when a state is loaded: in bfloat16 it would never change with
    a momentum of 0.999. Under torch.distributed the maximum of all processes' peaks is used, so all processes have the
    same threshold.

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
        """Updates the threshold with the peaks (C,) of `ops.pseudo_label` and returns the buffer.

        A class with the peak 0 is absent. A class whose peak is NaN or infinite counts as absent, so that the threshold
        does not stay NaN after one bad batch. If all classes are absent, the threshold does not change.
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
        """Moves of a module move the state, too; casts of a module leave the state as it is."""
        before = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            self.threshold = before.to(self.threshold.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Keeps the state float32: with assign=True it would take the dtype of the loaded tensor."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.threshold = self.threshold.to(torch.float32)

    def forward(
        self, logits: Tensor, *, size: tuple[int, int] | None = None, ignore: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns labels, confidence and threshold. In training mode it updates the threshold first."""
        labels, confidence, class_peak = ops.pseudo_label(logits.detach(), size=size, ignore=ignore)
        if self.training:
            self.update(class_peak)
        return labels, confidence, self.threshold
