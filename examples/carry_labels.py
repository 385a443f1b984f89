"""Labels of a few frames of a film, carried over to the next frames by frozen features. Nothing is trained.

    python examples/carry_labels.py CAMVID [--weights FILE] [--model mobilenetv2_100] [--levels 2,3] [--out OUT]

CAMVID is a folder with a list of lines `image mask` in the order of the film, as CamVid comes in the split of SegNet.
Each labelled frame hands its labels out over the next ones by likeness of features: `pixel_propagate` with the labelled
frame as query, another as key. Of a transformer take a block: --levels 11. Needs `pip install '.[examples]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from scenes import mean_iou, read_image, read_labels, rows
from torch import Tensor

from corrmatch import ops

# Of CamVid's classes: sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist; and of none.
COLORS = torch.tensor([
    [128, 160, 200], [128, 0, 0], [230, 230, 150], [128, 64, 128], [60, 40, 222], [110, 140, 0], [230, 128, 128],
    [64, 64, 128], [220, 90, 20], [240, 220, 0], [0, 160, 160], [40, 40, 40],
]) / 255  # fmt: skip
CLASSES = len(COLORS) - 1  # higher ids in masks do not count
SHARPNESS, NEAR = 15.0, 0.5  # of the likeness, and how much of it is the place in the image


def load(name: str, weights: str | None, pretrained: bool) -> torch.nn.Module:
    """The frozen network."""
    options = {"pretrained_cfg_overlay": {"file": weights}} if weights is not None else {}
    options |= {"dynamic_img_size": True} if "vit" in name else {}
    try:
        return timm.create_model(name, pretrained, num_classes=0, **options).eval()
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{name}: no weights ({error}); give --weights FILE, or --no-pretrained") from None


@torch.no_grad()
def features(model: torch.nn.Module, image: Tensor, levels: list[int]) -> Tensor:
    """(1, D, h, w), on the grid of the first level: each level of length 1, and the place."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = ((image - mean) / std).unsqueeze(0)
    if hasattr(model, "patch_embed"):  # a whole number of patches
        patch = model.patch_embed.patch_size
        x = F.interpolate(x, [round(side / p) * p for side, p in zip(x.shape[2:], patch, strict=True)], mode="bilinear")
    found = model.forward_intermediates(x, indices=levels, norm=True, intermediates_only=True)
    height, width = found[0].shape[2:]
    found = [F.interpolate(f - f.mean((2, 3), keepdim=True), (height, width), mode="bilinear") for f in found]
    place = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij")
    return torch.cat([*(F.normalize(f, dim=1) / len(found) ** 0.5 for f in found), NEAR * torch.stack(place)[None]], 1)


def carry(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Labels (H, W) of the target frame from those of the source."""
    # <(2 f, -1), (g, |g|^2)> is |f|^2 - |f - g|^2: the softmax over positions of the target is a Gaussian kernel.
    query = torch.cat([2 * source, -torch.ones_like(source[:, :1])], 1)
    key = torch.cat([target, target.square().sum(1, keepdim=True)], 1)
    one_hot = F.one_hot(labels.clamp(max=CLASSES), CLASSES + 1)[..., :CLASSES].permute(2, 0, 1).unsqueeze(0).float()
    shares = F.adaptive_avg_pool2d(one_hot, source.shape[2:])
    arrived = ops.pixel_propagate(query, key, shares, scale=SHARPNESS, normalize=True)
    return F.interpolate(arrived, labels.shape, mode="bilinear").argmax(1)[0]


def painted(image: Tensor, labels: Tensor) -> Tensor:
    """The image, tinted by class."""
    return 0.35 * image + 0.65 * COLORS[labels.clamp(max=CLASSES)].permute(2, 0, 1)


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", default="train.txt")
    parser.add_argument("--labelled", default="0,40,90", help="numbers of frames (default: 0,40,90)")
    parser.add_argument("--frames", type=int, default=3, help="to carry their labels to (default: the next 3)")
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--weights", help="a file with weights of the model (default: those of timm's hub)")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights, for a test")
    parser.add_argument("--levels", default="2,3", help="of forward_intermediates (default: 2,3, strides 8 and 16)")
    parser.add_argument("--out", default="carry_labels.png")
    options = parser.parse_args(arguments)
    model, levels = load(options.model, options.weights, options.pretrained), [*map(int, options.levels.split(","))]
    lines = (options.folder / options.list).read_text().splitlines()

    def frame(number: int) -> tuple[Tensor, Tensor]:
        image, mask = (str(options.folder / name) for name in lines[number].split())
        return (image := read_image(image)), read_labels(mask, image)

    table, kept = [], {}
    for start in map(int, options.labelled.split(",")):
        image, labels = frame(start)
        source = features(model, image, levels)
        for step in range(1, options.frames + 1):
            other, truth = frame(start + step)
            found = carry(source, labels, features(model, other, levels))
            counted = truth < CLASSES
            for name, guess in (("same place", labels), ("carried over", found)):
                accuracy = 100 * float((guess == truth)[counted].float().mean())
                kept.setdefault((name, step), []).append((accuracy, mean_iou(guess[counted], truth[counted])))
            if step == 1:
                wrong = (found != truth) & counted
                red = torch.where(wrong, torch.tensor([1.0, 0.1, 0.1])[:, None, None], 0.5 * other)
                table.append({f"Frame {start}, labelled": painted(image, labels), "Next frame": other,
                              "Carried over": painted(other, found), "Truth": painted(other, truth),
                              f"Wrong: {100 * float(wrong.float().mean()):.1f} %": red})  # fmt: skip
    print(f"{options.model}: {len(table)} labelled frames, positions {tuple(source.shape[2:])}")
    for (name, step), values in kept.items():
        accuracy, iou = torch.tensor(values).mean(0).tolist()
        print(f"  {name}, {step} on".ljust(24), f"accuracy {accuracy:5.1f} %  mean IoU {iou:5.1f} %")
    rows(options.out, table)
    print(f"image: {options.out}")


if __name__ == "__main__":
    main()
