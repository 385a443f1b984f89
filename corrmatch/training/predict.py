"""Segments a folder of images with a trained network."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from corrmatch.config import Config
from corrmatch.data.files import shorten
from corrmatch.data.images import DataError, is_image, read_image
from corrmatch.data.views import normalize
from corrmatch.methods import build_method
from corrmatch.paths import expand, make_folder
from corrmatch.training import checkpoint
from corrmatch.training.evaluate import segment
from corrmatch.training.visualization import overlay, paint, palette

KINDS = ("index", "color", "overlay")


def load_model(path: Path, overrides: list[str] | None = None) -> tuple[nn.Module, Config, list[str]]:
    """Loads the evaluated network of a checkpoint, its configuration and the names of the classes."""
    content = checkpoint.load(path)
    config, classes = checkpoint.config_of(content, overrides), content["classes"]
    method = build_method(config, len(classes), pretrained=False)
    method.load_state_dict(content["method"])
    return next(iter(method.scored.values())).eval(), config, classes


@torch.inference_mode()
def predict(model: nn.Module, config: Config, classes: list[str], source: Path, out: Path, device: torch.device) -> int:
    """Writes index, color and overlay PNGs of every image in a folder, at its size; returns how many images.

    Images that cannot be read are named in a DataError when all others are written.
    """
    source, out = expand(source), expand(out)
    results = result_names(images_of(source))
    try:
        for kind in KINDS:
            make_folder(out / kind)
    except ValueError as error:
        raise DataError(str(error)) from error
    model.to(device)
    colors, broken = palette(classes), list[str]()
    for path, name in tqdm(results.items(), desc="predict", disable=None):
        try:
            image = read_image(path)
        except DataError as error:
            broken.append(str(error))
            continue
        labels = segment(model, normalize(image).to(device), config.eval).cpu()
        index = Image.fromarray(labels.numpy().astype(np.uint8))
        index.putpalette(colors.flatten().tolist())
        shown = overlay(image.permute(1, 2, 0).as_subclass(torch.Tensor), labels, classes, colors)
        panels = (index, Image.fromarray(paint(labels, colors).numpy()), Image.fromarray(shown.numpy()))
        for kind, panel in zip(KINDS, panels, strict=True):
            panel.save(out / kind / name)
    if broken:
        written = len(results) - len(broken)
        raise DataError("\n  ".join([f"{written} images: {out}; {len(broken)} cannot be used:", *broken]))
    return len(results)


def images_of(folder: Path) -> list[Path]:
    """The images in a folder. Other files are reported in one line."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of images")
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    images = [path for path in files if is_image(path.name)]
    if not images:
        raise DataError(f"{folder}: there are no images")
    others = [path.name for path in files if not is_image(path.name)]
    if others:
        tqdm.write(f"{folder}: {len(others)} files are no images, passed over: {shorten(others)}", file=sys.stderr)
    return images


def result_names(paths: list[Path]) -> dict[Path, str]:
    """a.png for a.jpg, or a.jpg.png if another image would have the same name. Upper and lower case count as equal."""
    count = Counter(name.lower() for path in paths for name in (path.stem, path.name))
    return {path: f"{path.stem if count[path.stem.lower()] == 1 else path.name}.png" for path in paths}
