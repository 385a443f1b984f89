"""Pseudo-labels of a whole set on disk: the most confident ones of each class, merged with those of the phase before.

Maps of one image are (..., H, W): labels, IGNORE where there is none, and the confidence of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrmatch import ops
from corrmatch.data.datasets import IGNORE
from corrmatch.data.maps import SHARES, Maps, atomically, discard, save_array
from corrmatch.masks import RegionMasks
from corrmatch.methods.base import Run
from corrmatch.methods.parts.labelling import barrier, claim, over_images, wait_for
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.models.network import Network, Prediction, evaluating

EVERY = 16  # a pixel in so many counts for the thresholds
LEAST = 1e-5  # threshold of a class of which too little is there
REGION = 0.85  # share of a region that has to be labelled, and of these with its class, unless the keys say another


class Said(NamedTuple):
    """Labels and their confidence."""

    labels: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Rules:
    """How many labels are kept, and how two labels of a pixel are merged; see `class_thresholds` and `merge`."""

    classes: int
    ratio: float
    gap: float
    background: int | None
    dropped_loses: bool


def class_thresholds(labels: Tensor, confidence: Tensor, ratio: float, classes: int) -> Tensor:
    """The thresholds (C,) of labels and confidences (N,), which the share `ratio` of the labels of each class reaches.

    A class has 1e-5 if this share is less than one label.
    """
    found = torch.full((classes,), LEAST, dtype=confidence.dtype)
    for c in range(classes):
        values, n = confidence[labels == c].sort().values, int((labels == c).sum())
        if n * ratio >= 1:
            found[c] = values[0 if ratio >= 1 else n - math.floor(n * ratio) - 1]
    return found


def drop(said: Said, thresholds: Tensor) -> Said:
    """The labels, with IGNORE where the confidence is below the threshold of the class."""
    unsure = said.confidence < thresholds.to(said.confidence.device)[said.labels.long()]
    return Said(said.labels.masked_fill(unsure, IGNORE), said.confidence)


def merge(current: Said, previous: Said, rules: Rules) -> Said:
    """One of two labels at each pixel.

    If one of the two is the background, the other one is kept. Otherwise the previous label is kept where its
    confidence is larger by the gap. IGNORE counts as a label that is not the background. With `dropped_loses` a label
    is always preferred to IGNORE. Without a background the gap decides alone.
    """
    takes = previous.confidence - current.confidence >= rules.gap
    if rules.background is not None:
        mine, theirs = (said.labels == rules.background for said in (current, previous))
        takes = torch.where(mine != theirs, mine, takes)
    if rules.dropped_loses:
        gone, lost = (said.labels == IGNORE for said in (current, previous))
        takes = torch.where(gone != lost, gone, takes)
    return Said(*(torch.where(takes, old, new) for new, old in zip(current, previous, strict=True)))


def through_regions(said: Said, masks: RegionMasks, valid: Tensor, part: Propagation, classes: int) -> Said:
    """Labels (1, H, W) after region propagation, region by region.

    A pixel that a region labels has the smaller one of its own confidence and the region's mean.
    """
    kept = reliable = said.labels != IGNORE
    labels, confidence = said.labels.masked_fill(~kept, 0), said.confidence
    for k in range(masks.packed.shape[1]):
        region = RegionMasks(masks.packed[:, k : k + 1].contiguous(), masks.size)
        given, after = part.targets(PseudoLabels(labels, kept.float(), ~valid), REGION, region, valid, classes)
        inside = region.to_bool()[:, 0] & valid
        gets = inside & after & ((given != labels) | ~reliable)
        mean = torch.where(inside, confidence, 0).sum() / inside.sum().clamp(min=1)
        confidence = torch.where(gets, confidence.clamp(max=mean), confidence)
        labels, reliable = given, reliable | after
    return Said(labels.masked_fill(~reliable, IGNORE), confidence)


class Rehearsal:
    """Makes the label maps of one network for one phase.

    Args:
        folder: The folder of the maps.
        network: The fingerprint of the labelling network.
        phase: The phase that uses the labels.
    """

    def __init__(self, folder: Path, network: str, phase: int):
        facts = {"network": network, "phase": phase}
        self.labels = Maps(folder, facts)
        self.confidence = Maps(folder, facts, SHARES)
        self.phase, self.work = phase, folder / "work"

    def make(
        self, current: Network, previous: Network | None, rules: Rules, part: Propagation, run: Run, about: str
    ) -> Tensor:
        """Labels all unlabelled images that have no labels yet. Returns the thresholds (C,).

        Two passes: the first for the thresholds, from a sample of the pixels of all images; the second labels.
        """
        items = run.data.unlabeled
        claim([self.labels], items, run)
        labels, kept = self.labels.paths(items), self.labels.folder / "thresholds.npy"
        if not all(path.exists() for path in labels):
            if run.process == 0:
                self.work.mkdir(exist_ok=True)
            barrier()
            self._sample(current, run, about)
            if run.process == 0 and not kept.exists():
                sample = self._samples(len(items))
                found = class_thresholds(sample.labels, sample.confidence, rules.ratio, rules.classes).numpy()
                atomically(kept, lambda draft: save_array(draft, found))
            wait_for([kept])
            thresholds = torch.from_numpy(np.load(kept))

            def label(i: int, image: Tensor) -> None:
                # Not the global generator: a resumed run has to draw what one drew that was not interrupted.
                seed = np.random.SeedSequence((run.config.train.seed, self.phase, i)).generate_state(1)[0]
                generator = torch.Generator(run.device).manual_seed(int(seed))
                said = labelled(image, current, previous, thresholds, rules, part, generator)
                self.confidence.write(i, said.confidence.cpu().numpy())
                self.labels.write(i, said.labels.to(torch.uint8).cpu().numpy())

            over_images(items, labels, label, run, f"labels of {about}")
        barrier()
        if run.process == 0:
            discard(self.work)
        return torch.from_numpy(np.load(kept))

    def _sample(self, network: Network, run: Run, about: str) -> None:
        def sample(i: int, image: Tensor) -> None:
            said = ask(network, image).said
            rows = [x.flatten()[::EVERY].cpu().numpy() for x in said]
            atomically(self._file(i), lambda draft: save_array(draft, np.stack(rows).astype(np.float32)))

        items = run.data.unlabeled
        files = [self._file(i) for i in range(len(items))]
        over_images(items, files, sample, run, f"thresholds of {about}")

    def _samples(self, count: int) -> Said:
        rows = np.concatenate([np.load(self._file(i)) for i in range(count)], 1)
        return Said(*torch.from_numpy(rows))

    def _file(self, index: int) -> Path:
        return self.work / f"{index:06}.npy"


class Answer(NamedTuple):
    """The predictions of a network on an image."""

    said: Said  # (H, W)
    out: Prediction  # of the `fitting` image
    fitted: tuple[int, int]  # its size


@torch.no_grad()
def ask(network: Network, image: Tensor, correlate: bool = False) -> Answer:
    """Labels of an image (3, H, W) in evaluation mode."""
    height, width = image.shape[1:]
    with evaluating(network):
        fitting = network.fitting(image[None])
        out = network(fitting, correlate=correlate)
    size = (fitting.shape[2], fitting.shape[3])
    labels, confidence, _ = ops.pseudo_label(out.logits, size=size)
    return Answer(Said(*(x[0, :height, :width] for x in (labels, confidence))), out, size)


def labelled(
    image: Tensor, current: Network, previous: Network | None, thresholds: Tensor, rules: Rules,
    part: Propagation, generator: torch.Generator,
) -> Said:  # fmt: skip
    """The labels (H, W) that are kept of an image, from both networks, after region propagation if it is on."""
    answer = ask(current, image, part.regions)
    said = drop(answer.said, thresholds)
    if previous is not None:
        said = merge(said, drop(ask(previous, image).said, thresholds), rules)
    if not part.regions:
        return said
    height, width = said.labels.shape
    sides = (0, answer.fitted[1] - width, 0, answer.fitted[0] - height)
    inside = torch.ones_like(said.labels, dtype=torch.bool)
    labels, confidence, valid = (
        F.pad(x[None], sides, value=fill) for x, fill in ((said.labels, IGNORE), (said.confidence, 0), (inside, False))
    )
    masks = part.sample(answer.out, answer.fitted, generator)
    spread = through_regions(Said(labels, confidence), masks, valid, part, thresholds.numel())
    return Said(*(x[0, :height, :width] for x in spread))


def dynamic_weights(
    logits: Tensor, labels: Tensor, confidence: Tensor, exponents: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of each pseudo-label, and masks of the pixels where the network predicts another class.

    The weight is p_y^a where the network predicts the label, 0 where it predicts another class with more confidence
    than the label has, and p_y^b elsewhere. It is 1 everywhere if a = b = 0. The second mask has the pixels of that 0.

    Args:
        logits: (B, C, h, w), enlarged to the labels; no gradient flows to them.
        labels: (B, H, W), IGNORE where there is none, and the weight 0.
        confidence: (B, H, W), of the labels.
        exponents: a and b.
    """
    counted = labels != IGNORE
    _, surprise = ops.cross_entropy(logits.detach(), labels, counted.float())
    own, sure, _ = ops.pseudo_label(logits.detach(), size=(labels.shape[1], labels.shape[2]))
    p, disagree = surprise.neg().exp(), counted & (own != labels)
    surer = disagree & (sure > confidence)
    if not any(exponents):
        return counted.float(), disagree, surer
    agreeing, doubtful = exponents
    weight = torch.where(disagree, p**doubtful, p**agreeing)
    return torch.where(surer | ~counted, 0, weight), disagree, surer
