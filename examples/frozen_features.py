"""A few labelled patches, spread over an image by the frozen features of a vision transformer. Nothing is trained.

    python examples/frozen_features.py [--model vit_small_patch14_dinov2.lvd142m] [--no-pretrained] [--out OUT]

Similar patches have similar features, so labels follow them: `pixel_propagate` with the features as query and key, and
a gate that only the labelled patches pass. Needs `pip install '.[examples]'`; timm fetches the weights.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from scenes import CLASSES, draw_scene, mean_iou, rows
from torch import Tensor

from corrmatch import ops

SHARPNESS = 30.0  # of the cosine


def load(name: str, pretrained: bool, size: int) -> torch.nn.Module:
    """The frozen transformer."""
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{name}: no weights ({error}); --no-pretrained goes without, and finds little") from None
    return model.eval()


@torch.no_grad()
def patch_features(model: torch.nn.Module, image: Tensor) -> Tensor:
    """(1, D, h, w), of length 1."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    tokens = model.forward_features(((image - mean) / std).unsqueeze(0))[:, model.num_prefix_tokens :]
    side = model.patch_embed.grid_size
    centred = tokens - tokens.mean(1, keepdim=True)
    return F.normalize(centred, dim=2).mT.unflatten(2, side)


def main(arguments: list[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights, for a test")
    parser.add_argument("--size", type=int, default=448, help="side of the image in pixels (default: 448)")
    parser.add_argument("--share", type=float, default=0.08, help="of the patches that are labelled (default: 0.08)")
    parser.add_argument("--out", default="frozen_features.png")
    options = parser.parse_args(arguments)
    model = load(options.model, options.pretrained, options.size)
    image, truth = draw_scene(5, options.size)
    features = patch_features(model, image)
    grid = features.shape[2:]
    one_hot = F.one_hot(truth, CLASSES).permute(2, 0, 1).unsqueeze(0).float()
    shares = F.adaptive_avg_pool2d(one_hot, grid)
    known = (torch.rand(1, *grid, generator=torch.Generator().manual_seed(0)) < options.share).float()

    arrived = ops.pixel_propagate(
        features, features, shares, scale=SHARPNESS, confidence=known, threshold=0.5, normalize=True
    )
    dense = F.interpolate(arrived, size=truth.shape, mode="bilinear").argmax(1)[0]
    sparse = torch.where(known[0] > 0, shares.argmax(1)[0], -1)
    most = torch.full_like(truth, int(truth.flatten().mode().values))
    print(f"{options.model}: {grid[0]} x {grid[1]} patches, {int(known.sum())} of them labelled")
    print(f"  most frequent class   mean IoU {mean_iou(most, truth):5.1f} %")
    print(f"  propagated            mean IoU {mean_iou(dense, truth):5.1f} %")
    seed = int(known.flatten().argmax())
    row = ops.correlation_rows(features, features, torch.tensor([seed]), scale=SHARPNESS)[0, 0]
    row.view(-1)[seed] = 0  # it is by far the most like itself
    labelled = {"Image": image, "Labelled patches": sparse, "Row of the first of them": row}
    rows(options.out, [{**labelled, "Propagated": dense, "Truth": truth}])
    print(f"image: {options.out}")


if __name__ == "__main__":
    main()
