"""Networks with outputs like those of a trained network, for `bench_train`.

A network without training has low confidence everywhere, so region propagation would have nothing to do. Therefore
smooth maps with high confidence at most pixels are added to the outputs of the network, or replace them.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from harness.case import CHANNELS, MASKS, smooth
from omegaconf import OmegaConf
from torch import Tensor, nn

from corrmatch.config import parse
from corrmatch.data.images import IGNORE
from corrmatch.methods.base import Progress
from corrmatch.methods.corrmatch import CorrMatch
from corrmatch.models.deeplab import DeepLabV3Plus
from corrmatch.models.network import Prediction, enlarge
from step.published import PublishedStep

THETA, MOMENTUM = 0.85, 0.999
PLANTED_SHARE = 0.01  # weight of the network's outputs, which are added to the planted values


class PlantedNetwork(nn.Module):
    """DeepLabV3+ with planted values added to its outputs; without a network, the planted values alone.

    `planted` has the values for each call of a training step, by the number of images and the mode (True: training).
    """

    def __init__(self, network: DeepLabV3Plus | None, planted: dict[tuple[int, bool], Prediction]):
        super().__init__()
        self.network, self.planted = network, planted

    def forward(
        self, images: Tensor, *, perturb: bool = False, correlate: bool = False, features: bool = False
    ) -> Prediction:
        """Has the arguments that a step of CorrMatch uses, and the result of `DeepLabV3Plus`."""
        values = self.planted[images.shape[0], self.training]
        if self.network is None:
            return values
        found = self.network(images, perturb=perturb, correlate=correlate, features=features)
        pairs = zip(found, values, strict=True)
        return Prediction(*(None if x is None else PLANTED_SHARE * x + y for x, y in pairs))


class Given(NamedTuple):
    """A factory that always returns the same network."""

    network: nn.Module
    num_classes: int

    def __call__(self) -> nn.Module:
        """The network."""
        return self.network


class StepInputs:
    """A batch and the planted outputs for it, from one seed.

    A step calls the network three times: on the second unlabelled batch in evaluation mode, on labelled and weak images
    together with perturbed features, and on the strong images.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, generator = options, torch.Generator().manual_seed(0)
        count, crop, device = options.batch, options.crop, options.device
        self.planted = {
            (count, False): self.prediction(count, generator, logits_only=True),
            (2 * count, True): self.prediction(2 * count, generator, perturbed=True),
            (count, True): self.prediction(count, generator),
        }
        images = torch.randn(5, count, 3, crop, crop, generator=generator).to(device)
        label = enlarge(self.planted[2 * count, True].logits[:count], (crop, crop)).argmax(1)
        label[:, :4] = IGNORE
        ignore, box = torch.zeros(2, count, crop, crop, dtype=torch.bool, device=device)
        box[::2, crop // 4 : crop // 2, crop // 3 : 3 * crop // 4] = True
        masks = {"ignore": ignore, "box": box.unsqueeze(1)}
        self.batch = {
            "labeled": {"image": images[0], "label": label},
            "unlabeled": masks | {"weak": images[1], "strong": images[2].unsqueeze(1)},
            "mix": masks | {"weak": images[3], "strong": images[4].unsqueeze(1)},
        }

    def prediction(
        self, count: int, generator: torch.Generator, *, logits_only: bool = False, perturbed: bool = False
    ) -> Prediction:
        """Smooth outputs for so many images: logits at stride 4, query and key at stride 8."""
        crop, device = self.options.crop, self.options.device
        shape = smooth(count, CHANNELS, ((crop - 1) // 8 + 1,) * 2, 5, generator)
        logits = enlarge(5 * shape, ((crop - 1) // 4 + 1,) * 2)
        noise = 0.1 * torch.randn(2, *shape.shape, generator=generator)
        noisy_logits = logits + 0.3 * torch.randn(logits.shape, generator=generator)
        query, key = 2 * shape + noise
        if logits_only:
            return Prediction(logits.to(device), None, None, None)
        other = noisy_logits.to(device) if perturbed else None
        return Prediction(logits.to(device), other, query.to(device), key.to(device))

    def progress(self) -> Progress:
        """The first step, whose generator draws the positions of regions."""
        return Progress(0, 1, 1, 0, torch.Generator(self.options.device).manual_seed(1))

    def network(self) -> DeepLabV3Plus:
        """The network, with the same weights in each call."""
        torch.manual_seed(0)
        return DeepLabV3Plus(self.options.backbone, CHANNELS, channels=self.options.channels).to(self.options.device)

    def leaves(self) -> PlantedNetwork:
        """The planted outputs alone, which get gradients in training mode."""
        planted = {}
        for (count, training), values in self.planted.items():
            copies = (None if x is None else x.clone().requires_grad_(training) for x in values)
            planted[count, training] = Prediction(*copies)
        return PlantedNetwork(None, planted)

    def ours(self, network: PlantedNetwork) -> nn.Module:
        """The method of corrmatch."""
        keys = {"threshold": THETA, "momentum": MOMENTUM}
        part = {"head": True, "regions": True, "num_masks": MASKS}
        config = parse([OmegaConf.create({"data": {"root": ""}, "corrmatch": keys, "propagation": part})])
        return CorrMatch(Given(network, CHANNELS), config).to(self.options.device)

    def published(self, network: PlantedNetwork) -> nn.Module:
        """The published method."""
        return PublishedStep(network, THETA, MOMENTUM, MASKS)
