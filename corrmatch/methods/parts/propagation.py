"""Correlation propagation as an option of every method: the keys `propagation.*` and what they switch on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from corrmatch import nn, ops
from corrmatch.config import ConfigError, PropagationConfig
from corrmatch.masks import RegionMasks
from corrmatch.methods.parts.progress import Progress
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.models.network import Prediction


class Propagation:
    """The two parts of correlation propagation.

    Attributes:
        head: Whether a correlation head is trained: `logits` propagates with it.
        regions: Whether pseudo-labels go through region propagation: `masks` and `targets` do it.
        weight: Of the terms of propagated logits, where the method does not publish one.
    """

    def __init__(self, config: PropagationConfig):
        self.config = config
        self.head, self.regions, self.weight = bool(config.head), bool(config.regions), config.weight

    def logits(self, out: Prediction) -> Tensor:
        """The logits spread along the correlation map, of the stride of the last features."""
        query, key = _query_key(out)
        return nn.propagate_logits(query, key, out.logits)

    def from_start(self, corr: Tensor, progress: Progress) -> Tensor:
        """The term of propagated logits under pseudo-labels; times 0 before the step `propagation.corr_from`."""
        return corr * float(progress.step >= self.config.corr_from)

    def masks(self, out: Prediction, size: tuple[int, int], progress: Progress) -> RegionMasks | None:
        """Region masks of the images; None without `regions`, and before `propagation.regions_from`."""
        if not self.regions or progress.step < self.config.regions_from:
            return None
        return self.sample(out, size, progress.generator)

    def sample(self, out: Prediction, size: tuple[int, int], generator: torch.Generator) -> RegionMasks:
        """Region masks of the images."""
        query, key = _query_key(out)
        return nn.sample_region_masks(
            query, key, self.config.num_masks, size, threshold=self.config.mask_threshold,
            connected=self.config.connected, generator=generator,
        )  # fmt: skip

    def targets(
        self, pseudo: PseudoLabels, threshold: float | Tensor, masks: RegionMasks | None, valid: Tensor, classes: int
    ) -> tuple[Tensor, Tensor]:
        """Labels, and where they are reliable: at the threshold, then after region propagation where there are masks.

        Only pixels that are `valid` take part in the propagation; see `ops.region_propagate`. A threshold for each
        class, (C,), holds for pixels alone; regions have `propagation.region_threshold`. By the rule "rewrite" a region
        gives its label to its pixels, as published. By the rule "confirm" no label changes: a pixel that a region
        covers becomes reliable where the region's label is the pixel's own.
        """
        labels, reliable = pseudo.labels, pseudo.reliable(threshold)
        if masks is None:
            return labels, reliable
        if self.config.region_threshold is not None:
            threshold = self.config.region_threshold
        given, after = ops.region_propagate(labels, reliable, masks, threshold, num_classes=classes, valid=valid)
        if self.config.rule == "confirm":
            return labels, reliable | (after & (given == labels))
        return given, after

    def rewritten(
        self, pseudo: PseudoLabels, threshold: float | Tensor, masks: RegionMasks | None, classes: int
    ) -> PseudoLabels:
        """Pseudo-labels after region propagation: where a region gave a label that is it, and its confidence is 1.

        For methods that look at the confidence again. Without masks the pseudo-labels as they are.
        """
        if masks is None:
            return pseudo
        labels, given = self.given(pseudo, threshold, masks, pseudo.counted, classes)
        return PseudoLabels(labels, torch.where(given, 1.0, pseudo.confidence), pseudo.ignore)

    def given(
        self, pseudo: PseudoLabels, threshold: float | Tensor, masks: RegionMasks | None, valid: Tensor, classes: int
    ) -> tuple[Tensor, Tensor]:
        """Labels after region propagation, and where a region gave them: to pixels unsure or of another class."""
        labels, reliable = self.targets(pseudo, threshold, masks, valid, classes)
        return labels, reliable & ((labels != pseudo.labels) | ~pseudo.reliable(threshold))


def resolve(config: PropagationConfig, published: bool, pseudo_labels: bool) -> PropagationConfig:
    """The configuration with null replaced by what the method is published with; what cannot be is refused."""
    head = published if config.head is None else config.head
    regions = (published and head) if config.regions is None else config.regions
    if regions and not head:
        raise ConfigError("propagation.regions: expected propagation.head=true, whose map the regions are cut from")
    if regions and not pseudo_labels:
        raise ConfigError("propagation.regions: the method makes no pseudo-labels; leave it false")
    return dataclasses.replace(config, head=head, regions=regions)


def _query_key(out: Prediction) -> tuple[Tensor, Tensor]:
    if out.query is None or out.key is None:
        raise ValueError("the network was not asked for query and key: pass correlate=True")
    return out.query, out.key
