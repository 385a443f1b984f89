r"""PRCL (AAAI 2023, arXiv 2210.14670): mean teacher with ClassMix, and contrast of probabilistic representations.

.. math::
    L = L_x + L_u + \lambda\,L_c, \qquad
    s\bigl((\mu, v), (\mu', v')\bigr) = -\tfrac12 \operatorname{mean}_d \Bigl[
        \frac{(\hat\mu_d - \hat\mu'_d)^2}{v_d + v'_d} + \log (v_d + v'_d) \Bigr]

Each pixel is a Gaussian with mean mu and variance v. The prototype of a class is the product of its pixels' Gaussians,
so unsure pixels count little. L_c draws unsure pixels to their prototype and away from pixels of other classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corrmatch import ops
from corrmatch.config import Config, TrainConfig, key
from corrmatch.data.datasets import IGNORE
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import Colour, Geometry, View
from corrmatch.methods.base import Batch, Method, Progress, Step
from corrmatch.methods.parts.geometric import follow, scale_and_crop
from corrmatch.methods.parts.mixing import class_mix, with_next
from corrmatch.methods.parts.photometric import flip, recolour
from corrmatch.methods.parts.processes import total
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, nearest
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.deeplab import conv_block
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction

COLOUR = Colour((0.25, 0.25, 0.25, 0.25), 0.8, gray=0, blur=0.5, sigma=(0.15, 1.15))
KNOWN = View(Geometry(scales=(0.5, 1.5), pad="mirror"), weak=COLOUR)
WEAK = View(Geometry(scales=(1.0,), flip=0, pad="mirror"))
LEAST_LR = 1e-6
LARGEST = 80.0  # of an exponent, below float32's


class PRCL(Method):
    """Mean teacher with ClassMix and probabilistic contrast. The teacher is evaluated."""

    @dataclass
    class Options:
        """Pseudo-labels, contrast, teacher."""

        threshold: float = key(0.97, "confidence whose share of an image is its weight", low=0, high=1)
        weak_threshold: float = key(0.7, "confidence from which an unlabelled pixel is contrasted", low=0, high=1)
        hard_threshold: float = key(0.8, "a pixel is an anchor where its label is less probable", low=0, high=1)
        scale: float = key(1.5, "largest of strong views, 0.5 the smallest; 2 on Cityscapes", low=0.5)
        weight: float = key(1.0, "of the contrast at the start, exp(-5) times that at the end", low=0)
        temperature: float = key(100.0, "of the contrast", low=1e-6)
        anchors: int = key(256, "of each class", low=1)
        negatives: int = key(512, "of each anchor", low=1)
        dimensions: int = key(256, "of the representations", low=1)
        probability_lr: float = key(5e-5, "learning rate of the probability head, whatever train.lr is", low=0)
        decay: float = key(0.99, "of the teacher", low=0, high=1)

    score_all = True
    bar = ("confident",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.classes, width = build.num_classes, self.model.classifier.in_channels
        self.teacher = Teacher(self.model, self.options.decay, ramp=True, mode="train", buffers="own")
        fused, dimensions = self.model.fused_channels, self.options.dimensions
        self.representation = nn.Sequential(conv_block(fused, width, 3), nn.Conv2d(width, dimensions, 1))
        self.probability = ProbabilityHead(fused, width, dimensions)

    def streams(self) -> Mapping[str, Stream]:
        """Labelled and unlabelled images; strong views are made in the step."""
        return {"labeled": replace(LABELED, view=KNOWN), "unlabeled": replace(UNLABELED, view=WEAK)}

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """The probability head has its own learning rate. No rate falls below 1e-6."""
        own = {id(p) for p in self.probability.parameters()}
        groups = super().parameter_groups(train)
        apart = [p for group in groups for p in group["params"] if id(p) in own]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        groups.append({"name": "probability", "lr": self.options.probability_lr, "params": apart})
        return [group | {"least_lr": LEAST_LR} for group in groups]

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The three terms, and those of the propagated logits if there is a correlation head."""
        labeled, unlabeled, part = batch["labeled"], batch["unlabeled"], self.propagation
        truth, size = labeled["label"], (unlabeled["ignore"].shape[1], unlabeled["ignore"].shape[2])
        taught = self.teacher(unlabeled["weak"], correlate=part.regions)
        pseudo = PseudoLabels.of(taught.logits, unlabeled["ignore"])
        masks = part.masks(taught, size, progress)
        pseudo = part.rewritten(pseudo, self.options.threshold, masks, self.classes)
        strong = self.strong(unlabeled["weak"], pseudo, progress.generator)
        # Two passes, as published: norm layers do not see both kinds of images together.
        passes = [self.model(images, fused=True, correlate=part.head) for images in (labeled["image"], strong.images)]
        known, out = passes
        pixels = self.pixels(passes, truth, strong)
        rate = self.rate(strong)
        scalars = {
            "x": self.supervised(known.logits, truth),
            "u": unsupervised(out.logits, strong.labels, rate),
            "contrast": self.contrast(pixels, progress.generator),
        }
        loss = scalars["x"] + scalars["u"] + self.contrast_weight(progress) * scalars["contrast"]
        if part.head:
            scalars["x_corr"] = self.supervised(part.logits(known), truth)
            scalars["u_corr"] = part.from_start(unsupervised(part.logits(out), strong.labels, rate), progress)
            loss = loss + part.weight * (scalars["x_corr"] + scalars["u_corr"]) / 2
        scalars["confident"] = rate.mean()
        return Step.of(loss, scalars)

    def strong(self, images: Tensor, pseudo: PseudoLabels, generator: torch.Generator) -> Strong:
        """Strong views: scaled, cropped, mixed with the next image, coloured, flipped, with labels and confidence."""
        x, placed = scale_and_crop(images, (0.5, self.options.scale), generator)
        labels = follow(placed, pseudo.labels.masked_fill(pseudo.ignore, IGNORE), IGNORE)
        confidence = follow(placed, pseudo.confidence.masked_fill(pseudo.ignore, 0), 0)
        mask = class_mix(torch.where(labels == IGNORE, self.classes, labels), self.classes + 1, generator)
        x, labels, confidence = (with_next(maps, mask) for maps in (x, labels, confidence))
        return Strong(*flip(generator, recolour(x, COLOUR, generator), labels, confidence))

    def rate(self, strong: Strong) -> Tensor:
        """(B,): the share of confident pixels of each image."""
        counted = (strong.labels != IGNORE).flatten(1).sum(1)
        return (strong.confidence >= self.options.threshold).flatten(1).sum(1) / counted.clamp(min=1)

    def contrast_weight(self, progress: Progress) -> float:
        """lambda, which falls from its first value to exp(-5) times that over the epochs."""
        passed = progress.epoch * progress.epoch_steps / progress.steps
        return self.options.weight * math.exp(-5 * passed**2)

    def pixels(self, passes: list[Prediction], truth: Tensor, strong: Strong) -> Pixels:
        """All pixels of the maps, labelled images first. The probability head sees them together."""
        size = passes[0].logits.shape[2:]
        mu = torch.cat([self.representation(out.fused) for out in passes])
        variance = self.probability(torch.cat([out.fused for out in passes]))  # type: ignore[misc]
        sure = strong.confidence >= self.options.weak_threshold
        labels = torch.cat([nearest(truth, size), nearest(strong.labels.masked_fill(~sure, IGNORE), size)])
        labels = torch.where(labels == IGNORE, self.classes, labels)
        with torch.no_grad():
            q = torch.cat([out.logits for out in passes]).float().softmax(1)
            own = q.gather(1, labels.clamp(max=self.classes - 1).unsqueeze(1))[:, 0]
            hard = torch.where(own < self.options.hard_threshold, labels, self.classes)
        mu, variance = (x.float().movedim(1, -1).flatten(0, 2) for x in (mu, variance))
        return Pixels(mu, variance, labels.flatten(), hard.flatten())

    def contrast(self, pixels: Pixels, generator: torch.Generator) -> Tensor:
        """L_c of one process. The prototypes include the pixels of all processes."""
        options, classes = self.options, self.classes
        means = prototypes(total(prototype_sums(pixels, classes)))
        groups, hard = by_class(pixels.labels, classes), by_class(pixels.hard, classes)
        present = groups.size > 0
        chance = class_chances(means, present, options.temperature)
        anchors, negatives = draw(groups, hard, chance, options.anchors, options.negatives, generator)
        terms = class_losses(pixels, means, anchors, negatives, options.temperature)
        counted = (hard.size > 0) & (present.sum() >= 2)  # of a single class there is nothing to keep away from
        return torch.where(counted, terms, 0).sum() / present.sum().clamp(min=1)

    def after_step(self, progress: Progress) -> None:
        """Updates the teacher."""
        self.teacher.follow(self.model, progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The teacher, then the student."""
        return {"teacher": self.teacher.network, "student": self.model}


class Strong(NamedTuple):
    """Strong views, with labels (IGNORE in padding) and confidence (B, H, W)."""

    images: Tensor
    labels: Tensor
    confidence: Tensor


class Pixels(NamedTuple):
    """Representations of pixels. The label C means no label."""

    mu: Tensor  # (N, D)
    variance: Tensor  # (N, D)
    labels: Tensor  # (N,)
    hard: Tensor  # (N,), the label where it is not probable yet


class Gaussians(NamedTuple):
    """The prototypes of the classes (C, D): mean 0 and variance 1 for a class without pixels."""

    mu: Tensor
    variance: Tensor


class Groups(NamedTuple):
    """Indices of pixels sorted by class: those of class c are `size[c]` entries from `first[c]` on."""

    order: Tensor
    first: Tensor
    size: Tensor


class ProbabilityHead(nn.Module):
    r"""Variance of each pixel in (0, 1), channel by channel.

    .. math:: v = \frac{e}{1 + e}, \qquad e = \exp(\gamma\,c + \beta) + 10^{-6}

    c is made of features by two 1 x 1 convolutions whose weights have rows of norm 1, a norm layer behind each.
    """

    def __init__(self, channels: int, hidden: int, dimensions: int):
        super().__init__()
        self.first = nn.Parameter(nn.init.kaiming_normal_(torch.empty(hidden, channels)))
        self.second = nn.Parameter(nn.init.kaiming_normal_(torch.empty(dimensions, hidden)))
        self.norm, self.plain_norm = nn.BatchNorm2d(hidden), nn.BatchNorm2d(dimensions, affine=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """From (B, channels, h, w) to (B, dimensions, h, w)."""
        first, second = (F.normalize(weight)[..., None, None] for weight in (self.first, self.second))
        c = self.plain_norm(F.conv2d(self.norm(F.conv2d(x, first)).relu(), second))
        e = (self.gamma * c.float() + self.beta).clamp(max=LARGEST).exp() + 1e-6
        return e / (1 + e)


def unsupervised(logits: Tensor, labels: Tensor, rate: Tensor) -> Tensor:
    """Cross-entropy times the rate (B,) of the image, averaged over the pixels of the batch where it is more than 0."""
    counted = labels != IGNORE
    _, pixels = ops.cross_entropy(logits.detach(), labels, counted.float())
    positive = pixels > 0
    weight = rate.view(-1, 1, 1) / positive.count_nonzero().clamp(min=1)
    return ops.cross_entropy(logits, labels, torch.where(positive, weight, 0.0))[0]


def score(mu: Tensor, variance: Tensor, other_mu: Tensor, other_variance: Tensor) -> Tensor:
    """s, the likelihood that two Gaussians (..., D) are the same. The means have norm 1."""
    both = variance + other_variance
    return -0.5 * ((mu - other_mu).square() / both + both.log()).mean(-1)


@torch.no_grad()
def prototype_sums(pixels: Pixels, classes: int) -> Tensor:
    """(2, C, D): for each class the sums of 1 / v and of mu / v, which add up over processes."""
    of_class = (pixels.labels == torch.arange(classes, device=pixels.labels.device).unsqueeze(1)).float()
    with torch.autocast(of_class.device.type, enabled=False):
        return torch.stack([of_class @ x for x in (1 / pixels.variance, pixels.mu / pixels.variance)])


def prototypes(sums: Tensor) -> Gaussians:
    """Products of Gaussians from their sums."""
    precision, weighted = sums
    variance = 1 / torch.where(precision > 0, precision, 1)
    return Gaussians(variance * weighted, variance)


def class_chances(means: Gaussians, present: Tensor, temperature: float) -> Tensor:
    """(C, C): the chance that a negative of class c is of class c'. Only other classes that are present have one."""
    mu = F.normalize(means.mu)
    scores = score(mu.unsqueeze(1), means.variance.unsqueeze(1), mu, means.variance) / temperature
    out = torch.eye(len(mu), dtype=torch.bool, device=mu.device) | ~present
    return scores.masked_fill(out, torch.finfo(scores.dtype).min).softmax(1)  # where all are out, all are alike


def by_class(labels: Tensor, classes: int) -> Groups:
    """Groups pixels by their labels (N,). Labels from `classes` on are left out."""
    ordered, order = labels.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(classes + 1, device=labels.device))
    return Groups(order, ends[:-1], ends.diff())


def draw(
    groups: Groups, hard: Groups, chance: Tensor, anchors: int, negatives: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of anchors (C, Q) and of their negatives (C, Q, N), with replacement; arbitrary where there is none."""
    classes, device = chance.shape[0], chance.device

    def pick(of: Groups, which: Tensor) -> Tensor:
        lot = torch.rand(which.shape, generator=generator, device=device)
        size = of.size[which]
        place = of.first[which] + torch.minimum((lot * size).long(), size - 1)
        return of.order[place.clamp(0, len(of.order) - 1)]

    chosen = torch.multinomial(chance, anchors * negatives, replacement=True, generator=generator)
    own = torch.arange(classes, device=device).unsqueeze(1).expand(classes, anchors)
    return pick(hard, own), pick(groups, chosen.view(classes, anchors, negatives))


def class_losses(pixels: Pixels, means: Gaussians, anchors: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(C,): each anchor's cross-entropy of its prototype among the negatives, averaged. Only anchors take a gradient.

    Class by class, recomputed in the backward: tensors of anchors x negatives x channels are of one class at a time.
    """
    mu, variance = F.normalize(pixels.mu[anchors], dim=-1), pixels.variance[anchors]
    others, spread = F.normalize(pixels.mu.detach()), pixels.variance.detach()
    target = F.normalize(means.mu)

    def one(mu: Tensor, variance: Tensor, target: Tensor, target_variance: Tensor, index: Tensor) -> Tensor:
        positive = score(mu, variance, target, target_variance).unsqueeze(1)
        away = score(mu.unsqueeze(1), variance.unsqueeze(1), others[index], spread[index])
        scores = torch.cat([positive, away], 1) / temperature
        return (scores.logsumexp(1) - scores[:, 0]).mean()

    parts = zip(mu, variance, target, means.variance, negatives, strict=True)
    return torch.stack([checkpoint(one, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
