"""Correlation propagation as an option of every method: what the keys `propagation.*` switch on."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as functional
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
        head: Whether a correlation head is trained. `logits` uses it.
        regions: Whether pseudo-labels are propagated in regions. `masks` and `targets` do it.
        spreads: Whether pseudo-labels are propagated along the decoder's features. `spread` does it.
        weight: The weight of the terms of propagated logits, in methods that do not publish one.
    """

    def __init__(self, config: PropagationConfig):
        self.config = config
        self.head, self.regions, self.weight = bool(config.head), bool(config.regions), config.weight
        self.spreads = config.label_temperature is not None

    def spread(self, out: Prediction) -> Tensor:
        r"""The logits that pseudo-labels are made from: of propagated probabilities with a `label_temperature` T.

        .. math::
            z_j \leftarrow \log \sum_i P_{ij} \operatorname{softmax}(z_i), \qquad
            P_{ij} = \operatorname{softmax}_j (\cos(x_i, x_j) / T)

        with the decoder's features x of `out`. The softmax of the result divides by the mass sum_i P_ij. Labels become
        more alike where features are alike. Without the key these are the logits z of `out`. No gradient.
        """
        logits = out.logits.detach()
        if self.config.label_temperature is None:
            return logits
        if out.features is None:
            raise ValueError("the network was not asked for the decoder's features: pass features=True")
        unit = functional.normalize(out.features.detach().float(), dim=1)
        scale = 1 / self.config.label_temperature
        spread = ops.pixel_propagate(unit, unit, logits.float().softmax(1), scale=scale)
        return spread.clamp(min=torch.finfo(torch.float32).tiny).log().to(logits.dtype)

    def logits(self, out: Prediction) -> Tensor:
        """The logits propagated along the correlation map, at the stride of the last features."""
        query, key = _query_key(out)
        return nn.propagate_logits(query, key, out.logits)

    def from_start(self, corr: Tensor, progress: Progress) -> Tensor:
        """The term of propagated logits with pseudo-labels, multiplied by 0 before step `propagation.corr_from`."""
        return corr * float(progress.step >= self.config.corr_from)

    def fits(self, threshold: float | Tensor) -> bool:
        """Whether regions have a threshold: that of pixels unless it is one for each class, or their own."""
        single = not isinstance(threshold, Tensor) or threshold.dim() == 0
        return single or self.config.region_threshold is not None

    def check(self, threshold: float | Tensor) -> None:
        """Raises ConfigError if regions are on and have no threshold."""
        if self.regions and not self.fits(threshold):
            raise ConfigError(
                "propagation.region_threshold: expected a value, for pixels have a threshold for each class"
            )

    def masks(self, out: Prediction, size: tuple[int, int], progress: Progress) -> RegionMasks | None:
        """Region masks of the images; None without `regions` and before step `propagation.regions_from`."""
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
        """Labels and where they are reliable, after region propagation if there are masks.

        Only `valid` pixels take part; see `ops.region_propagate`. A threshold for each class, (C,), applies to pixels
        only, and regions use `propagation.region_threshold`. With the rule "rewrite" a region gives its label to its
        pixels, as published. With the rule "confirm" no label changes: a pixel in a region becomes reliable if its own
        label is the label of the region.
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
        """Pseudo-labels after region propagation. A label that a region gave has the confidence 1.

        This is for methods that use the confidence again. Without masks the pseudo-labels are returned unchanged.
        """
        if masks is None:
            return pseudo
        labels, given = self.given(pseudo, threshold, masks, pseudo.counted, classes)
        return PseudoLabels(labels, torch.where(given, 1.0, pseudo.confidence), pseudo.ignore)

    def given(
        self, pseudo: PseudoLabels, threshold: float | Tensor, masks: RegionMasks | None, valid: Tensor, classes: int
    ) -> tuple[Tensor, Tensor]:
        """Labels after region propagation, and where a region gave them: to unreliable pixels or as another class."""
        labels, reliable = self.targets(pseudo, threshold, masks, valid, classes)
        return labels, reliable & ((labels != pseudo.labels) | ~pseudo.reliable(threshold))


def resolve(config: PropagationConfig, published: bool, pseudo_labels: bool) -> PropagationConfig:
    """The configuration with null replaced by the method's published choice. Raises ConfigError for contradictions."""
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
