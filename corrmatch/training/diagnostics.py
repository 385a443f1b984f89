"""Quality of pseudo-labels (`eval.pseudo_labels`): they are compared with masks of unlabelled images.

No other part of a run opens these masks. The middle of each image, of the size of a training view, is labelled in
evaluation mode by the network whose labels the method trains on, at the method's threshold. Where there is a
correlation head the labels also go through region propagation, whether or not the method makes use of it, unless pixels
have a threshold for each class and regions have none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from corrmatch import ops
from corrmatch.config import Config, ConfigError
from corrmatch.data.datasets import IGNORE, Data, Item
from corrmatch.data.whole import Labelled
from corrmatch.masks import RegionMasks
from corrmatch.methods.base import Method
from corrmatch.methods.parts.propagation import Propagation
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.models.network import evaluating

IMAGES = 256  # the most that are compared: evenly spread over those that have a mask

Sums = dict[str, Tensor]  # float64, over all images; the sums of several processes are added


class Labels(NamedTuple):
    """Labels (B, H, W), and where they are reliable."""

    labels: Tensor
    reliable: Tensor


def choose(data: Data) -> list[Item]:
    """The images that are compared. Raises ConfigError if no unlabelled image has a mask."""
    if not data.withheld:
        raise ConfigError("eval.pseudo_labels: expected masks of unlabelled images, by data.masks or in the list")
    count = min(IMAGES, len(data.withheld))
    return [data.withheld[i * len(data.withheld) // count] for i in range(count)]


@torch.inference_mode()
def count(
    method: Method, items: list[Item], data: Data, config: Config, device: torch.device, process: int = 0,
    processes: int = 1,
) -> Sums:  # fmt: skip
    """Sums over the images. Each image is handled by one process."""
    crop, classes, network = config.train.crop, len(data.classes), method.labeller
    regions = method.propagation.head and method.propagation.fits(method.threshold)
    propagation = Propagation(dataclasses.replace(method.propagation.config, regions=regions))
    mine = Labelled(items[process::processes], data.table, crop)
    loader = DataLoader(mine, batch_size=None, num_workers=config.train.workers, generator=torch.Generator())
    sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in _sizes(classes).items()}
    with evaluating(network):
        for i, (image, mask) in enumerate(loader):
            image, truth, padding = _padded(image.to(device), mask.to(device), crop)
            out = network(image, correlate=propagation.head, features=propagation.spreads)
            pseudo = PseudoLabels.of(propagation.spread(out), padding)
            before = after = Labels(pseudo.labels, pseudo.reliable(method.threshold))
            generator = torch.Generator(device).manual_seed(process + i * processes)  # the same in each evaluation
            if propagation.regions:
                masks = propagation.sample(out, (crop, crop), generator)
                after = Labels(*propagation.targets(pseudo, method.threshold, masks, ~padding, classes))
                parts = (
                    region_sums(masks, truth, classes),
                    row_sums(out.query, out.key, masks.packed.shape[1], generator),
                )
                _add(sums, *parts)
            _add(sums, label_sums(before, after, truth, classes))
    return sums


def label_sums(before: Labels, after: Labels, truth: Tensor, classes: int) -> Sums:
    """Counts pixels whose class is known.

    Args:
        before: Labels at the threshold.
        after: The same after region propagation.
        truth: (B, H, W), IGNORE where the class is not known.
        classes: C.

    Returns:
        truth: (C,), pixels of each class.
        before, after: (C, C), reliable pixels: truth in rows, label in columns.
        added: (3,), pixels that propagation made reliable; of these those whose label is right, and those whose label
            before was right.
        changed: The same of pixels that were reliable and got another label.
    """
    known = truth != IGNORE
    right, right_before = after.labels == truth, before.labels == truth
    added = known & after.reliable & ~before.reliable
    changed = known & before.reliable & after.reliable & (after.labels != before.labels)

    def confusion(x: Labels) -> Tensor:
        counted = known & x.reliable
        cells = truth[counted] * classes + x.labels[counted].long()
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)

    return {
        "truth": torch.bincount(truth[known], minlength=classes),
        "before": confusion(before),
        "after": confusion(after),
        "added": torch.stack([x.sum() for x in (added, added & right, added & right_before)]),
        "changed": torch.stack([x.sum() for x in (changed, changed & right, changed & right_before)]),
    }


def region_sums(masks: RegionMasks, truth: Tensor, classes: int) -> Sums:
    """Area and purity of region masks: the share of a mask's known pixels that are of its most frequent class.

    Returns:
        area: (2,), the sum of the masks' shares of the image, and how many masks there are.
        purity: (2,), the sum of the purities, and of how many masks: those with a known pixel.
    """
    inside, known = masks.to_bool().flatten(2), (truth != IGNORE).flatten(1)
    one_hot = F.one_hot(torch.where(known, truth.flatten(1), classes), classes + 1)[..., :classes]
    pixels = inside.float() @ one_hot.float()  # (B, K, C): exact below 2**24 pixels
    total = pixels.sum(2)
    purity = (pixels.amax(2) / total)[total > 0].double()
    area = inside.double().mean(2)
    return {
        "area": torch.stack([area.sum(), area.new_tensor(area.numel())]),
        "purity": torch.stack([purity.sum(), purity.new_tensor(purity.numel())]),
    }


def row_sums(query: Tensor, key: Tensor, rows: int, generator: torch.Generator) -> Sums:
    """Effective support of rows of the correlation map: exp of the entropy, between 1 and the number of positions.

    Returns:
        support: (3,), the sum over `rows` rows drawn at random, the same in shares of all positions, and how many.
    """
    positions = key.shape[2] * key.shape[3]
    index = torch.randint(query.shape[2] * query.shape[3], (rows,), generator=generator, device=query.device)
    support = torch.special.entr(ops.correlation_rows(query, key, index).flatten(2).double()).sum(2).exp()
    return {"support": torch.stack([support.sum(), support.sum() / positions, support.new_tensor(support.numel())])}


def rates(sums: Sums, classes: list[str]) -> dict[str, float]:
    """The shares that are logged, NaN where the divisor is 0.

    Of all classes together and, with the class's name behind, of each: `coverage`, reliable pixels among those whose
    class is known; `precision`, right ones among the reliable (of a class: among those labelled so). Of each class
    `recall`, too: reliable *and* right among its pixels. The same after region propagation as `after_...`;
    what propagation `added` and `changed`, as a share of the known pixels, how much of it is right (`_precision`), and
    how much of it would have been right as it was labelled before (`_precision_own`). `purity` and `area` of masks;
    `support` in positions and, as `support_share`, among all of them.
    """
    host = {name: value.cpu() for name, value in sums.items()}
    truth, found = host["truth"], dict[str, float]()
    propagated = bool(host["area"][1] > 0)
    for prefix in ("", "after_") if propagated else ("",):
        pixels = host["after" if prefix else "before"]
        found[f"{prefix}coverage"] = _share(pixels.sum(), truth.sum())
        found[f"{prefix}precision"] = _share(pixels.trace(), pixels.sum())
        for c, name in enumerate(classes):
            found[f"{prefix}coverage_{name}"] = _share(pixels[c].sum(), truth[c])
            found[f"{prefix}recall_{name}"] = _share(pixels[c, c], truth[c])
            found[f"{prefix}precision_{name}"] = _share(pixels[c, c], pixels[:, c].sum())
    if propagated:
        for name in ("added", "changed"):
            some, right, own = host[name]
            found |= {name: _share(some, truth.sum()), f"{name}_precision": _share(right, some)}
            found[f"{name}_precision_own"] = _share(own, some)
        for name in ("purity", "area"):
            found[name] = _share(*host[name])
        support, share, rows = host["support"]
        found |= {"support": _share(support, rows), "support_share": _share(share, rows)}
    return found


def _sizes(classes: int) -> dict[str, tuple[int, ...]]:
    pairs, square = (classes, classes), (3,)
    return {
        "truth": (classes,), "before": pairs, "after": pairs, "added": square, "changed": square,
        "area": (2,), "purity": (2,), "support": (3,),
    }  # fmt: skip


def _add(sums: Sums, *parts: Sums) -> None:
    for part in parts:
        for name, value in part.items():
            sums[name] += value


def _padded(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of one image, padded to the right and below: image, truth, and where it is padded."""
    sides = (0, crop - mask.shape[1], 0, crop - mask.shape[0])
    padding = F.pad(torch.zeros_like(mask, dtype=torch.bool), sides, value=True)
    return F.pad(image, sides)[None], F.pad(mask, sides, value=IGNORE)[None], padding[None]


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else math.nan
