"""Spreads a sparse label map over an image, without a network and without training.

    python examples/propagate_labels.py IMAGE LABELS OUT.png [--truth TRUTH.png] [--ignore 255]
    python examples/propagate_labels.py IMAGE DENSE_LABELS OUT.png --sparsify 0.02
    python examples/propagate_labels.py                      # on an image that it draws itself

LABELS is an 8-bit PNG of class ids, most pixels `--ignore`. OUT.png gets the image, the labels, what became of them
and the truth side by side. Needs `pip install '.[examples]'`.

How it works: a pixel's features f are its colour, the mean colour around it, and its place. With query = (2 f, -1) and
key = (f, |f|^2) the score <q_i, k_j> is |f_i|^2 - |f_i - f_j|^2, so its softmax over j is a Gaussian kernel around i.
`pixel_propagate` lets every labelled position i hand out its label through it over all positions j; the gate closes
the unlabelled ones, whose rows then cost nothing, and `normalize` makes the result a weighted mean of what arrives.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import draw_sample, panel, read_image, read_labels
from torch import Tensor

from corrmatch import ops

COLOR = 10.0  # weight of the colour, in Lab / 100
MEAN_COLOR = 10.0  # of the mean colour in a window of WINDOW pixels
WINDOW = 9
PLACE = 1.2  # of the place, in mean distances between labelled pixels
CONFIDENT = 0.9  # share of the labels arriving at a position that must agree for it to hand out labels in --refine


def features(image: Tensor, grid: tuple[int, int], spacing: float) -> Tensor:
    """Features (1, 8, *grid) of an image (3, H, W) in [0, 1]; spacing is in pixels."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    to_xyz = [[0.43395, 0.37622, 0.18983], [0.21267, 0.71515, 0.07218], [0.01776, 0.10947, 0.87277]]
    x, y, z = torch.einsum("dc,chw->dhw", torch.tensor(to_xyz), linear).clamp_min(0.008856) ** (1 / 3)
    lab = torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)]).unsqueeze(0)
    mean = F.avg_pool2d(lab, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    colors = F.adaptive_avg_pool2d(torch.cat([COLOR * lab, MEAN_COLOR * mean], 1), grid)
    rows, columns = (torch.arange(n) * (size / n) for n, size in zip(grid, image.shape[1:], strict=True))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).unsqueeze(0)
    return torch.cat([colors, PLACE / spacing * place], 1)


def spread(f: Tensor, shares: Tensor, trust: Tensor, threshold: float) -> Tensor:
    """Weighted mean of the class shares of all positions that are trusted enough, by likeness of features."""
    square = f.square().sum(1, keepdim=True)
    query, key = torch.cat([2 * f, -torch.ones_like(square)], 1), torch.cat([f, square], 1)
    return ops.pixel_propagate(query, key, shares, scale=1.0, confidence=trust, threshold=threshold, normalize=True)


def propagate(image: Tensor, labels: Tensor, ignore: int, grid: tuple[int, int], refine: bool) -> Tensor:
    """Dense labels (H, W) from sparse ones."""
    labelled = labels != ignore
    classes = int(labels[labelled].max()) + 1
    one_hot = F.one_hot(torch.where(labelled, labels, classes))[..., :classes]
    shares = F.adaptive_avg_pool2d(one_hot.permute(2, 0, 1).unsqueeze(0).float(), grid)  # of the classes in each cell
    known = shares.sum(1) > 0
    shares /= shares.sum(1, keepdim=True).clamp_min(1e-9)
    f = features(image, grid, spacing=float(labelled.float().mean() ** -0.5))
    arrived = spread(f, shares, known.float(), threshold=0.5)
    if refine:  # now every confident position sends its new label, over shorter distances
        settled = torch.where(known.unsqueeze(1), shares, arrived)
        arrived = spread(1.5 * f, settled, torch.where(known, 1, arrived.amax(1)), CONFIDENT)
    dense = F.interpolate(arrived, size=labels.shape, mode="bilinear").argmax(1)[0]
    return torch.where(labelled, labels, dense)


def nearest_label(labels: Tensor, ignore: int) -> Tensor:
    """The baseline: every pixel takes the label of the nearest labelled pixel."""
    points, known = (labels != ignore).nonzero().float(), labels[labels != ignore]
    pixels = torch.cartesian_prod(*(torch.arange(n).float() for n in labels.shape))
    return torch.cat([known[torch.cdist(part, points).argmin(1)] for part in pixels.split(4096)]).view(labels.shape)


def scores(predicted: Tensor, truth: Tensor) -> str:
    """Accuracy and mean IoU over the classes of the truth."""
    classes = int(torch.maximum(predicted, truth).max()) + 1
    table = (classes * truth + predicted).bincount(minlength=classes**2).view(classes, classes).double()
    hits, present = table.diag(), table.sum(1) > 0
    iou = (hits / (table.sum(0) + table.sum(1) - hits))[present].mean()
    return f"accuracy {100 * hits.sum() / table.sum():6.2f} %   mean IoU {100 * iou:6.2f} %"


def peak_memory() -> int | None:
    """Peak resident bytes of this process so far; None where the system does not say."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="IMAGE LABELS OUT", help="none: a drawn sample")
    parser.add_argument("--truth", help="dense labels to compare with")
    parser.add_argument("--ignore", type=int, default=255, help="id of unlabelled pixels (default: 255)")
    parser.add_argument("--sparsify", type=float, metavar="SHARE", help="keep this share of LABELS, compare with all")
    parser.add_argument("--seed", type=int, default=0, help="of --sparsify")
    parser.add_argument("--grid", type=int, default=240, help="positions along the longer side (default: 240)")
    parser.add_argument("--refine", action="store_true", help="a second round from all confident positions; slower")
    options = parser.parse_args(arguments)
    if len(options.files) not in (0, 3):
        parser.error("expected IMAGE LABELS OUT, or none of them")
    if not options.files:
        options.files = draw_sample(Path(tempfile.mkdtemp(prefix="propagate_labels_")))
        options.sparsify = 0.02 if options.sparsify is None else options.sparsify
    image = read_image(options.files[0])
    labels, truth = read_labels(options.files[1], image), None
    if options.sparsify is not None:
        kept = torch.rand(labels.shape, generator=torch.Generator().manual_seed(options.seed)) < options.sparsify
        labels, truth = torch.where(kept, labels, options.ignore), labels
    if options.truth is not None:
        truth = read_labels(options.truth, image)
    labelled, (height, width) = labels != options.ignore, labels.shape
    if not labelled.any():
        raise SystemExit(f"{options.files[1]}: every pixel is {options.ignore}, which --ignore calls unlabelled")

    grid = tuple(max(1, round(n * min(1, options.grid / max(height, width)))) for n in (height, width))
    spread(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), 0.5)  # torch loads parts at first use
    start, before = time.perf_counter(), peak_memory()
    dense = propagate(image, labels, options.ignore, grid, options.refine)
    seconds, after = time.perf_counter() - start, peak_memory()
    print(f"{height} x {width} pixels, {int(labelled.sum())} of them labelled, on a grid of {grid[0]} x {grid[1]}")
    print(f"propagated in {seconds:.2f} s; the whole map would take {(grid[0] * grid[1]) ** 2 / 2**28:.2f} GiB", end="")
    print("" if after is None else f", peak memory grew by {(after - before) / 2**20:.0f} MiB")
    maps = {"Propagated labels": dense}
    if truth is not None:
        maps["Truth"] = truth
        counted = (truth != options.ignore) & ~labelled
        for name, x in {"nearest labelled pixel": nearest_label(labels, options.ignore), "propagated": dense}.items():
            print(f"  {name:<24}{scores(x[counted], truth[counted])}")
    panel(options.files[2], image, labels, maps, options.ignore)
    print(f"panel: {options.files[2]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
