"""Networks whose outputs look like those of a trained one, for `bench_train`.

A fresh network is sure of nothing, which would leave the region steps nothing to do. So smooth maps, sure of their
classes in most places, are added to what the network says; or they stand in for it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from peer_step import PublishedStep
from torch import Tensor, nn
from workload import CHANNELS, MASKS, smooth

from corrmatch.config import parse
from corrmatch.methods.base import Progress
from corrmatch.methods.corrmatch import CorrMatch
from corrmatch.models.deeplab import DeepLabV3Plus
from corrmatch.models.network import Prediction, enlarge

THETA, MOMENTUM = 0.85, 0.999


class Network(nn.Module):
    """DeepLabV3+ with planted values; or, without a network, those values as leaves."""

    def __init__(self, network: DeepLabV3Plus | None, planted: dict[tuple[int, bool], Prediction]):
        super().__init__()
        self.network, self.planted = network, planted

    def forward(self, images: Tensor, *, perturb: bool = False, correlate: bool = False) -> Prediction:
        """As `DeepLabV3Plus`."""
        values = self.planted[images.shape[0], self.training]
        if self.network is None:
            return values
        found = self.network(images, perturb=perturb, correlate=correlate)
        return Prediction(*(None if x is None else 0.01 * x + y for x, y in zip(found, values, strict=True)))


class Given(NamedTuple):
    """A factory that hands out one network."""

    network: nn.Module
    num_classes: int

    def __call__(self) -> nn.Module:
        """The network."""
        return self.network


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
            self.planted[count, training] = Prediction(*raw)
        pictures = torch.randn(5, b, 3, crop, crop, generator=generator).to(device)
        box, nowhere = torch.zeros(2, b, crop, crop, dtype=torch.bool, device=device)
        box[::2, crop // 4 : crop // 2, crop // 3 : 3 * crop // 4] = True
        label = enlarge(self.planted[2 * b, True].logits[:b], (crop, crop)).argmax(1)
        label[:, :4] = 255
        views = {"ignore": nowhere, "box": box.unsqueeze(1)}
        unlabeled, mix = (views | {"weak": pictures[i], "strong": pictures[i + 1].unsqueeze(1)} for i in (1, 3))
        self.batch = {"labeled": {"image": pictures[0], "label": label}, "unlabeled": unlabeled, "mix": mix}

    def progress(self) -> Progress:
        """The first step; its generator draws the positions of the regions."""
        return Progress(0, 1, 1, 0, torch.Generator(self.options.device).manual_seed(1))

    def network(self) -> DeepLabV3Plus:
        """The same weights each time."""
        torch.manual_seed(0)
        return DeepLabV3Plus(self.options.backbone, CHANNELS, channels=self.options.channels).to(self.options.device)

    def leaves(self) -> Network:
        """Recorded outputs, to be given gradients."""
        with_grad = {
            at: Prediction(*(None if x is None else x.clone().requires_grad_(at[1]) for x in raw))
            for at, raw in self.planted.items()
        }
        return Network(None, with_grad)

    def ours(self, network: Network) -> nn.Module:
        """The shipped method."""
        keys = {"threshold": THETA, "momentum": MOMENTUM}
        part = {"head": True, "regions": True, "num_masks": MASKS}
        config = parse([OmegaConf.create({"data": {"root": ""}, "corrmatch": keys, "propagation": part})])
        return CorrMatch(Given(network, CHANNELS), config).to(self.options.device)

    def published(self, network: Network) -> nn.Module:
        """The peer."""
        return PublishedStep(network, THETA, MOMENTUM, MASKS)
