"""Networks whose outputs look like those of a trained one, for `bench_train`.

A fresh network is sure of nothing, which would leave the region steps nothing to do. So smooth maps, sure of their
classes in most places, are added to what the network says; or they stand in for it.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from peer_step import PublishedStep
from torch import Tensor, nn
from workload import CHANNELS, MASKS, smooth

from corrmatch.config import Config, CorrMatchConfig
from corrmatch.models.deeplab import DeepLabV3Plus, Prediction, enlarge
from corrmatch.nn import CorrelationHead
from corrmatch.training.methods import CorrMatch

THETA, MOMENTUM = 0.85, 0.999


class Raw(NamedTuple):
    """What a network says before any correlation."""

    logits: Tensor
    perturbed: Tensor | None
    query: Tensor | None
    key: Tensor | None


class Network(nn.Module):
    """DeepLabV3+ that stops at query and key, with planted values; or, without a network, those values as leaves."""

    def __init__(self, network: DeepLabV3Plus | None, planted: dict[tuple[int, bool], Raw]):
        super().__init__()
        self.network, self.planted = network, planted

    def forward(self, images: Tensor, *, perturb: bool = False, correlate: bool = False) -> Raw:
        """As `DeepLabV3Plus`."""
        values = self.planted[images.shape[0], self.training]
        if self.network is None:
            return values
        low, high = self.network.features(images)
        both = (torch.cat([x, self.network.perturb(x)]) if perturb else x for x in (low, high))
        found = [*self.network.segment(*both).split(images.shape[0]), None][:2]
        if correlate:
            head = self.network.correlation
            hidden = head.project(high)
            found += [head.query(hidden), head.key(hidden)]
        pairs = zip([*found, None, None][:4], values, strict=True)
        return Raw(*(None if x is None else 0.01 * x + value for x, value in pairs))


class Plain(nn.Module):
    """A module that returns what it was given last."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        """Whatever x is."""
        return self.value


class WithHead(nn.Module):
    """A `Network` behind corrmatch's interface: the shipped correlation head takes over from query and key."""

    def __init__(self, network: Network):
        super().__init__()
        self.network, self.head = network, CorrelationHead(1, CHANNELS)
        self.head.project, self.head.query, self.head.key = nn.Identity(), Plain(), Plain()

    def forward(self, images: Tensor, *, perturb: bool = False, propagate: bool = False, **regions: Any) -> Prediction:
        """As `DeepLabV3Plus`."""
        out = self.network(images, perturb=perturb, correlate=propagate)
        if not propagate:
            return Prediction(out.logits, out.perturbed)
        self.head.query.value, self.head.key.value = out.query, out.key
        size = (images.shape[2], images.shape[3])
        return Prediction(out.logits, out.perturbed, *self.head(out.query, out.logits, mask_size=size, **regions))


class Setting:
    """Inputs and planted values, from one seed."""

    def __init__(self, options: argparse.Namespace):
        self.options, generator = options, torch.Generator().manual_seed(0)
        b, crop, device = options.batch, options.crop, options.device
        grid = ((crop - 1) // 8 + 1,) * 2
        self.planted = {}
        for count, training in ((b, False), (2 * b, True), (b, True)):
            shape = smooth(count, CHANNELS, grid, 5, generator)
            logits = enlarge(5 * shape, ((crop - 1) // 4 + 1,) * 2)
            noise = 0.1 * torch.randn(2, *shape.shape, generator=generator)
            raw = (logits, logits + 0.3 * torch.randn(logits.shape, generator=generator), *(2 * shape + noise))
            keep = 4 if training else 1
            raw = [x.to(device) if i < keep and (i != 1 or count == 2 * b) else None for i, x in enumerate(raw)]
            self.planted[count, training] = Raw(*raw)
        pictures = torch.randn(5, b, 3, crop, crop, generator=generator).to(device)
        box, nowhere = torch.zeros(2, b, crop, crop, dtype=torch.bool, device=device)
        box[::2, crop // 4 : crop // 2, crop // 3 : 3 * crop // 4] = True
        label = enlarge(self.planted[2 * b, True].logits[:b], (crop, crop)).argmax(1)
        label[:, :4] = 255
        unlabeled = {"weak": pictures[1], "strong": pictures[2], "ignore": nowhere, "box": box}
        mix = {"weak": pictures[3], "strong": pictures[4], "ignore": nowhere, "box": box}
        self.batch = {"labeled": {"image": pictures[0], "label": label}, "unlabeled": unlabeled, "mix": mix}

    def generator(self) -> torch.Generator:
        """Draws the positions of the regions."""
        return torch.Generator(self.options.device).manual_seed(1)

    def network(self) -> DeepLabV3Plus:
        """The same weights each time."""
        torch.manual_seed(0)
        return DeepLabV3Plus(self.options.backbone, CHANNELS, channels=self.options.channels).to(self.options.device)

    def leaves(self) -> Network:
        """Recorded outputs, to be given gradients."""
        with_grad = {
            at: Raw(*(None if x is None else x.clone().requires_grad_(at[1]) for x in raw))
            for at, raw in self.planted.items()
        }
        return Network(None, with_grad)

    def ours(self, network: Network) -> nn.Module:
        """The shipped method."""
        config = Config(corrmatch=CorrMatchConfig(threshold=THETA, momentum=MOMENTUM, num_masks=MASKS))
        return CorrMatch(WithHead(network), config).to(self.options.device)  # type: ignore[arg-type]

    def published(self, network: Network) -> nn.Module:
        """The peer."""
        return PublishedStep(network, THETA, MOMENTUM, MASKS)
