"""Labels of one image, carried over to another of another size: the query is one image, the key the other.

    python examples/across_images.py [OUT.png]

Each labelled position i of the first image hands its label out over all positions j of the second, by likeness of
colour and of the colours around: `pixel_propagate` with N_q != N_k. `normalize` makes each result a weighted mean.
Needs `pip install '.[examples]'`.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from scenes import CLASSES, draw_scene, mean_iou, rows
from torch import Tensor

from corrmatch import ops

WINDOWS = (1, 5)  # pixels over which colours are averaged
SHARPNESS = 20.0


def features(image: Tensor) -> Tensor:
    """(1, 7, H, W): colours averaged over windows, without the light of the image as a whole; and the height."""
    x = (image - image.mean((1, 2), keepdim=True)) / image.std()
    means = [F.avg_pool2d(x.unsqueeze(0), n, 1, n // 2, count_include_pad=False) for n in WINDOWS]
    height = torch.linspace(-0.5, 0.5, image.shape[1]).view(1, 1, -1, 1).expand(1, 1, *image.shape[1:])
    return torch.cat([*means, height], 1) * SHARPNESS**0.5


def carry_over(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Class shares (1, classes, H, W) on the target image."""
    f, g = features(source), features(target)
    # <(2 f, -1), (g, |g|^2)> is |f|^2 - |f - g|^2: the softmax over j is a Gaussian kernel around i.
    query = torch.cat([2 * f, -torch.ones_like(f[:, :1])], 1)
    key = torch.cat([g, g.square().sum(1, keepdim=True)], 1)
    value = F.one_hot(labels, CLASSES).permute(2, 0, 1).unsqueeze(0).float()
    return ops.pixel_propagate(query, key, value, scale=1.0, normalize=True)


def main(arguments: list[str]) -> None:
    """Runs the example."""
    out = arguments[0] if arguments else "across_images.png"
    source, labels = draw_scene(8, 80)
    target, truth = draw_scene(9, 112)
    shares = carry_over(source, labels, target)[0]
    found = shares.argmax(0)
    centres = torch.stack([source[:, labels == c].mean(1) for c in range(CLASSES)])
    # Baselines: the class whose mean colour is nearest, and the label at the same place.
    nearest = torch.cdist(target.flatten(1).T, centres).argmin(1).view(truth.shape)
    print(f"{source.shape[1]}^2 labelled pixels, {target.shape[1]}^2 others")
    same_place = F.interpolate(labels[None, None].float(), size=truth.shape)[0, 0].long()
    print(f"  same place            mean IoU {mean_iou(same_place, truth):5.1f} %")
    print(f"  nearest mean colour   mean IoU {mean_iou(nearest, truth):5.1f} %")
    print(f"  carried over          mean IoU {mean_iou(found, truth):5.1f} %")
    first = {"Labelled image": source, "Its labels": labels, "Confidence": shares.amax(0)}
    second = {"Other image": target, "Labels carried over": found, "Truth": truth}
    rows(out, [first, second])
    print(f"image: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
