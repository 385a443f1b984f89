"""The files of the last evaluation of a run, in the folder `evaluation` of its work directory.

`evaluation.json` holds the step, the classes and the confusion matrix, and names the files of the panels: label maps
are PNG, what shows the image itself is JPEG.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Views = dict[str, bytes]
FOLDER, FILE = "evaluation", "evaluation.json"


@dataclass(frozen=True)
class Panel:
    """The views of a validation image: encoded images by name. The first one is the image itself."""

    name: str
    views: Views


@dataclass(frozen=True)
class Snapshot:
    """One evaluation."""

    step: int
    labeled: int  # number of labelled training images
    unlabeled: int  # number of unlabelled training images
    classes: list[str]
    confusion: list[list[int]]  # pixels: truth in rows, prediction in columns
    panels: list[Panel]


def encode(pixels: np.ndarray) -> bytes:
    """PNG of (H, W, 3) uint8 where it has at most 256 colours, else JPEG."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if image.getcolors(256) is None:
        image.save(file, "JPEG", quality=85)
    else:
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def media_type(encoded: bytes) -> str:
    """The media type of an image that `encode` returned."""
    return "image/png" if encoded.startswith(b"\x89PNG") else "image/jpeg"


def write(run: Path, snapshot: Snapshot) -> None:
    """Replaces the previous evaluation. At any moment the folder is complete or absent."""
    draft = run / f"{FOLDER}.partial"
    discard(run, FOLDER, draft.name)
    draft.mkdir()
    content = dataclasses.asdict(snapshot)
    for i, panel in enumerate(content["panels"]):
        for name, encoded in panel["views"].items():
            file = f"{i}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.{media_type(encoded).removeprefix('image/')}"
            (draft / file).write_bytes(encoded)
            panel["views"][name] = file
    (draft / FILE).write_text(json.dumps(content))
    os.replace(draft, run / FOLDER)


def read(run: Path) -> Snapshot | None:
    """The last evaluation of a run; None if it wrote none."""
    folder = run / FOLDER
    if not (folder / FILE).is_file():
        return None
    content = json.loads((folder / FILE).read_text())
    panels = [
        Panel(panel["name"], {name: (folder / file).read_bytes() for name, file in panel["views"].items()})
        for panel in content.pop("panels")
    ]
    return Snapshot(**content, panels=panels)


def discard(run: Path, *names: str) -> None:
    """Removes those of the folders that exist."""
    for name in names or (FOLDER,):
        if (run / name).exists():
            shutil.rmtree(run / name)
