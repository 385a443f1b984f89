"""Segmenting a folder of pictures with a trained network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from corrmatch.config import Config
from corrmatch.data.datasets import DataError, read_picture
from corrmatch.data.views import normalize
from corrmatch.methods import build_method
from corrmatch.training import checkpoint
from corrmatch.training.evaluate import segment
from corrmatch.training.pictures import overlay, paint, palette

KINDS = ("index", "color", "overlay")


def load_model(path: Path, overrides: list[str] | None = None) -> tuple[nn.Module, Config, list[str]]:
    """The network that a run evaluated, its configuration and the names of the classes."""
    content = checkpoint.load(path)
    config, classes = checkpoint.config_of(content, overrides), content["classes"]
    method = build_method(config, len(classes), pretrained=False)
    method.load_state_dict(content["method"])
    return next(iter(method.scored.values())).eval(), config, classes


@torch.inference_mode()
def predict(model: nn.Module, config: Config, classes: list[str], source: Path, out: Path, device: torch.device) -> int:
    """Writes index, color and overlay PNGs of every picture in a folder, at its size; returns how many pictures."""
    if not source.is_dir():
        raise DataError(f"{source}: expected a folder of pictures")
    known = Image.registered_extensions()
    paths = [path for path in sorted(source.iterdir()) if path.suffix.lower() in known]
    if not paths:
        raise DataError(f"{source}: there are no pictures")
    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    model.to(device)
    colors = palette(classes)
    for path in tqdm(paths, desc="predict", disable=None):
        picture = read_picture(path)
        labels = segment(model, normalize(picture).to(device), config.eval).cpu()
        index = Image.fromarray(labels.numpy().astype(np.uint8))
        index.putpalette(colors.flatten().tolist())
        shown = overlay(picture.permute(1, 2, 0).as_subclass(torch.Tensor), labels, classes, colors)
        images = (index, Image.fromarray(paint(labels, colors).numpy()), Image.fromarray(shown.numpy()))
        for kind, image in zip(KINDS, images, strict=True):
            image.save(out / kind / f"{path.stem}.png")
    return len(paths)
