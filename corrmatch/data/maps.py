"""Maps that a run computes of its images and reads again: a PNG for each image, in a folder of the work directory.

Maps are written atomically. `maps.json` records the images, classes and settings that they belong to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from corrmatch.data.files import Item
from corrmatch.data.images import DataError, read_ids

LABELS, SHARES = "labels", "shares"
SUFFIX = {LABELS: ".png", SHARES: ".share.png"}
STEPS = 65_535  # the largest number of 16 bits


@dataclass(frozen=True)
class Maps:
    """A folder of maps.

    Attributes:
        folder: Their folder. Labels and shares of the same images may be in one folder.
        facts: Settings that they were made with. Maps made with other settings are not used.
        kind: "labels" in 8 bits, or "shares", numbers from 0 to 1 in steps of 1 / 65535.
    """

    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    kind: str = LABELS

    def path(self, index: int) -> Path:
        """The path of the map of an image, by its number in the list."""
        return self.folder / f"{index:06}{SUFFIX[self.kind]}"

    def paths(self, items: Sequence[Item]) -> list[Path]:
        """The paths of the maps of all images."""
        return [self.path(index) for index in range(len(items))]

    def claim(self, items: Sequence[Item], classes: Sequence[str]) -> None:
        """Prepares the folder: keeps maps of an interrupted run that fit, and removes all others."""
        content = self._content(items, classes)
        if self._found() == content:
            return
        discard(self.folder)
        self.folder.mkdir(parents=True)
        text = json.dumps(content, indent=1)
        atomically(self.folder / "maps.json", lambda draft: draft.write_text(text, encoding="utf-8"))

    def check(self, items: Sequence[Item], classes: Sequence[str]) -> None:
        """Raises DataError for missing maps, and for maps of other images, classes or settings."""
        found, expected = self._found(), self._content(items, classes)
        if found is None:
            raise DataError(f"{self.folder}: maps that this run has made are lost; start it anew")
        wrong = [name for name, value in expected.items() if found.get(name) != value]
        if wrong:
            raise DataError(f"{self.folder}: maps of other {', '.join(wrong)} than this run has")
        missing = [path.name for path in self.paths(items) if not path.is_file()]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(items)} maps are missing, {missing[0]} the first")

    def write(self, index: int, values: np.ndarray) -> None:
        """Writes the map of an image: labels (H, W) uint8, or shares (H, W) float."""
        coded = values if self.kind == LABELS else np.rint(STEPS * values.astype(np.float64)).astype(np.uint16)
        atomically(self.path(index), lambda draft: Image.fromarray(coded).save(draft, "PNG"))

    def read(self, index: int, size: Sequence[int]) -> tv_tensors.Mask:
        """The map of an image of that size (H, W): labels uint8, or shares float32."""
        values = self.values(index)
        if values.shape != tuple(size):
            raise DataError(f"{self.path(index)}: the map is of {values.shape}, its image of {tuple(size)}")
        return tv_tensors.Mask(torch.from_numpy(values))

    def values(self, index: int) -> np.ndarray:
        """The map of an image, of any size."""
        path = self.path(index)
        return read_ids(path) if self.kind == LABELS else _read_shares(path)

    def _content(self, items: Sequence[Item], classes: Sequence[str]) -> dict[str, Any]:
        known = {"classes": list(classes), "images": [item.name for item in items]}
        return known | dict(self.facts)

    def _found(self) -> Any:
        try:
            return json.loads((self.folder / "maps.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file atomically: to a draft in the same folder, which is then renamed."""
    draft = path.with_name(f"{path.name}.partial")
    write(draft)
    os.replace(draft, path)


def discard(folder: Path) -> None:
    """Removes a folder if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


def _read_shares(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as file:
            coded = np.asarray(file)
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises both
        raise DataError(f"{path}: not a readable map: {error}") from error
    if coded.dtype != np.uint16:
        raise DataError(f"{path}: expected a map of 16 bits, got {coded.dtype}")
    return (coded / np.float32(STEPS)).astype(np.float32)


def save_array(path: Path, array: np.ndarray) -> None:
    """NumPy's `save` to exactly this path: NumPy would append .npy to the name of a draft."""
    with path.open("wb") as file:
        np.save(file, array)
