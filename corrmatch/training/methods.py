"""What a training step computes. A method says which streams it draws, holds its networks and state, and gives a loss.

The loop knows nothing else of it: it builds the class that `METHODS` names, feeds batches, and saves `state_dict()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from corrmatch import ops
from corrmatch.config import Config, ConfigError
from corrmatch.masks import RegionMasks
from corrmatch.models.deeplab import DeepLabV3Plus, enlarge
from corrmatch.nn import DynamicThreshold
from corrmatch.training import losses
from corrmatch.training.targets import PseudoLabels, make_targets

Batch = dict[str, dict[str, Tensor]]
SHOWN_MASKS = 6
SAMPLED_MASKS = 16  # whose area is logged: their positions are drawn at random, so the first are as good as all


class Step(NamedTuple):
    """The loss of one batch and what is to be logged: 0-d tensors, left on the device."""

    loss: Tensor
    scalars: dict[str, Tensor]


class Method(nn.Module):
    """Base of all methods.

    Attributes:
        streams: What a batch consists of; see `corrmatch.data.streams`.
        correlation: Whether the network has a correlation head.
        model: The network that is evaluated. Further networks and buffers are further attributes.
    """

    streams: ClassVar[tuple[str, ...]]
    correlation: ClassVar[bool] = False

    def __init__(self, model: DeepLabV3Plus, config: Config):
        super().__init__()
        self.model = model
        self.ohem = config.train.ohem

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """The loss of a batch. The generator is the same in all processes."""
        raise NotImplementedError

    def panels(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Label maps (B, H, W), bool maps and bool masks (B, K, H, W) to look at; the network is in evaluation mode."""
        return {"prediction": enlarge(model(images).logits, images.shape[2:]).argmax(1)}


class Supervised(Method):
    """The labelled pictures alone."""

    streams = ("labeled",)

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """Cross-entropy."""
        labeled = batch["labeled"]
        loss = losses.supervised(self.model(labeled["image"]).logits, labeled["label"], ohem=self.ohem)
        return Step(loss, {"loss": loss.detach()})


class CorrMatch(Method):
    """CorrMatch (CVPR 2024): weak to strong consistency with labels that are propagated along correlations."""

    streams = ("labeled", "unlabeled", "mix")
    correlation = True

    def __init__(self, model: DeepLabV3Plus, config: Config):
        super().__init__(model, config)
        self.theta = DynamicThreshold(config.corrmatch.threshold, config.corrmatch.momentum)
        self.regions = {"num_masks": config.corrmatch.num_masks, "connected": config.corrmatch.connected}

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """The six terms of `losses`."""
        labeled, unlabeled, mix = (batch[name] for name in self.streams)
        box, count, size = unlabeled["box"], labeled["image"].shape[0], labeled["image"].shape[2:]
        with evaluating(self.model), torch.no_grad():
            labels, confidence, _ = ops.pseudo_label(self.model(mix["weak"]).logits, size=(size[0], size[1]))
            pasted = PseudoLabels(labels, confidence, mix["ignore"])
        weak = self.model(
            torch.cat([labeled["image"], unlabeled["weak"]]),
            perturb=True, propagate=True, generator=generator, **self.regions,
        )  # fmt: skip
        strong = self.model(torch.where(box.unsqueeze(1), mix["strong"], unlabeled["strong"]), propagate=True)
        outputs = losses.Outputs(
            weak.logits[:count], weak.propagated[:count], weak.logits[count:].detach(), weak.perturbed[count:],
            weak.propagated[count:], strong.logits, strong.propagated,
        )  # fmt: skip
        masks = RegionMasks(weak.masks.packed[count:], weak.masks.size)
        targets = make_targets(outputs.weak, pasted, unlabeled["ignore"], box, masks, self.theta, labeled["label"])
        parts = losses.terms(outputs, targets, ohem=self.ohem)
        loss = losses.total(parts)
        counted = targets.counted.count_nonzero().clamp(min=1)
        sampled = RegionMasks(masks.packed[:1, :SAMPLED_MASKS], masks.size)
        return Step(loss, {name: part.detach() for name, part in parts.items()} | {
            "loss": loss.detach(),
            "threshold": self.theta.threshold.clone(),
            "reliable": targets.reliable_before.count_nonzero() / counted,
            "reliable_after": targets.reliable.count_nonzero() / counted,
            "mask_area": sampled.area().float().mean() / box[0].numel(),
        })  # fmt: skip

    def panels(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """What the pictures would be given as pseudo-labels."""
        generator = torch.Generator(images.device).manual_seed(0)
        out = model(images, propagate=True, generator=generator, **self.regions)
        labels, confidence, _ = ops.pseudo_label(out.logits, size=(images.shape[2], images.shape[3]))
        reliable = confidence >= self.theta.threshold
        propagated, after = ops.region_propagate(
            labels, reliable, out.masks, self.theta.threshold, num_classes=out.logits.shape[1]
        )
        some = RegionMasks(out.masks.packed[:, :SHOWN_MASKS].contiguous(), out.masks.size)
        return {"prediction": labels, "reliable": reliable, "propagated": propagated, "reliable after": after,
                "regions": some.to_bool()}  # fmt: skip


METHODS: dict[str, type[Method]] = {"supervised": Supervised, "corrmatch": CorrMatch}


def build_method(config: Config, num_classes: int, *, pretrained: bool = True) -> Method:
    """The method that a configuration names, with its network; without `pretrained`, for weights from a checkpoint."""
    kind, model = METHODS[config.method], config.model
    try:
        network = DeepLabV3Plus(
            model.backbone, num_classes, output_stride=model.output_stride, atrous_rates=model.atrous_rates,
            channels=model.channels, correlation=kind.correlation, pretrained=model.pretrained if pretrained else False,
        )  # fmt: skip
    except ValueError as error:  # it names one of these keys
        raise ConfigError(f"model.{error}") from error
    return kind(network, config)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
