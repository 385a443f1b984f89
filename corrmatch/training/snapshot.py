"""The last evaluation of a run as files: the folder `evaluation` of its work directory; the next one takes its place.

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
    """A validation image: what there is to see of it, by name, as encoded images. The first is the image itself."""

    name: str
    views: Views


@dataclass(frozen=True)
class Snapshot:
    """An evaluation."""

    step: int
    labeled: int  # images trained on with their masks
    unlabeled: int  # and without
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
    """Of what `encode` returns."""
    return "image/png" if encoded.startswith(b"\x89PNG") else "image/jpeg"


def write(run: Path, snapshot: Snapshot) -> None:
    """Puts an evaluation in the place of the one before: at any moment the folder is whole or not there."""
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
    """The last evaluation of a run; None where it wrote none."""
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
    """Removes folders of the run where they are."""
    for name in names or (FOLDER,):
        if (run / name).exists():
            shutil.rmtree(run / name)
